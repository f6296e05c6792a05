"""Samples of a data set by their number: tars are mapped, and only what is asked for is read, checked and decoded.

number -> shard and row (index.py) -> places of the fields (segment.py) -> bytes, digest compared -> value (decode.py).
Every field's digest is compared with the index when a sample's bytes are first touched, so bytes that changed after
indexing never reach a task. samples.py reads a whole micro batch at once. Threads share one Dataset; a shard is mapped
when it is first needed, and a bounded number of them stay mapped.

What it gives up: mapped files cannot report an error of the disk or a file cut while it is read; the system ends the
process (SIGBUS). The next start compares sizes and names the shard.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from xxhash import xxh3_64_intdigest

from pipeline.data.decode import decode
from pipeline.data.index import Index, open_index
from pipeline.data.order import block_samples
from pipeline.data.remote.fetching import Fetching
from pipeline.data.remote.shards import Remote
from pipeline.data.remote.tar import RemoteTar
from pipeline.data.segment import Field, Segment
from pipeline.data.slow import Reads
from pipeline.errors import DataError
from pipeline.object_store import Absent, StoreError

if TYPE_CHECKING:
    from pipeline.data.iterable import Batches
    from pipeline.data.remote.cache import Place

MAX_MAPPED = 256  # shards at once; each holds two file descriptors, of which a process often has 1,024
RETRY_SECONDS = (0.1, 0.5, 2.0)  # pauses before a file that could not be opened is tried again

Decoders = Mapping[str, Callable[[memoryview], Any]]


class SampleError(DataError):
    """A sample that will be as bad the next time: absent, not as indexed, or not decodable. See data.bad_samples."""


@dataclass(frozen=True)
class Mapped:
    """A shard that is open: its tar and its segment.

    path: or URL.  read: bytes, and the seconds that took, since somebody last asked.
    """

    path: str
    tar: memoryview
    segment: Segment
    pieces: RemoteTar | None = None  # that its bytes come in, when it is not here
    read: list[float] = field(default_factory=lambda: [0, 0.0])
    _places: dict[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def address(self) -> int:
        """Of the tar in memory."""
        return int(np.frombuffer(self.tar, np.uint8).ctypes.data)

    def places(self, name: str) -> np.ndarray:
        """int64[samples, 3]: where a field begins in the tar, its length (-1: none), the bits of its digest."""
        if name not in self._places:
            records = self.segment.column(name)
            table = self.segment.table[records]
            begins, lengths = table["offset"].astype(np.int64), table["length"].astype(np.int64)
            lengths[records < 0] = -1
            if (begins + lengths > len(self.tar)).any():  # they are followed without another look
                raise SampleError(f"{self.path}: its index tells of more bytes than it has; index it again")
            self._places[name] = np.stack([begins, lengths, table["digest"].astype(np.int64)], axis=1)
        return self._places[name]


class Sample:
    """One sample: the fields of one key. Nothing is read before it is asked for; not shared between threads.

    key: as in the tar, without extension.  number: in the data set, from 0.
    """

    __slots__ = ("_checked", "_dataset", "_fields", "_row", "_shard", "number")

    def __init__(self, number: int, row: int, shard: Mapped, dataset: Dataset) -> None:
        self.number = number
        self._row, self._shard, self._dataset = row, shard, dataset
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
            return decode(field, data, self._dataset.decoders)
        except DataError as error:
            raise SampleError(f"{self._where(field)}: {error}") from error

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
        if (pieces := self._shard.pieces) is not None:
            pieces.need(self._row)
        data = self._shard.tar[place.offset : place.offset + place.length]
        if self._dataset.check_digests:
            began = time.perf_counter()  # the first touch: if a disk is waited for, then here
            digest, read = xxh3_64_intdigest(data), self._shard.read
            read[0] += place.length
            read[1] += time.perf_counter() - began
            if digest != place.digest and pieces is not None:
                pieces.again(self._row)
                digest = xxh3_64_intdigest(data)
            if digest != place.digest:
                raise SampleError(
                    f"{self._where(field)}: its {place.length} bytes at byte {place.offset} are not those that were "
                    "indexed (xxh3 differs); copy the shard again, then "
                    f"`millstream data verify {self._dataset.index.place}`"
                )
        self._checked[field] = data
        return data

    def _where(self, field: str) -> str:
        return f"{self._shard.path}: member {self.key}.{field} (sample {self.number})"


class Dataset:
    """An indexed folder of shards, or one at a URL, opened for reading; `open_dataset` makes one. Threads may share it.

    block: samples that are read in one piece. It decides in which pieces a URL is fetched.
    """

    def __init__(
        self,
        index: Index,
        check_digests: bool = True,
        decoders: Decoders | None = None,
        block_bytes: int | None = None,
    ) -> None:
        self.index = index
        self.check_digests = check_digests
        self.decoders = decoders or {}
        self.block_bytes = block_bytes or index.storage.block_bytes
        self.block = block_samples(index.samples, index.bytes, self.block_bytes)
        remote = index.storage if isinstance(index.storage, Remote) else None
        self.remote = Fetching(index, remote, self.block) if remote else None
        self._mapped: dict[int, Mapped] = {}
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
        return Sample(number, row, self.mapped(shard), self)

    def loader(self, batch_size: int, **options: Any) -> Batches:
        """The batches of one rank as an IterableDataset of torch, with exact state; see iterable.py.

        batch_size: samples of all ranks together.  rank, world_size: whose share this is.  prepare: (sample, rng) ->
        {name: array}, alike for all samples; by default every field, decoded.  gather: `prepare` of a whole batch, see
        fill.py.  augment: whether `prepare` draws from `rng`, which follows from seed, epoch and sample.  seed: of the
        order.  steps: after which it ends, None: never.  lanes, shuffle_blocks: see order.py.  threads, prefetch: who
        makes batches ahead, and how many; they change nothing in them.

        Raises ConfigError for numbers that cannot work together.
        """
        from pipeline.data.iterable import Batches

        return Batches(self, batch_size, **options)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the same folder for itself."""
        cache = self.remote.remote.settings if self.remote else None
        return open_dataset, (self.index.place, self.check_digests, self.decoders, self.block_bytes, cache)

    def reopen(self) -> Dataset:
        """The same data set, opened anew."""
        return open_dataset(*self.__reduce__()[1])

    def take_reads(self) -> Reads:
        """What was read of each shard since this was last asked. Of several threads one gets what all have read."""
        reads: Reads = {}
        for shard in list(self._mapped.values()):
            if shard.read[0]:
                reads[shard.path] = shard.read.copy()
                shard.read[:] = 0, 0.0
        return reads if self.remote is None else self.remote.remote.take_reads()

    def close(self) -> None:
        """Let go of all files; those whose bytes are still in use stay mapped until they are not."""
        with self._lock:
            self._mapped.clear()
        self.index.storage.close()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def mapped(self, shard: int) -> Mapped:
        """A shard's tar and segment, mapped now or before."""
        found = self._mapped.get(shard)
        if found is not None:
            return found
        arrived = self._open_remote(shard) if self.remote else None  # not while others wait for the lock
        with self._lock:
            if shard not in self._mapped:
                while len(self._mapped) >= MAX_MAPPED:
                    self._mapped.pop(gone := next(iter(self._mapped)))  # the one mapped longest ago
                    if self.remote is not None:
                        self.remote.forget(gone)
                self._mapped[shard] = arrived or self._open(shard)
            return self._mapped[shard]

    def _open(self, shard: int) -> Mapped:
        noted, path = self.index.shards[shard], self.index.tar_path(shard)
        try:
            segment = self.index.segment(shard)
        except DataError as error:
            raise SampleError(str(error)) from error
        tar = self._read(noted.name, path)
        if len(tar) != noted.bytes:
            raise SampleError(f"{path}: had {noted.bytes} bytes when it was indexed, has {len(tar)}; copy it again")
        return Mapped(path, tar, segment)

    def _open_remote(self, shard: int) -> Mapped:
        assert self.remote is not None
        try:
            segment, tar = self.remote.open(shard)
        except DataError as error:
            if isinstance(error, StoreError) and not isinstance(error, Absent):
                raise  # it may pass, and the sample is not to blame
            raise SampleError(str(error)) from error
        return Mapped(self.index.tar_path(shard), tar.span.view, segment, tar)

    def _read(self, name: str, path: str) -> memoryview:
        """The bytes of a tar; what may pass (a server that does not answer, no more descriptors) is tried again."""
        for pause in (*RETRY_SECONDS, None):
            try:
                return self.index.storage.map(name)
            except FileNotFoundError as error:
                raise SampleError(f"{path}: the shard is gone; copy it again") from error
            except OSError as error:
                if pause is None:
                    tries = f"tried {len(RETRY_SECONDS) + 1} times"
                    raise DataError(f"{path}: the shard cannot be read ({error.strerror}), {tries}") from error
                time.sleep(pause)
        raise AssertionError


def open_dataset(
    place: Path | str,
    check_digests: bool = True,
    decoders: Decoders | None = None,
    block_bytes: int | None = None,
    cache: Place | None = None,
) -> Dataset:
    """Open an indexed folder of shards, or one at a URL.

    block_bytes: that are read in one piece, on average.  cache: where this node keeps what comes from a URL.

    Raises DataError when there is no index or it is not of these shards, see index.open_index.
    """
    return Dataset(open_index(place, cache), check_digests, decoders, block_bytes)
