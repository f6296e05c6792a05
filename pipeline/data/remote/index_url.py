"""Indexes tars that lie at a URL: each is fetched once, scanned as a local one is, and its index put beside it.

The root goes last, in one write, so a data set is indexed whole or not at all. What it gives up: every byte is fetched,
for the index has a digest of each; and a scan that was stopped begins anew.
"""

from __future__ import annotations

from functools import partial

from pipeline.data import parallel, root, segment
from pipeline.data.index import Index, open_index
from pipeline.data.pack.writer import Progress, silent
from pipeline.data.remote.shards import TAR, Remote
from pipeline.data.root import ROOT, Shard
from pipeline.errors import DataError


def index_url(url: str, threads: int = 4, progress: Progress = silent) -> Index:
    """Index the tars below a URL. Threads scan so many at a time; each needs room for one tar in the cache's folder.

    Raises DataError when the store cannot be listed or written to, for a tar that cannot be read, and for another
    program's index in the place of ours.
    """
    remote = Remote(url)
    try:
        infos = remote.store.infos()
        if infos is None:
            mend = (
                "index a copy in a folder with `millstream data index FOLDER`, and put what it writes beside the tars"
            )
            raise DataError(f"{url}: http(s) can be read only; {mend}")
        tars = {name: info.size for name, info in sorted(infos.items()) if name.endswith(TAR) and "/" not in name}
        if not tars:
            raise DataError(f"{url}: no .tar shards there; check the URL, or send some with `millstream data send`")
        for name in (ROOT, *(f"{tar}.idx" for tar in tars)):
            magic = root.MAGIC if name == ROOT else segment.MAGIC
            if name in infos and infos[name].size and remote.store.read(name)[: len(magic)] != magic:
                raise DataError(f"{url}/{name}: another program's index has the name of ours; move it away")
        shards, done, total = [], 0, sum(tars.values())
        for shard in parallel.threads(threads)(partial(_scan, remote), tars):
            shards.append(shard)
            done += shard.bytes
            progress("index", done, total)
        if not sum(shard.samples for shard in shards):
            raise DataError(f"{url}: its {len(shards)} shards hold no samples")
        remote.store.write(ROOT, root.write(shards))
        return open_index(remote)
    finally:
        remote.close()


def _scan(remote: Remote, name: str) -> Shard:
    place = f"{remote.place}/{name}"
    content, samples, size = segment.scan(remote.map(name), place)
    remote.store.write(f"{name}.idx", content)
    return Shard(name, samples, size, segment.digest(content))
