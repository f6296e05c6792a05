"""Rows -> micro batch: reads the samples, has the task prepare them, and stacks what comes out.

Two ways, with the same result. When nothing is drawn at random and the task has a `gather`, it takes the whole micro
batch at once. Otherwise, or when `gather` says that something is not the plain case, the samples are prepared one by
one, each straight into its row; this way names the sample that is wrong.

A bad sample (its bytes are not those indexed, or do not decode) ends the run, or is replaced by the next good one of
its block of consecutive samples, then of the blocks after it, as many as a shuffle window has. The first decision is
kept and replayed (`Substitutes`), so a run that goes on does not decide anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from pipeline.data.reader import Dataset, Sample, SampleError
from pipeline.data.samples import Empty, Lookup, Samples
from pipeline.data.slow import Reads
from pipeline.errors import DataError, MillstreamError

MAPPED_PIECES = 256  # of data sets at a URL, that stay mapped in a decoder process

Prepare = Callable[[Sample, np.random.Generator | None], dict[str, np.ndarray]]
Gather = Callable[[Samples], dict[str, np.ndarray] | None]
Substitutes: TypeAlias = "dict[tuple[int, int], int]"
"""(source, number) of a bad sample -> number of the one that stands for it, for good."""


class Rows(NamedTuple):
    """Which samples a micro batch is made of."""

    index: int  # j, in the global batch of the step (evaluation: in the data set)
    sources: np.ndarray  # int64[m], which data set
    epochs: np.ndarray  # int64[m], of that data set
    numbers: np.ndarray  # int64[m], in that data set
    where: str  # for messages
    lookup: Callable[[], Lookup | None] | None = None  # where they lie, among others,
    low: int = 0  # from this place on


class Substitution(NamedTuple):
    """A bad sample, what stands for it from now on, and why."""

    source: int
    number: int
    substitute: int
    reason: str


@dataclass(frozen=True)
class MicroBatch:
    """One micro batch and its place; `batch` is on the host (pinned for CUDA), good until the next step."""

    index: int
    sources: np.ndarray  # int64[m]
    epochs: np.ndarray  # int64[m]
    numbers: np.ndarray  # int64[m], of the samples that were read
    batch: dict[str, torch.Tensor]  # each [m, ...]
    found: tuple[Substitution, ...] = ()  # decided while this one was prepared
    reads: Reads = field(default_factory=dict)  # how long the bytes of each shard took
    filler: bool = False  # repeats another one so that ranks run in step; counts for nothing


@dataclass(frozen=True)
class Fill:
    """How rows become a micro batch. Pure, so that threads and processes may share it.

    seed: None without augmentation.  blocks: per data set, how many consecutive samples are a block.  windows: blocks
    in which a substitute is looked for, 0 when bad samples end the run.
    """

    datasets: Sequence[Dataset]
    prepare: Prepare
    gather: Gather | None = None
    seed: int | None = None
    blocks: Sequence[int] = ()
    windows: int = 0

    def __call__(
        self,
        rows: Rows,
        substitutes: Substitutes,
        empty: Empty | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> MicroBatch:
        """Raises DataError naming sample, step, micro batch and row; a bug in the task keeps its type and traceback."""
        if substitutes:
            pairs = zip(rows.sources.tolist(), rows.numbers.tolist())
            numbers = np.array([substitutes.get(pair, pair[1]) for pair in pairs], np.int64)
            if (numbers != rows.numbers).any():
                rows = rows._replace(numbers=numbers, lookup=None, low=0)
        empty = empty or (lambda name, shape, dtype: np.empty(shape, dtype))
        for source, dataset in enumerate(self.datasets):
            if dataset.remote is not None:
                dataset.remote.ask_all(rows.numbers[rows.sources == source])
        if self.gather is not None and self.seed is None:
            try:
                lookup = rows.lookup() if rows.lookup else None
                if lookup is None:
                    rows = rows._replace(low=0)
                    lookup = Lookup(self.datasets, rows.sources, rows.numbers)
                samples = Samples(lookup, rows.low, rows.low + len(rows.numbers), empty)
                arrays = self.gather(samples)
            except DataError:
                arrays = None  # one by one, the bad sample is named, or replaced
            if arrays is not None:
                batch = {name: _tensor(name, array, empty) for name, array in arrays.items()}
                reads = samples.reads or self._reads()
                return MicroBatch(rows.index, rows.sources, rows.epochs, rows.numbers, batch, reads=reads)
        return self._one_by_one(rows, substitutes, empty, stopped)

    def settle(self) -> None:
        """Let go of most of what was fetched; nobody may be reading."""
        for dataset in self.datasets:
            if dataset.remote is not None:
                dataset.remote.settle(MAPPED_PIECES)

    def lookup(self, sources: np.ndarray, numbers: np.ndarray) -> Lookup | None:
        """Where the samples of several micro batches to come lie; None when that is not needed, or wants a closer look.

        Too many shards are one reason: all of them would have to be mapped at once.
        """
        if self.gather is None or self.seed is not None:
            return None
        with suppress(DataError):  # whoever needs that shard says what is wrong with it
            return Lookup(self.datasets, sources, numbers)
        return None

    def _one_by_one(
        self, rows: Rows, substitutes: Substitutes, empty: Empty, stopped: Callable[[], bool]
    ) -> MicroBatch:
        arrays: dict[str, np.ndarray] = {}
        numbers, found = rows.numbers.copy(), []
        rng = None if self.seed is None else generator(self.seed)
        columns = (column.tolist() for column in (rows.sources, rows.epochs, rows.numbers))
        for row, (source, epoch, number) in enumerate(zip(*columns)):
            if stopped():
                raise RuntimeError("the loader is closed")
            try:
                try:
                    prepared = self._prepared(source, epoch, number, rng)
                except SampleError as error:
                    numbers[row], prepared = self._substitute(source, epoch, number, rng, substitutes, error)
                    found.append(Substitution(source, number, int(numbers[row]), str(error)))
                if not row:
                    m = len(numbers)
                    arrays = {k: empty(k, (m, *np.shape(v)), np.asarray(v).dtype) for k, v in prepared.items()}
                _put(arrays, row, prepared)
            except Exception as error:
                place = f"{self._name(source, number)}, epoch {epoch}, {rows.where}, row {row}"
                if isinstance(error, MillstreamError):
                    raise DataError(f"{place}: {error}") from error
                error.add_note(f"while preparing {place}")  # a bug keeps its type and its traceback
                raise
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return MicroBatch(rows.index, rows.sources, rows.epochs, numbers, batch, tuple(found), self._reads())

    def _reads(self) -> Reads:
        return {shard: read for dataset in self.datasets for shard, read in dataset.take_reads().items()}

    def _name(self, source: int, number: int) -> str:
        dataset = self.datasets[source]
        with suppress(DataError):  # of the shard itself
            return f"sample {number} ({dataset.sample(number).key}) of {dataset.index.place}"
        return f"sample {number} of {dataset.index.place}"

    def _prepared(self, source: int, epoch: int, number: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        if rng is not None:
            begin(rng, source, epoch, number)
        return self.prepare(self.datasets[source].sample(number), rng)

    def _substitute(
        self,
        source: int,
        epoch: int,
        number: int,
        rng: np.random.Generator | None,
        substitutes: Substitutes,
        error: SampleError,
    ) -> tuple[int, dict[str, np.ndarray]]:
        """The next good sample: its number, and what the task makes of it. Raises `error` again when there is none."""
        if not self.windows:
            raise error
        for candidate in candidates(number, self.blocks[source], self.windows, len(self.datasets[source])):
            if (source, candidate) not in substitutes:
                try:
                    return candidate, self._prepared(source, epoch, candidate, rng)
                except SampleError:
                    continue
        raise DataError(f"no good sample near it to take instead: {error}") from error


def candidates(number: int, block: int, blocks: int, samples: int) -> Iterator[int]:
    """Samples in the order in which they may stand for `number`: its block, from there on and around, then the next."""
    first = number // block * block
    end = min(first + block, samples)
    yield from range(number + 1, end)
    yield from range(first, number)
    for step in range(end - first, min(blocks * block, samples)):
        yield (first + step) % samples


def generator(seed: int) -> np.random.Generator:
    """A generator (Philox; Salmon et al., SC 2011) with the seed as its key; `begin` puts it at a sample's draws."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, 0], dtype=np.uint64)))


def begin(rng: np.random.Generator, source: int, epoch: int, number: int) -> None:
    """Put a generator where the draws of one sample in one epoch begin; making another one takes six times as long.

    Source, epoch and number are words of Philox's 256-bit counter, so no two streams can meet.
    """
    state = rng.bit_generator.state
    state["state"]["counter"][:] = (0, source, epoch, number)
    left_over = {"buffer_pos": 4, "has_uint32": 0, "uinteger": 0}  # nothing, from the sample before
    rng.bit_generator.state = {**state, **left_over}


def tensor_type(name: str, dtype: Any) -> torch.dtype:
    """torch's word for a numpy type; DataError when no tensor can hold it."""
    try:
        return _tensor_type(np.dtype(dtype))
    except TypeError as error:
        raise DataError(f"the task gave {name} as {np.dtype(dtype)}, which no tensor can hold") from error


@lru_cache(maxsize=64)
def _tensor_type(dtype: np.dtype) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _tensor(name: str, array: np.ndarray, empty: Empty) -> torch.Tensor:
    """The tensor over an array; on a machine with CUDA in pinned memory, copied there if it is not."""
    tensor_type(name, array.dtype)
    tensor = torch.from_numpy(array)
    if torch.cuda.is_available() and not tensor.is_pinned():
        pinned = empty(f"{name} pinned", array.shape, array.dtype)
        pinned[...] = array
        return torch.from_numpy(pinned)
    return tensor


def _put(arrays: dict[str, np.ndarray], row: int, prepared: dict[str, np.ndarray]) -> None:
    """Copy what the task gave for one sample into its row. Raises DataError when it is not like the first row's."""
    if prepared.keys() != arrays.keys():
        raise DataError(f"the task gave {sorted(prepared)}, but {sorted(arrays)} for the first row")
    for name, array in arrays.items():
        value = np.asarray(prepared[name])
        if value.shape != array.shape[1:] or value.dtype != array.dtype:
            raise DataError(
                f"the task gave {name} as {value.dtype}{list(value.shape)}, but as {array.dtype}"
                f"{list(array.shape[1:])} for the first of this micro batch; all rows must be alike"
            )
        array[row] = value
