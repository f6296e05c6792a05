"""Samples of a data set by their number: tars are mapped, and only what is asked for is read, checked and decoded.

number -> shard and row (index.py) -> places of the fields (segment.py) -> bytes, digest compared -> value (decode.py).
Every field's digest is compared with the index when a sample's bytes are first touched, so bytes that changed after
indexing never reach a task. Threads share one Dataset; a shard is mapped when it is first needed, and a bounded number
of them stay mapped.

What it gives up: mapped files cannot report an error of the disk or a file cut while it is read; the system ends the
process (SIGBUS). The next start compares sizes and names the shard.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from pipeline.data.decode import decode
from pipeline.data.index import Index, open_index
from pipeline.data.segment import Field, Segment
from pipeline.errors import DataError

MAX_MAPPED = 256  # shards at once; each holds two file descriptors, of which a process often has 1,024


class _Mapped(NamedTuple):
    path: Path
    tar: memoryview
    segment: Segment


class Sample:
    """One sample: the fields of one key. Nothing is read before it is asked for; not shared between threads.

    key: as in the tar, without extension.  number: in the data set, from 0.
    """

    __slots__ = ("_check", "_checked", "_fields", "_row", "_shard", "number")

    def __init__(self, number: int, row: int, shard: _Mapped, check: bool) -> None:
        self.number = number
        self._row, self._shard, self._check = row, shard, check
        self._fields: dict[str, Field] = shard.segment.sample(row)
        self._checked: dict[str, memoryview] = {}

    @property
    def key(self) -> str:
        return self._shard.segment.key(self._row)

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields (their extensions), in the order of the tar."""
        return tuple(self._fields)

    def __contains__(self, field: object) -> bool:
        return field in self._fields

    def __getitem__(self, field: str) -> Any:
        """The decoded value of a field, new on each call; DataError naming shard and member when it cannot be had."""
        data = self.raw(field)
        try:
            return decode(field, data)
        except DataError as error:
            raise DataError(f"{self._where(field)}: {error}") from error

    def first(self, *fields: str) -> Any:
        """The decoded value of the first of these fields that the sample has; DataError when it has none of them."""
        return self[next((field for field in fields if field in self._fields), " or ".join(fields))]

    def raw(self, field: str) -> memoryview:
        """The bytes of a field, read-only and without a copy; DataError when it is absent or its bytes changed."""
        data = self._checked.get(field)
        if data is not None:
            return data
        place = self._fields.get(field)
        if place is None:
            raise DataError(
                f"{self._shard.path}: sample {self.key} (number {self.number}) has no field {field}, it has "
                f"{', '.join(self._fields)}; use another task, or pack the data set with that field"
            )
        data = self._shard.tar[place.offset : place.offset + place.length]
        if self._check and xxh3_64_intdigest(data) != place.digest:
            raise DataError(
                f"{self._where(field)}: its {place.length} bytes at byte {place.offset} are not those that were "
                f"indexed (xxh3 differs); copy the shard again, then `millstream data verify {self._shard.path.parent}`"
            )
        self._checked[field] = data
        return data

    def _where(self, field: str) -> str:
        return f"{self._shard.path}: member {self.key}.{field} (sample {self.number})"


class Dataset:
    """An indexed folder of shards, opened for reading; `open_dataset` makes one. Threads may share it."""

    def __init__(self, index: Index, check_digests: bool = True) -> None:
        self.index = index
        self.check_digests = check_digests
        self._mapped: dict[int, _Mapped] = {}
        self._lock = threading.Lock()

    @property
    def identity(self) -> str:
        """What the data are, whatever their folder is called: hex, see index.py."""
        return self.index.identity

    def __len__(self) -> int:
        return self.index.samples

    def sample(self, number: int) -> Sample:
        """The sample with this number (from 0). IndexError when there is none, DataError when its shard changed."""
        shard, row = self.index.locate(number)
        mapped = self._mapped.get(shard)
        return Sample(number, row, mapped or self._map(shard), self.check_digests)

    def close(self) -> None:
        """Let go of all files; those whose bytes are still in use stay mapped until they are not."""
        with self._lock:
            self._mapped.clear()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _map(self, shard: int) -> _Mapped:
        with self._lock:
            if shard not in self._mapped:
                while len(self._mapped) >= MAX_MAPPED:
                    self._mapped.pop(next(iter(self._mapped)))  # the one mapped longest ago
                self._mapped[shard] = self._open(shard)
            return self._mapped[shard]

    def _open(self, shard: int) -> _Mapped:
        name, _, size, _ = self.index.shards[shard]
        path, segment = self.index.tar_path(shard), self.index.segment(shard)
        try:
            tar = self.index.storage.map(name)
        except OSError as error:
            raise DataError(f"{path}: the shard cannot be read ({error.strerror}); copy it again") from error
        if len(tar) != size:
            raise DataError(f"{path}: had {size} bytes when it was indexed, has {len(tar)}; copy it again")
        return _Mapped(path, tar, segment)


def open_dataset(folder: Path | str, check_digests: bool = True) -> Dataset:
    """Open an indexed folder of shards.

    Raises DataError when there is no index or it is not of these shards, see index.open_index.
    """
    return Dataset(open_index(folder), check_digests)
