"""Micro batches of one rank, step by step, in an order that nothing here can change.

The order says which samples stand in micro batch j of step k; fill.py makes a micro batch of them, ahead.py does so
before it is needed. Threads and processes only decide when a micro batch is ready, never what is in it: world size,
threads and `prefetch` leave every row as it is.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from threading import Lock
from types import TracebackType
from typing import Protocol

import numpy as np

from pipeline.data import ahead
from pipeline.data.fill import Fill, MicroBatch, Rows, Substitutes
from pipeline.data.remote.cache_policy import NEVER
from pipeline.data.samples import Lookup
from pipeline.data.skipped import Skipped
from pipeline.data.slow import SlowLink, SlowShard, SlowShards
from pipeline.errors import ConfigError, DataError

NOTHING = Skipped()
PLANNED_ROWS = 8192  # places in the order that are computed together: one by one each costs many times more
REMOTE_ROWS = 4096  # of data sets at a URL: the first batch waits for the indexes of all their shards


class Order(Protocol):
    """Which sample stands where; mixture.Mixture is one."""

    @property
    def depth(self) -> int:
        """Rows that a lane gives to each step."""
        ...

    def plan(self, steps: range, own: range, micro_batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sources, epochs and numbers, int64[steps, own, micro_batch] each, of micro batches `own` of all `steps`."""
        ...

    def about(self, source: int, epoch: int, number: int) -> tuple[int, float] | None:
        """The lane that will have a sample in an epoch, and about the step; None when it is not known."""
        ...


class Loader:
    """The micro batches of one rank, step by step, prepared ahead by threads or processes.

    Rank r of R has micro batches [r * M // R, (r + 1) * M // R) of each step. Steps are asked for in order, from
    `start_step` to before `end_step`, without those that are `skipped`: of them nothing is read. At least one whole
    step is prepared ahead, more if `prefetch` (micro batches) is larger. Decisions on bad samples are read from
    `substitutes` and added to it.
    here: the ranks that share this node's cache, itself among them.
    Close it, or use it with `with`. Raises ConfigError when the batch sizes do not divide, or ranks outnumber micro
    batches.
    """

    def __init__(
        self,
        fill: Fill,
        order: Order,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 1,
        processes: int = 0,
        prefetch: int = 4,
        start_step: int = 0,
        end_step: int | None = None,
        substitutes: Substitutes | None = None,
        skipped: Skipped = NOTHING,
        here: Sequence[int] = (),
    ) -> None:
        if global_batch_size % micro_batch_size:
            raise ConfigError(
                f"global_batch_size {global_batch_size} must be a multiple of micro_batch_size {micro_batch_size}"
            )
        micro_batches = global_batch_size // micro_batch_size
        if world_size > micro_batches:
            raise ConfigError(
                f"{world_size} workers cannot share {micro_batches} micro batches ({global_batch_size} samples, "
                f"micro batches of {micro_batch_size}): use fewer workers, or a smaller micro_batch_size"
            )
        self.wait_seconds = 0.0  # that the caller waited in the last step()
        self._own = _own(rank, world_size, micro_batches)
        self._micro_steps = -(-micro_batches // world_size)
        self._skipped, self._next_step = skipped, skipped.next(start_step)
        self._speeds, self._read = SlowShards(), set[str]()  # of the shards; those of the last step

        planned = Planned(order, fill, self._own, micro_batch_size, start_step, looks_up=not processes)
        steps = count(start_step) if end_step is None else range(start_step, end_step)
        steps = (step for step in steps if not skipped.window(step))
        plans = (partial(planned.rows, step, j) for step in steps for j in self._own)
        depth = max(prefetch, len(self._own))
        lanes = _lanes(order, micro_batch_size, here or [rank], micro_batches, world_size)
        again = partial(_again, order, start_step, len(self._own), lanes)
        self._ahead = ahead.start(
            fill,
            plans,
            threads=threads,
            processes=processes,
            depth=depth,
            substitutes=substitutes,
            again=again,
            first=len(self._own),
        )
        self._links = [SlowLink(dataset.remote.remote) for dataset in fill.datasets if dataset.remote is not None]

    def step(self, k: int) -> list[MicroBatch]:
        """The ceil(M / R) micro batches of step k; a rank that has one less repeats its last with `filler` set.

        They are good until the next step is asked for. Raises what went wrong in a thread, with the sample named; the
        loader is closed then.
        """
        if k != self._next_step:
            raise ValueError(f"steps are asked for in order: step {self._next_step} comes next, not {k}")
        self._ahead.give_back()
        began = time.perf_counter()
        batches = [self._ahead.take() for _ in self._own]
        self.wait_seconds = time.perf_counter() - began
        for link in self._links:
            link.note(self.wait_seconds)
        self._next_step = self._skipped.next(k + 1)
        self._read = {shard for micro in batches for shard in micro.reads}
        for micro in batches:
            self._speeds.note(micro.reads, self.wait_seconds / len(batches))
        if len(batches) < self._micro_steps:
            batches.append(replace(batches[-1], filler=True))
        return batches

    def slow_shards(self) -> list[SlowShard]:
        """Shards of the last step that training waits for, read far more slowly than others; each is told once."""
        return self._speeds.found(self._read)

    def slow_links(self) -> list[str]:
        """URLs that training waits for, in words; each is told once."""
        return [said for link in self._links if (said := link.found())]

    def cache_troubles(self) -> list[str]:
        """Why pieces of URLs are not kept on this node, in words; each is told once."""
        return [said for link in self._links if (said := link.remote.cache.take_trouble())]

    def close(self) -> None:
        """Stop the threads and wait until they have ended; may be called twice."""
        self._ahead.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Planned:
    """The rows of micro batches to come, for several steps at a time. Threads share it."""

    def __init__(self, order: Order, fill: Fill, own: range, micro_batch: int, start_step: int, looks_up: bool) -> None:
        self._order, self._fill, self._own, self._micro_batch = order, fill, own, micro_batch
        self._start, self._looks_up = start_step, looks_up
        planned = REMOTE_ROWS if any(dataset.remote for dataset in fill.datasets) else PLANNED_ROWS
        self._steps = max(1, planned // (len(own) * micro_batch))
        self._lock = Lock()
        self._turns: dict[int, tuple[tuple[np.ndarray, np.ndarray, np.ndarray], _Lookup | None]] = {}

    def rows(self, step: int, j: int) -> Rows:
        turn, place = divmod(step - self._start, self._steps)
        with self._lock:
            if turn not in self._turns:
                first = self._start + turn * self._steps
                columns = self._order.plan(range(first, first + self._steps), self._own, self._micro_batch)
                sources, _, numbers = columns
                lookup = _Lookup(self._fill, sources.ravel(), numbers.ravel()) if self._looks_up else None
                self._turns = {turn - 1: self._turns[turn - 1]} if turn - 1 in self._turns else {}
                self._turns[turn] = columns, lookup
            columns, lookup = self._turns[turn]
        k = j - self._own[0]
        sources, epochs, numbers = (column[place, k] for column in columns)
        low = (place * len(self._own) + k) * self._micro_batch
        return Rows(j, sources, epochs, numbers, f"step {step}, micro batch {j}", lookup, low)


def _own(rank: int, world_size: int, micro_batches: int) -> range:
    return range(rank * micro_batches // world_size, (rank + 1) * micro_batches // world_size)


def _lanes(order: Order, micro_batch: int, ranks: Sequence[int], micro_batches: int, world_size: int) -> set[int]:
    """The lanes that some ranks read."""
    own = [_own(rank, world_size, micro_batches) for rank in ranks]
    depth = order.depth
    return {
        lane
        for j in own
        if j
        for lane in range(j[0] * micro_batch // depth, ((j[-1] + 1) * micro_batch - 1) // depth + 1)
    }


def _again(
    order: Order, start_step: int, own: int, lanes: set[int], source: int, epoch: int, number: int
) -> float | None:
    """The turn in which a sample comes again on this node, see foresight.Again."""
    found = order.about(source, epoch + 1, number)
    if found is None:
        return None
    lane, step = found
    return (step - start_step) * own if lane in lanes else NEVER


class _Lookup:
    """A lookup that is made when it is first asked for; threads share it."""

    def __init__(self, fill: Fill, sources: np.ndarray, numbers: np.ndarray) -> None:
        self._make, self._lock = partial(fill.lookup, sources, numbers), Lock()
        self._made: tuple[Lookup | None] | None = None

    def __call__(self) -> Lookup | None:
        with self._lock:
            self._made = self._made or (self._make(),)
            return self._made[0]


def evaluation_batches(
    fill: Fill, micro_batch_size: int, rank: int = 0, world_size: int = 1, threads: int = 1, processes: int = 0
) -> Generator[MicroBatch]:
    """The whole of the first data set once over all ranks, in its natural order.

    Micro batch i holds samples [i * m, (i + 1) * m), the last one perhaps fewer, and goes to rank i % R. Every rank
    yields the same number; a rank that has one less repeats its last (or, with none at all, another's) as `filler`.
    Each is good until the next one is asked for.
    """
    samples = len(fill.datasets[0])
    batches = -(-samples // micro_batch_size)
    if not batches:
        raise DataError(f"{fill.datasets[0].index.place} has no samples to evaluate; pack or index another folder")

    def rows(i: int) -> Rows:
        numbers = np.arange(i * micro_batch_size, min((i + 1) * micro_batch_size, samples), dtype=np.int64)
        zeros = np.zeros_like(numbers)
        return Rows(i, zeros, zeros, numbers, f"evaluation, micro batch {i}")

    own = list(range(rank, batches, world_size))
    mine = own or [rank % batches]
    depth = 2 * max(threads, processes, 1)
    prepared = ahead.start(fill, (partial(rows, i) for i in mine), threads=threads, processes=processes, depth=depth)
    try:
        for turn in range(-(-batches // world_size)):
            if turn < len(mine):
                prepared.give_back()
                last = prepared.take()
            yield replace(last, filler=turn >= len(own))
    finally:
        prepared.close()
