"""Micro batches, decoded ahead of need by threads, in an order that nothing here can change.

The order says which samples stand in micro batch j of step k; a thread reads them, has the task prepare them, and
copies each into its row of freshly allocated batch arrays. Threads only decide when a micro batch is ready, never
what is in it: world size, threads and `prefetch` leave every row as it is. Decoders release the GIL, so threads
suffice; a task that prepares samples in slow pure Python gets no faster with more of them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from threading import Event
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch

from pipeline.data.order import Order
from pipeline.data.reader import Dataset, Sample
from pipeline.errors import ConfigError, DataError, MillstreamError

Prepare = Callable[[Sample, np.random.Generator | None], dict[str, np.ndarray]]


@dataclass(frozen=True)
class MicroBatch:
    """One micro batch and its place: `batch` is on the host, pinned when there is CUDA."""

    index: int  # j, in the global batch of the step (evaluation: in the data set)
    epochs: np.ndarray  # int64[m]
    numbers: np.ndarray  # int64[m], of samples
    batch: dict[str, torch.Tensor]  # each [m, ...]
    filler: bool = False  # repeats another one so that ranks run in step; counts for nothing


class Rows(NamedTuple):
    """Which samples a micro batch is made of."""

    index: int
    epochs: np.ndarray
    numbers: np.ndarray
    where: str  # for messages


class Loader:
    """The micro batches of one rank, step by step, prepared ahead by threads.

    Rank r of R has micro batches [r * M // R, (r + 1) * M // R) of each step. Steps are asked for in order, from
    `start_step`. At least one whole step is prepared ahead, more if `prefetch` (micro batches) is larger. Close it, or
    use it with `with`. Raises ConfigError when the batch sizes do not divide, or ranks outnumber micro batches.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        prepare: Prepare,
        *,
        augments: bool,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 1,
        prefetch: int = 4,
        start_step: int = 0,
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
        self._own = range(rank * micro_batches // world_size, (rank + 1) * micro_batches // world_size)
        self._micro_steps = -(-micro_batches // world_size)
        self._next_step = start_step

        def rows(step: int, j: int) -> Rows:
            epochs, numbers = order.rows(step, j, global_batch_size, micro_batch_size)
            return Rows(j, epochs, numbers, f"step {step}, micro batch {j}")

        plans = (partial(rows, step, j) for step in count(start_step) for j in self._own)
        fill = partial(_fill, dataset, prepare, seed if augments else None)
        self._ahead = _Ahead(fill, plans, threads, max(prefetch, len(self._own)))

    def step(self, k: int) -> list[MicroBatch]:
        """The ceil(M / R) micro batches of step k; a rank that has one less repeats its last with `filler` set.

        Raises what went wrong in a thread, with the sample named; the loader is closed then.
        """
        if k != self._next_step:
            raise ValueError(f"steps are asked for in order: step {self._next_step} comes next, not {k}")
        began = time.perf_counter()
        batches = [self._ahead.take() for _ in self._own]
        self.wait_seconds = time.perf_counter() - began
        self._next_step += 1
        return batches + [replace(batches[-1], filler=True)] * (self._micro_steps - len(batches))

    def close(self) -> None:
        """Stop the threads and wait until they have ended; may be called twice."""
        self._ahead.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def evaluation_batches(
    dataset: Dataset,
    prepare: Prepare,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    threads: int = 1,
) -> Iterator[MicroBatch]:
    """The whole data set once over all ranks, in its natural order and without augmentation.

    Micro batch i holds samples [i * m, (i + 1) * m), the last one perhaps fewer, and goes to rank i % R. Every rank
    yields the same number; a rank that has one less repeats its last (or, with none at all, another's) as `filler`.
    """
    samples = len(dataset)
    batches = -(-samples // micro_batch_size)
    if not batches:
        raise DataError(f"{dataset.index.folder} has no samples to evaluate; pack or index another folder")

    def rows(i: int) -> Rows:
        numbers = np.arange(i * micro_batch_size, min((i + 1) * micro_batch_size, samples), dtype=np.int64)
        return Rows(i, np.zeros_like(numbers), numbers, f"evaluation, micro batch {i}")

    own = list(range(rank, batches, world_size))
    mine = own or [rank % batches]
    ahead = _Ahead(
        partial(_fill, dataset, prepare, None), (partial(rows, i) for i in mine), threads, 2 * max(threads, 1)
    )
    try:
        for turn in range(-(-batches // world_size)):
            if turn < len(mine):
                last = ahead.take()
            yield replace(last, filler=turn >= len(own))
    finally:
        ahead.close()


class _Ahead:
    """Runs jobs on threads, `depth` of them ahead of the one that is taken next, and hands out results in order."""

    def __init__(
        self,
        fill: Callable[[Callable[[], Rows], Event], MicroBatch],
        plans: Iterator[Callable[[], Rows]],
        threads: int,
        depth: int,
    ) -> None:
        self._fill = fill
        self._plans = plans
        self._stop = Event()
        self._pool = ThreadPoolExecutor(max(threads, 1), thread_name_prefix="loader")
        self._jobs: deque[Future[MicroBatch]] = deque()
        for _ in range(max(depth, 1)):
            self._submit()

    def _submit(self) -> None:
        plan = next(self._plans, None)
        if plan is not None:
            self._jobs.append(self._pool.submit(self._fill, plan, self._stop))

    def take(self) -> MicroBatch:
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        job = self._jobs.popleft()
        self._submit()
        try:
            return job.result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._jobs.clear()


def _fill(dataset: Dataset, prepare: Prepare, seed: int | None, plan: Callable[[], Rows], stop: Event) -> MicroBatch:
    """Prepare the samples of one micro batch, each into its row of new arrays. `seed` None: without augmentation."""
    rows = plan()
    arrays: dict[str, np.ndarray] = {}
    batch: dict[str, torch.Tensor] = {}
    for row, (epoch, number) in enumerate(zip(rows.epochs.tolist(), rows.numbers.tolist())):
        if stop.is_set():
            raise RuntimeError("the loader is closed")
        sample = None
        try:
            sample = dataset.sample(number)
            prepared = prepare(sample, None if seed is None else generator(seed, epoch, number))
            if not row:
                batch = {name: _allocate(name, len(rows.numbers), value) for name, value in prepared.items()}
                arrays = {name: tensor.numpy() for name, tensor in batch.items()}
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
        except Exception as error:
            name = f"sample {number} ({sample.key})" if sample else f"sample {number}"
            place = f"{name} of {dataset.index.folder}, epoch {epoch}, {rows.where}, row {row}"
            if isinstance(error, MillstreamError):
                raise DataError(f"{place}: {error}") from error
            error.add_note(f"while preparing {place}")  # a bug keeps its type and its traceback
            raise
    return MicroBatch(rows.index, rows.epochs, rows.numbers, batch)


def generator(seed: int, epoch: int, number: int) -> np.random.Generator:
    """The random generator of one sample in one epoch (Philox; Salmon et al., SC 2011).

    The seed is the key; epoch and number are the upper half of the 256-bit counter, so no two streams can meet.
    """
    counter = np.array([0, 0, epoch, number], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, 0], dtype=np.uint64), counter=counter))


def _allocate(name: str, rows: int, first: np.ndarray) -> torch.Tensor:
    """An uninitialised tensor [rows, ...] for values like `first`; new every time: the last may be in use."""
    first = np.asarray(first)
    try:
        like = torch.from_numpy(np.empty(0, dtype=first.dtype))
    except TypeError as error:
        raise DataError(f"the task gave {name} as {first.dtype}, which no tensor can hold") from error
    return torch.empty((rows, *first.shape), dtype=like.dtype, pin_memory=torch.cuda.is_available())
