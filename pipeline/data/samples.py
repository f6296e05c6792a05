"""The samples of a micro batch, read all at once: many times faster than one by one, and with the same result.

numbers -> shards and rows, in one search -> places of a field, shard by shard -> bytes, digests compared -> a column:
views of the tars (`raw`), whole numbers that the index holds (`values`), or equal arrays stacked (`array`).

A `Lookup` finds where the fields of many samples lie; that costs little more for thousands than for one, so the loader
makes one for several micro batches to come. `Samples` reads those of one micro batch.

Bytes that come slowly are timed shard by shard from then on, until the lookup ends (slow.py says what for).

What it gives up: a column of samples that are not alike. It is None then, and the samples are read one by one.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from xxhash import xxh3_64_digest

from pipeline.data.decode import npy_header
from pipeline.data.order import grouped
from pipeline.data.reader import Dataset, Mapped, Sample, SampleError
from pipeline.data.slow import Reads

NPY_START = 128  # bytes of an npy header as numpy writes it; only then are rows stacked at once
ADDRESSES = 2**47  # of a process, on x86-64 and arm64 as Linux sets them up
SLOW_SECONDS, SLOW_RATE = 0.02, 50e6  # a column that takes longer, at fewer bytes/s, came from a slow disk or server
GATHERED_BYTES = 16384  # rows up to this size are copied by one call for all of them, larger ones by a call each

Empty = Callable[[str, tuple[int, ...], Any], np.ndarray]  # (name, shape, dtype) -> a buffer


class Column(NamedTuple):
    """Where a field of k samples lies, int64[k] each: from which byte of which of the lookup's tars, how many bytes.

    lengths: -1 where a sample lacks the field.  digests: xxh3_64 of the bytes, as xxhash writes it: the highest byte
    first.  addresses: of the bytes in memory.  length: the one that all have in common, -1 when there is none.
    """

    tars: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    digests: np.ndarray
    addresses: np.ndarray
    length: int


class Lookup:
    """Where the fields of samples int64[k] of data sets int64[k] lie. Threads may share it; its shards stay mapped.

    Raises DataError for a shard that cannot be read.
    """

    def __init__(self, datasets: Sequence[Dataset], sources: np.ndarray, numbers: np.ndarray) -> None:
        self.datasets, self.sources, self.numbers = datasets, sources, numbers
        self.parts: list[tuple[Mapped, np.ndarray, np.ndarray]] = []  # shard, places among the k, rows in the shard
        for source in np.unique(sources).tolist() if len(datasets) > 1 else [0]:
            dataset = datasets[source]
            places = np.flatnonzero(sources == source)
            shards, rows = dataset.index.places(numbers[places])
            order, first = grouped(shards)
            distinct = shards[order[first]]
            if dataset.remote is not None:
                dataset.remote.open_ahead(distinct.tolist())
            for shard, chosen in zip(distinct.tolist(), np.split(order, first[1:])):
                self.parts.append((dataset.mapped(shard), places[chosen], rows[chosen]))
        together = np.concatenate([places for _, places, _ in self.parts])
        self._back = np.empty_like(together)  # where each of the k stands when they are sorted by shard
        self._back[together] = np.arange(len(together))
        self.is_remote = any(shard.pieces for shard, _, _ in self.parts)
        self._columns: dict[str, Column] = {}
        self._values: dict[str, np.ndarray | None] = {}
        self.slow = False  # bytes came slowly: from now on each shard is timed by itself

    def need(self, low: int, high: int) -> None:
        """Wait until the bytes of the samples from `low` to `high` are here, where they come from a URL."""
        for shard, places, rows in self.parts:
            if shard.pieces is not None:
                inside = rows[(places >= low) & (places < high)]
                if len(inside):
                    shard.pieces.need(inside)

    def column(self, field: str) -> Column:
        """Where a field lies; found once, and kept."""
        if field not in self._columns:
            self._columns[field] = self._column(field)
        return self._columns[field]

    def _column(self, field: str) -> Column:
        sizes = [len(rows) for _, _, rows in self.parts]
        tars = np.repeat(np.arange(len(sizes)), sizes)[self._back]
        taken = np.concatenate([shard.places(field).take(rows, axis=0) for shard, _, rows in self.parts])
        begins, lengths, digests = np.ascontiguousarray(taken.take(self._back, axis=0).T)
        addresses = np.array([shard.address for shard, _, _ in self.parts])[tars] + begins
        return Column(tars, begins, lengths, digests.astype(">i8"), addresses, _common(lengths))

    def values(self, field: str) -> np.ndarray | None:
        """int64[k], whole numbers that the index holds (such as cls); None when it does not hold all of them."""
        if field not in self._values:
            found: np.ndarray | None = np.empty(len(self.numbers), np.int64)
            for shard, places, rows in self.parts:
                held = shard.segment.values(field)
                if held is None:
                    found = None
                    break
                found[places] = held[rows]
            self._values[field] = found
        return self._values[field]


class Samples:
    """The samples of one micro batch: those from `low` to `high` of a lookup, as whole columns.

    Row i is sample `numbers[i]`. What cannot be had as a column is None, and the samples are then read one by one,
    which says more. Raises DataError for bytes that are not those indexed.
    """

    def __init__(self, lookup: Lookup, low: int = 0, high: int | None = None, empty: Empty | None = None) -> None:
        self._lookup = lookup
        self._range = slice(low, len(lookup.numbers) if high is None else high)
        self.numbers = lookup.numbers[self._range]  # int64[m]
        self._empty: Empty = empty or (lambda name, shape, dtype: np.empty(shape, dtype))
        self._check = all(dataset.check_digests for dataset in lookup.datasets)
        self.reads: Reads = {}  # what was read so far, of all shards together
        if lookup.is_remote:
            lookup.need(self._range.start, self._range.stop)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Sample]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, row: int) -> Sample:
        return self._lookup.datasets[self._lookup.sources[self._range][row]].sample(int(self.numbers[row]))

    def empty(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """A buffer for the values of `name`, to be filled and given back as the micro batch's; its content is old."""
        return self._empty(name, shape, dtype)

    def has(self, field: str) -> np.ndarray:
        """bool[m]: which of the samples have a field."""
        return self._lookup.column(field).lengths[self._range] >= 0

    def values(self, field: str) -> np.ndarray | None:
        """int64[m], whole numbers that the index holds (such as cls); None when it does not hold all of them."""
        values = self._lookup.values(field)
        return None if values is None else values[self._range]

    def raw(self, field: str) -> list[memoryview] | None:
        """The bytes of a field of every sample, checked, without a copy; None when a sample lacks it."""
        views = self._views(field)
        if views is not None and self._check:
            began = self._begin(field)
            digests = b"".join(map(xxh3_64_digest, views))
            self._timed(began, sum(map(len, views)))
            self._compare(field, digests)
        return views

    def array(self, field: str) -> np.ndarray | None:
        """The arrays of an npy field stacked, [m, ...]; None when they are not all of one type and shape."""
        column, part = self._lookup.column(field), self._range
        length = column.length if column.length >= 0 else _common(column.lengths[part])
        if length < NPY_START:
            return None
        began = self._begin(field)
        if length <= GATHERED_BYTES:
            rows = _memory(length)[column.addresses[part] - 1]
        else:
            rows = self.empty(f"{field} rows", (len(self), length), np.uint8)
            for row, view in zip(rows, self._views(field) or ()):
                row[:] = view
        # What will be used is hashed, not what it was copied from; it is still in the cache.
        digests = b"".join(map(xxh3_64_digest, _rows(rows.ctypes.data, *rows.shape))) if self._check else None
        self._timed(began, rows.nbytes)
        if digests is not None:
            self._compare(field, digests)
        heads = rows[:, :NPY_START].tobytes()
        dtype, shape, order, begin = npy_header(heads[:NPY_START])
        if heads != heads[:NPY_START] * len(rows) or begin != NPY_START or order != "C":
            return None
        if not dtype.itemsize or dtype.itemsize * math.prod(shape) != length - begin:
            return None
        return rows[:, begin:].view(dtype).reshape(len(rows), *shape)

    def _begin(self, field: str) -> float:
        """When the reading of a field begins. Once bytes came slowly, each sample's are touched and timed before."""
        if self._lookup.slow:
            shards = self._lookup.column(field).tars[self._range].tolist()
            for shard, view in zip(shards, self._views(field) or ()):
                began = time.perf_counter()
                xxh3_64_digest(view)
                read = self._lookup.parts[shard][0].read
                read[0] += len(view)
                read[1] += time.perf_counter() - began
        return time.perf_counter()

    def _timed(self, began: float, count: int) -> None:
        """Note that `count` bytes have been read since."""
        if self._lookup.slow or self._lookup.is_remote:
            return
        seconds = time.perf_counter() - began
        if seconds > SLOW_SECONDS and count < SLOW_RATE * seconds:
            self._lookup.slow = True  # by which shard is not known; the next micro batch tells
        else:
            before = self.reads.get("", (0, 0.0))
            self.reads[""] = [before[0] + count, before[1] + seconds]

    def _views(self, field: str) -> list[memoryview] | None:
        column, part = self._lookup.column(field), self._range
        begins, lengths = column.begins[part], column.lengths[part]
        if lengths.min() < 0:
            return None
        tars = [shard.tar for shard, _, _ in self._lookup.parts]
        places = zip(column.tars[part].tolist(), begins.tolist(), (begins + lengths).tolist())
        return [tars[t][b:e] for t, b, e in places]

    def _compare(self, field: str, read: bytes) -> None:
        """Raises what reading the first sample that is not as indexed says by itself."""
        noted = self._lookup.column(field).digests[self._range].tobytes()
        if read != noted:
            row = next(at // 8 for at in range(0, len(noted), 8) if read[at : at + 8] != noted[at : at + 8])
            self[row].raw(field)
            raise SampleError(f"sample {self.numbers[row]}: the bytes of {field} changed while they were read")


def _common(lengths: np.ndarray) -> int:
    return -1 if (lengths != lengths[0]).any() else int(lengths[0])


@lru_cache(maxsize=64)
def _memory(length: int) -> np.ndarray:
    """All memory as rows of `length` bytes, read-only: row i begins at address i + 1. numpy's indexing then gathers.

    The shards that are read stay mapped as long as their lookup lives.
    """
    return np.asarray(_Memory(length))


class _Memory:
    """numpy's array interface (numpy.org, "The array interface protocol") over the address space."""

    def __init__(self, length: int) -> None:
        place = {"shape": (ADDRESSES, length), "strides": (1, 1), "data": (1, True)}
        self.__array_interface__ = {"version": 3, "typestr": "|u1", **place}


@lru_cache(maxsize=64)
def _rows(address: int, count: int, length: int) -> list[memoryview]:
    """Views of the rows of a buffer at an address, to be used while it lives.

    Kept, because making one costs as much as hashing 2 kB, and buffers come at the same addresses again and again.
    """
    flat = memoryview((ctypes.c_uint8 * (count * length)).from_address(address)).cast("B")
    return [flat[at : at + length] for at in range(0, count * length, length)]
