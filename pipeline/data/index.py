"""The index of a data set: which shards, how many samples in each, where each sample lies, and the name of the whole.

A folder of uncompressed tars -> one segment beside each tar (segment.py) -> shards.idx, the root (root.py), written
last. `identity` follows from names and contents of the shards alone and stands in every checkpoint. The tars stay as
they are: other readers do not notice. Opening maps the root and reads nothing else, so a million shards open as ten do.

Nothing is kept from an older index, and each file is replaced in one step (written beside, fsync, rename): a reader
sees the old or the new one, never half of one. An index that does not fit the tars is named, never used. A scan that
was stopped or killed goes on where it was (notes.py).

What it gives up: a shard that changed without changing its size is found when its samples are read, not when it is
opened. Where the tars cannot be listed cheaply, that holds for their sizes too.
"""

from __future__ import annotations

import shlex
from collections.abc import Generator, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data import notes, root, segment
from pipeline.data.notes import Note
from pipeline.data.parallel import Mapping, processes
from pipeline.data.root import ROOT, Shard, Shards
from pipeline.data.segment import Segment, open_segment, scan_tar
from pipeline.data.storage import Folder, Storage, find_shards, map_file, open_storage
from pipeline.errors import DataError
from pipeline.whole_file import put, sync

if TYPE_CHECKING:
    from pipeline.data.remote.cache import Place

OLD_ROOT = "index.json"  # of format 1


class Index:
    """A data set's table of shards. Samples are numbered from 0 through all shards in the table's order.

    shards: a lazy sequence.  identity: hex.  samples, bytes: of all, bytes of the tars.
    """

    def __init__(self, storage: Storage, shards: Shards, identity: str) -> None:
        self.storage, self.shards, self.identity = storage, shards, identity
        self.samples = int(self.starts[-1])
        self.bytes = int(shards.records["bytes"].sum())

    @cached_property
    def starts(self) -> np.ndarray:
        """int64[shards + 1]: the number of the first sample of each shard, and at the end the number of all samples."""
        starts = np.zeros(len(self.shards) + 1, np.int64)
        np.cumsum(self.shards.records["samples"], out=starts[1:])
        return starts

    @property
    def place(self) -> str:
        """Where the data set lies: a folder, or a URL."""
        return self.storage.place

    def locate(self, number: int) -> tuple[int, int]:
        """Shard number and row in that shard of a sample; IndexError when there is no such sample."""
        if not 0 <= number < self.samples:
            raise IndexError(f"{self.storage.place}: no sample {number}, there are {self.samples}, from 0")
        shard = int(self.starts.searchsorted(number, "right")) - 1
        return shard, number - int(self.starts[shard])

    def places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard numbers and rows, int64[k] each, of samples int64[k]; IndexError when one of them does not exist."""
        wrong = numbers[(numbers < 0) | (numbers >= self.samples)]
        if wrong.size:
            raise IndexError(f"{self.storage.place}: no sample {wrong[0]}, there are {self.samples}, from 0")
        shards = self.starts.searchsorted(numbers, "right") - 1
        return shards, numbers - self.starts[shards]

    def prefix_identity(self, samples: int) -> str | None:
        """The identity of a data set that has only the first shards of this one, with so many samples in all.

        None when no shard ends there. So a data set that has grown by shards behind its old ones knows the old one.
        Shards without samples at that edge are counted in.
        """
        shards = int(self.starts.searchsorted(samples, "right")) - 1
        return self.shards.identity(shards) if samples > 0 and self.starts[shards] == samples else None

    def tar_path(self, shard: int) -> str:
        """Where the tar of a shard lies, for messages."""
        return f"{self.place}/{self.shards.name(shard)}"

    def segment(self, shard: int) -> Segment:
        """Map the segment of a shard; DataError when it is missing, damaged or not of this root."""
        return read_segment(self.storage, self.shards[shard])


def read_segment(storage: Storage, shard: Shard) -> Segment:
    """Map the segment of a shard; DataError when it is missing, damaged or not the one that `shard` tells of."""
    name, mend = f"{shard.name}.idx", _mend(storage)
    place = f"{storage.place}/{name}"
    try:
        view = storage.segment(shard.name, shard.digest)
    except FileNotFoundError:
        raise DataError(f"{place}: this part of the index is missing; {mend}") from None
    except OSError as error:
        raise DataError(f"{place}: cannot be read ({error.strerror}); {mend}") from error
    return open_segment(view, shard.digest, place, mend)


def open_index(place: Path | str | Storage, cache: Place | None = None) -> Index:
    """Read the root and compare it with the tars that are there (names and sizes, nothing else is read).

    Raises DataError when there is none, when it is damaged, or when tars were added, removed or changed since.
    """
    index = read_root(place, cache)
    try:
        _compare(index)
    except DataError:
        index.storage.close()
        raise
    return index


def _compare(index: Index) -> None:
    there = index.storage.sizes(len(index.shards))
    if there is None:
        return
    noted = dict(zip(index.shards.all_names(), index.shards.records["bytes"].tolist()))
    if there == noted:
        return
    changes = [f"{name} is gone" for name in noted if name not in there]
    changes += [f"{name} is new" for name in there if name not in noted]
    changes += [
        f"{name} had {noted[name]} bytes, has {there[name]}"
        for name in noted
        if there.get(name, noted[name]) != noted[name]
    ]
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    raise DataError(
        f"{index.storage.place}: the shards are not those of the index: {'; '.join(changes[:3])}{more}. If a shard is "
        f"damaged, copy it again; if the change is meant, {_mend(index.storage)}"
    )


def read_root(place: Path | str | Storage, cache: Place | None = None) -> Index:
    """The index as it was written, not compared with the tars; DataError when there is none or it is damaged.

    cache: of a URL's pieces on this node.
    """
    storage = open_storage(place, cache)
    try:
        return _read_root(storage)
    except DataError:
        if storage is not place:
            storage.close()
        raise


def _read_root(storage: Storage) -> Index:
    mend = _mend(storage)
    try:
        view = storage.map(ROOT)
    except FileNotFoundError:
        raise DataError(f"{storage.place}: {_no_root(storage, mend)}") from None
    except OSError as error:
        raise DataError(f"{storage.place}/{ROOT}: cannot be read ({error.strerror}); {mend}") from error
    return Index(storage, *root.read(view, f"{storage.place}/{ROOT}", mend))


def scan(folder: Path | str, mapping: Mapping = map) -> Generator[Shard, None, None]:
    """Read every tar of a folder once and write its segment; each Shard comes when it is done, in the order of names.

    mapping: who does it, see parallel.py. Goes on where a scan stopped that did not come to its `commit`. Raises
    DataError at the first tar that cannot be read, naming it. The root is not written, that is what `commit` does.
    """
    shards, folder = find_shards(folder), Path(folder)
    with notes.writing(folder) as written:
        work = [(folder / name, written.before.get(name)) for name in shards]
        for note in mapping(_scan_shard, work):
            if note != written.before.get(note.shard.name):
                written.add(note)
            yield note.shard


def unfinished(folder: Path | str) -> int:
    """Shards that a stopped scan of this folder has done."""
    return len(notes.read(Path(folder)))


def commit(folder: Path | str, shards: Iterable[Shard]) -> Index:
    """Write the root over the shards that `scan` gave, and open it. DataError when they hold no sample."""
    folder, table = Path(folder), sorted(shards)
    if not sum(shard.samples for shard in table):
        raise DataError(f"{folder}: its {len(table)} shards hold no samples")
    path = folder / ROOT
    _refuse_foreign(path, root.MAGIC)
    _replace(path, root.write(table))
    sync(folder)  # the renames of all segments too
    if _has(Folder(folder), OLD_ROOT):
        (folder / OLD_ROOT).unlink()
    notes.remove(folder)
    return open_index(folder)


def build(folder: Path | str, workers: int = 1) -> Index:
    """Index a folder of tars: `scan`, in so many processes, then `commit`."""
    return commit(folder, scan(folder, processes(workers)))


def segment_path(tar: Path) -> Path:
    """Where the segment of a tar lies."""
    return tar.with_name(f"{tar.name}.idx")


def _scan_shard(work: tuple[Path, Note | None]) -> Note:
    """Scan one tar, or believe the note of an earlier scan."""
    path, note = work
    target = segment_path(path)
    try:
        before = notes.stamp(path)
        if note is not None and note.stamp == before and _digest_of(target) == note.shard.digest:
            return note
        known = notes.settled(before)
        content, samples, size = scan_tar(path)
        unchanged = notes.stamp(path) == before
    except OSError as error:
        raise DataError(
            f"{path}: the shard cannot be read ({error.strerror}); give permission, or copy it again"
        ) from error
    if not unchanged:
        raise DataError(f"{path}: changed while it was read; wait until it is whole, then index again")
    _refuse_foreign(target, segment.MAGIC)
    _replace(target, content)
    return Note(Shard(path.name, samples, size, segment.digest(content)), known)


def _digest_of(path: Path) -> str | None:
    try:
        return segment.digest(map_file(path))
    except OSError:
        return None


def _mend(storage: Storage) -> str:
    return f"run `millstream data index {shlex.quote(storage.place)}`"


def _no_root(storage: Storage, mend: str) -> str:
    """What is there instead, and what to do then: what was packed lies one folder below the one that was named."""
    if _has(storage, OLD_ROOT):
        return f"its index is of an older Millstream ({OLD_ROOT}); {mend}"
    if isinstance(storage, Folder):
        folder = Path(storage.place)
        deeper = sorted(str(path.parent) for path in folder.glob(f"*/{ROOT}"))
        if deeper and not any(folder.glob("*.tar")):
            return f"no index of its shards; name a folder below that has one: {', '.join(deeper)}"
        find_shards(folder)  # says what is there instead of shards, if there are none
    return f"no index of its shards; {mend}"


def _has(storage: Storage, name: str) -> bool:
    """Whether there is a root of ours under this name."""
    try:
        return storage.map(name)[: len(root.MAGIC)] == root.MAGIC
    except OSError:
        return False


def _refuse_foreign(path: Path, magic: bytes) -> None:
    """Other programs keep indexes under these names too; only our own, or an empty file, is replaced."""
    if path.exists() and (start := bytes(map_file(path)[: len(magic)])) and start != magic:
        raise DataError(f"{path}: another program's index has the name of ours; move it away, then index again")


def _replace(path: Path, content: bytes) -> None:
    """Put a whole file in its place, or leave what was there. What a kill leaves is written over the next time."""
    try:
        put(path, [content])
    except OSError as error:
        raise DataError(
            f"{path}: the index cannot be written ({error.strerror}); indexes lie beside their shards, so give "
            "write permission and space there, or copy the shards"
        ) from error
