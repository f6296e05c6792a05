"""The index of a data set: which shards, how many samples in each, where each sample lies, and the name of the whole.

A folder of uncompressed tars -> one segment beside each tar (segment.py) -> index.json, the root, written last. The
root is a table of shards, one line each; `identity` is the sha256 of that table, so it depends on names and contents
of the shards and not on folder, time or machine. It stands in every checkpoint. The tars stay as they are: other
readers do not notice.

Nothing is kept from an older index, and each file is replaced in one step (written beside, fsync, rename): a reader
sees the old or the new one, never half of one. An index that does not fit the tars is named, never used.

What it gives up: a shard that changed without changing its size is found when its samples are read, not when it is
opened.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from pipeline.data.damage import Damage, compare
from pipeline.data.segment import MAGIC, Segment, digest, map_file, open_segment, scan_tar
from pipeline.errors import DataError

FORMAT, VERSION = "millstream index", 1
ROOT = "index.json"
REFUSED_ENDINGS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")


class Shard(NamedTuple):
    """One line of the root. name: of the tar in its folder.  bytes: of the tar.  digest: xxh3_128 of its segment."""

    name: str
    samples: int
    bytes: int
    digest: str


@dataclass(frozen=True)
class Index:
    """A data set's table of shards. Samples are numbered from 0 through all shards in the table's order."""

    folder: Path
    shards: tuple[Shard, ...]
    identity: str

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The number of the first sample of each shard, and at the end the number of all samples."""
        return tuple(accumulate((shard.samples for shard in self.shards), initial=0))

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return self.starts[-1]

    @cached_property
    def bytes(self) -> int:
        """Size of all tars, in bytes."""
        return sum(shard.bytes for shard in self.shards)

    def locate(self, number: int) -> tuple[int, int]:
        """Shard number and row in that shard of a sample; IndexError when there is no such sample."""
        if not 0 <= number < self.starts[-1]:
            raise IndexError(f"{self.folder}: no sample {number}, there are {self.samples}, from 0")
        shard = bisect_right(self.starts, number) - 1
        return shard, number - self.starts[shard]

    def tar_path(self, shard: int) -> Path:
        """Where the tar of a shard lies."""
        return self.folder / self.shards[shard].name

    def segment(self, shard: int) -> Segment:
        """Map the segment of a shard; DataError when it is missing, damaged or not of this root."""
        return open_segment(_segment_path(self.tar_path(shard)), self.shards[shard].digest)


class ShardReport(NamedTuple):
    """A shard that was read to its end. bytes: of the tar.  damages: how many were reported before this."""

    shard: str
    samples: int
    bytes: int
    damages: int


def find_shards(folder: Path | str) -> list[Path]:
    """The tars of a folder by name. DataError when there is no folder, no tar, or a compressed one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of shards; check the path, or make one with `millstream data pack`")
    found = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    refused = [name for name in found if name.lower().endswith(REFUSED_ENDINGS)]
    if refused:
        raise DataError(
            f"{folder / refused[0]}: compressed shards are not read ({len(refused)} here), samples are read at their "
            "places; unpack each to a .tar (`gzip -d`, `xz -d`, `zstd -d --rm`)"
        )
    shards = [folder / name for name in found if name.endswith(".tar")]
    if not shards:
        deeper = sorted(path.parent.name for path in folder.glob("*/*.tar"))
        hint = f"its folder {deeper[0]} has some, name that one" if deeper else "pack some with `millstream data pack`"
        raise DataError(f"{folder}: no .tar shards in this folder; {hint}")
    for shard in shards:
        if not shard.is_file():
            raise DataError(f"{shard}: not a plain file; copy its bytes to a .tar in this folder")
    return shards


def scan(folder: Path | str, workers: int = 1) -> Iterator[Shard]:
    """Read every tar of a folder once and write its segment; each Shard comes when it is done, in the order of names.

    workers: processes. Raises DataError at the first tar that cannot be read, naming it. The root is not written, that
    is what `commit` does.
    """
    shards = find_shards(folder)
    if workers <= 1 or len(shards) == 1:
        yield from map(_index_shard, shards)
        return
    context = multiprocessing.get_context("spawn")  # no fork: the caller may have threads
    with ProcessPoolExecutor(min(workers, len(shards)), mp_context=context) as pool:
        yield from pool.map(_index_shard, shards)


def commit(folder: Path | str, shards: Iterable[Shard]) -> Index:
    """Write the root over the shards that `scan` gave, and open it. DataError when they hold no sample."""
    folder, table = Path(folder), sorted(shards)
    if not sum(shard.samples for shard in table):
        raise DataError(f"{folder}: its {len(table)} shards hold no samples")
    lines = ",\n".join(json.dumps(shard) for shard in table)
    body = f'"shards": [\n{lines}\n]}}\n'.encode()
    path = folder / ROOT
    _refuse_foreign(path, f'{{"format": "{FORMAT}"'.encode())
    head = json.dumps({"format": FORMAT, "version": VERSION, "identity": hashlib.sha256(body).hexdigest()})
    _replace(path, head[:-1].encode() + b",\n" + body)
    return open_index(folder)


def build(folder: Path | str, workers: int = 1) -> Index:
    """Index a folder of tars: `scan`, then `commit`."""
    return commit(folder, scan(folder, workers))


def open_index(folder: Path | str) -> Index:
    """Read the root and compare it with the tars that are there (names and sizes, nothing else is read).

    Raises DataError when there is none, when it is damaged, or when tars were added, removed or changed since.
    """
    folder = Path(folder)
    index = read_root(folder)
    there = {path.name: path.stat().st_size for path in find_shards(folder)}
    noted = {shard.name: shard.bytes for shard in index.shards}
    changes = [f"{name} is gone" for name in noted if name not in there]
    changes += [f"{name} is new" for name in there if name not in noted]
    changes += [
        f"{name} had {noted[name]} bytes, has {there[name]}"
        for name in noted
        if there.get(name, noted[name]) != noted[name]
    ]
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise DataError(
            f"{folder}: the shards are not those of the index: {'; '.join(changes[:3])}{more}. If a shard is damaged, "
            f"copy it again; if the change is meant, run `millstream data index {folder}`"
        )
    return index


def verify(folder: Path | str) -> Iterator[Damage | ShardReport]:
    """Read every byte of every shard and compare with the index; each Damage comes before the ShardReport of its shard.

    Raises DataError only when there is no folder or no good root to compare with.
    """
    folder = Path(folder)
    index = read_root(folder)
    for number, shard in enumerate(index.shards):
        found = 0
        for damage in _damages(index, number):
            found += 1
            yield damage
        yield ShardReport(shard.name, shard.samples, shard.bytes, found)
    for name in sorted({path.name for path in folder.glob("*.tar")} - {shard.name for shard in index.shards}):
        yield Damage(name, None, "new", f"{folder / name}: not in the index; run `millstream data index {folder}`")


def _damages(index: Index, number: int) -> Iterator[Damage]:
    shard, path = index.shards[number], index.tar_path(number)
    if not path.exists():
        yield Damage(shard.name, None, "missing", f"{path}: the shard is missing; copy it again")
        return
    try:
        segment = index.segment(number)
    except DataError as error:
        yield Damage(shard.name, None, "index", str(error))
        return
    yield from compare(path, segment)


def _index_shard(path: Path) -> Shard:
    segment, samples, size = scan_tar(path)
    target = _segment_path(path)
    _refuse_foreign(target, MAGIC)
    _replace(target, segment)
    return Shard(path.name, samples, size, digest(segment))


def _segment_path(tar: Path) -> Path:
    return tar.with_name(f"{tar.name}.idx")


def read_root(folder: Path | str) -> Index:
    """The root as it was written, not compared with the tars; DataError when there is none or it is damaged."""
    folder = Path(folder)
    path, mend = folder / ROOT, f"run `millstream data index {folder}`"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{folder}: no index of its shards; {mend}") from None
    try:
        root = json.loads(data)
    except ValueError:
        root = None
    if not isinstance(root, dict) or root.get("format") != FORMAT:
        raise DataError(f"{path}: damaged, or not Millstream's; remove it and {mend}")
    if root.get("version") != VERSION:
        raise DataError(f"{path}: format {root.get('version')}, this Millstream reads format {VERSION}; {mend}")
    if hashlib.sha256(data.partition(b"\n")[2]).hexdigest() != root["identity"]:
        raise DataError(f"{path}: damaged or edited, its table is not the one it was written with; {mend}")
    return Index(folder, tuple(map(Shard._make, root["shards"])), root["identity"])


def _refuse_foreign(path: Path, magic: bytes) -> None:
    """Other programs keep indexes under these names too; only our own, or an empty file, is replaced."""
    if path.exists() and (start := bytes(map_file(path)[: len(magic)])) and start != magic:
        raise DataError(f"{path}: another program's index has the name of ours; move it away, then index again")


def _replace(path: Path, content: bytes) -> None:
    """Put a whole file in its place, or leave what was there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(
            f"{path}: the index cannot be written ({error.strerror}); indexes lie beside their shards, so give "
            "write permission and space there, or copy the shards"
        ) from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
