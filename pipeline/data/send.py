"""A data set from its folder to any URL that fsspec knows, such as s3://bucket/photos: found there whole or not at all.

A store has no rename, so the index is the commit: its root is sent when everything else is there. Before the first file
a note is left at the URL (SENDING) that says which data set is on its way; so what was stopped goes on with the files
that are missing, and two data sets never mix. Nothing there is overwritten.

Credentials and endpoints come from the environment, as the store's own library finds them. What it gives up: a file
that was cut begins again, and what is there is compared by size, not by its bytes.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.data import parallel
from pipeline.data.index import open_index
from pipeline.data.pack.writer import Progress, silent
from pipeline.data.root import ROOT
from pipeline.errors import DataError
from pipeline.object_store import Store, open_store

SENDING = "sending.json"


class Sent(NamedTuple):
    """files, bytes: sent now; what was there before is not counted."""

    files: int
    bytes: int


def send(folder: Path, url: str, threads: int = 8, progress: Progress = silent) -> Sent:
    """Send a data set, or a folder of several (train, test), with all that lies beside the shards.

    Raises DataError when `folder` holds no good data set, when something else is at the URL, and when the store fails
    after all retries.
    """
    sets = [folder] if (folder / ROOT).exists() else sorted(path.parent for path in folder.glob(f"*/{ROOT}"))
    if not sets:
        raise DataError(f"{folder}: no index of shards, here or one folder below; run `millstream data index {folder}`")
    identities = {each.relative_to(folder).as_posix(): open_index(each).identity for each in sets}
    found = (path for each in sets for path in each.iterdir() if path.is_file() and not path.name.startswith("."))
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(found)}
    with closing(open_store(url)) as store:
        there = _sizes(store)
        if there.get(SENDING) is None and _is_all_there(folder, store, files, there):
            return Sent(0, 0)
        note = json.dumps({"data": identities, "of": hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()})
        if there and (SENDING not in there or store.read(SENDING) != note.encode()):
            raise DataError(
                f"{url} holds something else already; nothing was changed: choose another URL, or remove it"
            )
        if not there:
            store.write(SENDING, note.encode())
        missing = [name for name, size in files.items() if there.get(name) != size]
        done, total = 0, sum(files[name] for name in missing)
        roots = [name for name in missing if name.rpartition("/")[2] == ROOT]
        for names in ([name for name in missing if name not in roots], roots):
            for size in parallel.threads(threads)(partial(_send, store, folder), names):
                done += size
                progress("send", done, total)
        store.remove(SENDING)
        return Sent(len(missing), total)


def _sizes(store: Store) -> dict[str, int]:
    """All files that are there by name, with their bytes."""
    infos = store.infos()
    if infos is None:
        raise DataError(f"{store.url} cannot be written to; use the store's own URL, such as s3://bucket/folder")
    return {name: info.size for name, info in infos.items()}


def _is_all_there(folder: Path, store: Store, files: dict[str, int], there: dict[str, int]) -> bool:
    """Whether this data set was sent before, to its end."""
    roots = [name for name in files if name.rpartition("/")[2] == ROOT]
    return there == files and all(store.read(name) == (folder / name).read_bytes() for name in roots)


def _send(store: Store, folder: Path, name: str) -> int:
    size = (folder / name).stat().st_size
    store.put(folder / name, name)
    if (found := store.info(name).size) != size:
        raise DataError(f"{store.url}/{name} has {found} bytes after {size} were sent; send again")
    return size
