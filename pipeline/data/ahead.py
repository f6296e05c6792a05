"""Runs the preparation of micro batches ahead of need, on threads or in processes, and hands them out in order.

    plans -> rows --(thread or process)--> Fill --> micro batch, in the order of the plans

Threads fill buffers that are used again: fresh memory for every batch costs a page fault per 4 kB, and pinned memory
(for a GPU) much more. Processes are for preparation that holds the GIL; they give their results back in shared memory
without a name (torch's file descriptors), which the system frees when they die. Which of the two it is, and how many,
changes no row.

What it gives up: a micro batch is good until the next step is asked for; who wants to keep it copies it.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.multiprocessing  # teaches multiprocessing to pass tensors in shared memory

from pipeline.data.fill import Fill, MicroBatch, Rows, Substitutes, tensor_type
from pipeline.data.remote.foresight import Again, Foreseen, Foresight, Prepared

START_BYTES = 16  # from torch's 64-byte edges: libjpeg-turbo takes 7 % longer into rows that begin at 32-byte edges
TOGETHER_SECONDS = 0.001  # for which the taker waits for more than one micro batch, when none is there
PARENT_SECONDS = 1.0  # how often a decoder process looks whether its parent is alive


class Buffers:
    """The arrays of one micro batch, used again for another one later."""

    def __init__(self) -> None:
        self._pin = torch.cuda.is_available()
        self._kept: dict[str, np.ndarray] = {}
        self.copied: Any = None  # on GPU: the event after which the device has its copy

    def empty(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """A buffer with old content, in pinned memory when there is CUDA."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None
        kept = self._kept.get(name)
        if kept is None or kept.shape != shape or kept.dtype != dtype:
            kind, size = tensor_type(name, dtype), math.prod(shape)
            start = max(1, START_BYTES // kind.itemsize)
            flat = torch.empty(start + size, dtype=kind, pin_memory=self._pin)
            kept = self._kept[name] = flat[start:].view(shape).numpy()
        return kept


class _Pool:
    """Buffers that are free, and those that were handed out and are looked at until `give_back`."""

    def __init__(self) -> None:
        self._free: list[Buffers] = []
        self._lent: list[Buffers] = []

    def get(self) -> Buffers:
        return self._free.pop() if self._free else Buffers()

    def lend(self, buffers: Buffers) -> None:
        self._lent.append(buffers)

    def give_back(self) -> None:
        """What was lent so far is no longer looked at."""
        if self._lent and torch.cuda.is_available():  # copies to the device may still be under way
            event = torch.cuda.Event()
            event.record()
            for buffers in self._lent:
                buffers.copied = event
        self._free += self._lent
        self._lent.clear()


@dataclass(eq=False)
class _Job:
    """One micro batch that a thread prepares, or has prepared: then there is `micro` or `error`."""

    buffers: Buffers
    micro: MicroBatch | None = None
    error: BaseException | None = None
    done: bool = False


class Threads:
    """Runs `fill` on the rows of each plan in threads, at most `depth` of them ahead of the one that is taken next."""

    def __init__(
        self, fill: Fill, plans: Iterator[Callable[[], Rows]], substitutes: Substitutes, *, threads: int, depth: int
    ) -> None:
        self._fill, self._plans, self._substitutes, self._depth = fill, plans, substitutes, depth
        self._stop = threading.Event()
        self._buffers = _Pool()
        self._jobs: deque[_Job] = deque()  # not taken yet, in their order
        self._done = 0  # of them
        self._wanted = 0  # so many done are worth waking the taker
        lock = threading.Lock()
        self._room, self._ready = threading.Condition(lock), threading.Condition(lock)
        self._threads = [threading.Thread(target=self._work, name=f"loader {i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while (begun := self._begin()) is not None:
            plan, job = begun
            try:
                job.micro = self._fill(plan(), self._substitutes, job.buffers.empty, self._stop.is_set)
            except BaseException as error:  # the taker raises it
                job.error = error
            with self._ready:
                job.done = True
                self._done += 1
                if self._done >= self._wanted:
                    self._ready.notify()

    def _begin(self) -> tuple[Callable[[], Rows], _Job] | None:
        with self._room:
            self._room.wait_for(lambda: self._stop.is_set() or len(self._jobs) < self._depth)
            plan = None if self._stop.is_set() else next(self._plans, None)
            if plan is None:
                return None
            self._jobs.append(_Job(self._buffers.get()))
            return plan, self._jobs[-1]

    def take(self) -> MicroBatch:
        """The next micro batch; good until `give_back`. Raises what went wrong while it was prepared."""
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        with self._ready:
            if not self._first_done():  # a moment for several: waking a thread costs as much as a batch of token rows
                self._wanted = self._depth
                self._ready.wait_for(lambda: self._done >= self._wanted, TOGETHER_SECONDS)
                self._wanted = 0
                self._ready.wait_for(self._first_done)
            job = self._jobs.popleft()
            self._done -= 1
            self._room.notify()
        if job.micro is None:
            self.close()
            assert job.error is not None
            raise job.error
        self._buffers.lend(job.buffers)
        _decide(self._substitutes, job.micro)
        return job.micro

    def _first_done(self) -> bool:
        return bool(self._jobs) and self._jobs[0].done

    def give_back(self) -> None:
        """What was taken so far is no longer looked at: its buffers may be filled again."""
        self._buffers.give_back()

    def close(self) -> None:
        """Stop, and wait until the threads have ended; may be called twice."""
        with self._room:
            self._stop.set()
            self._room.notify_all()
        for thread in self._threads:
            thread.join()
        self._jobs.clear()


class Here:
    """No threads at all: a micro batch is prepared when it is taken. For debuggers, and rows that are only copied."""

    def __init__(self, fill: Fill, plans: Iterator[Callable[[], Rows]], substitutes: Substitutes) -> None:
        self._fill, self._plans, self._substitutes = fill, plans, substitutes
        self._buffers = _Pool()
        self._closed = False

    def take(self) -> MicroBatch:
        """The next micro batch; good until `give_back`. Raises what goes wrong while it is prepared."""
        if self._closed:
            raise RuntimeError("the loader is closed")
        buffers = self._buffers.get()
        self._buffers.lend(buffers)
        micro = self._fill(next(self._plans)(), self._substitutes, buffers.empty)
        _decide(self._substitutes, micro)
        return micro

    def give_back(self) -> None:
        """What was taken so far is no longer looked at: its buffers may be filled again."""
        self._buffers.give_back()

    def close(self) -> None:
        """May be called twice."""
        self._closed = True


class Processes:
    """`Threads` with processes: each gives a micro batch of its own, so there is nothing to give back."""

    def __init__(
        self, fill: Fill, plans: Iterator[Callable[[], Rows]], substitutes: Substitutes, *, processes: int, depth: int
    ) -> None:
        self._plans, self._substitutes = plans, substitutes
        spawn = multiprocessing.get_context("spawn")  # no fork: this process has threads
        self._pool = ProcessPoolExecutor(processes, spawn, _begin, (fill, os.getpid()))
        self._jobs: deque[Future[MicroBatch]] = deque()
        self._closed = False
        for _ in range(depth):
            self._submit()

    def _submit(self) -> None:
        plan = next(self._plans, None)
        if plan is not None:
            self._jobs.append(self._pool.submit(_filled, plan(), dict(self._substitutes)))

    def take(self) -> MicroBatch:
        """The next micro batch. Raises what went wrong while it was prepared."""
        if self._closed:
            raise RuntimeError("the loader is closed")
        job = self._jobs.popleft()
        self._submit()
        try:
            micro = job.result()
        except BrokenProcessPool:
            self.close()
            raise RuntimeError("a decoder process ended unasked; was it killed, because memory ran out?") from None
        except BaseException:
            self.close()
            raise
        _decide(self._substitutes, micro)
        return micro

    def give_back(self) -> None:
        """Nothing to do: see Threads."""

    def close(self) -> None:
        """Stop, and wait until the processes have ended; may be called twice."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._jobs.clear()


def start(
    fill: Fill,
    plans: Iterator[Callable[[], Rows]],
    *,
    threads: int,
    processes: int,
    depth: int,
    substitutes: Substitutes | None = None,
    again: Again | None = None,
    first: int = 1,
) -> Prepared:
    """Prepare what the plans say, in processes or threads, or with neither. first: so many are needed at once."""
    known, depth = {} if substitutes is None else substitutes, max(depth, 1)
    foresight = None
    if any(dataset.remote for dataset in fill.datasets):
        plans = foresight = Foresight(fill.datasets, plans, again, first=0 if processes else first)
    if processes:
        prepared = Processes(fill, plans, known, processes=processes, depth=depth)
    elif threads:
        prepared = Threads(fill, plans, known, threads=threads, depth=depth)
    else:
        prepared = Here(fill, plans, known)
    return Foreseen(prepared, foresight) if foresight else prepared


def _decide(substitutes: Substitutes, micro: MicroBatch) -> None:
    for found in micro.found:  # the first decision holds
        substitutes.setdefault((found.source, found.number), found.substitute)


_fill: Fill | None = None  # of a decoder process, set once when it begins


def _begin(fill: Fill, parent: int) -> None:
    """A decoder process gets its work, leaves Ctrl-C to its parent, and ends when the parent does."""
    global _fill
    _fill = fill
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _filled(rows: Rows, substitutes: Substitutes) -> MicroBatch:
    assert _fill is not None
    micro = _fill(rows, substitutes)
    _fill.settle()
    return micro
