"""Runs the preparation of micro batches ahead of need, on threads or in processes, and hands them out in order.

    plans -> rows --(thread or process)--> Fill --> micro batch, in the order of the plans

Threads fill buffers that are used again: fresh memory for every batch costs a page fault per 4 kB, and pinned memory
(for a GPU) much more. Processes are for preparation that holds the GIL; they give their results back in shared memory
without a name (torch's file descriptors), which the system frees when they die. Which of the two it is, and how many,
changes no row.

What it gives up: a micro batch is good until the next step is asked for; who wants to keep it copies it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import torch
import torch.multiprocessing  # teaches multiprocessing to pass tensors in shared memory

from pipeline.data.fill import Fill, MicroBatch, Rows, Substitutes, tensor_type

START_BYTES = 16  # from torch's 64-byte edges: libjpeg-turbo takes 7 % longer into rows that begin at 32-byte edges
PARENT_SECONDS = 1.0  # how often a decoder process looks whether its parent is alive


class Buffers:
    """The tensors of one micro batch, used again for another one later."""

    def __init__(self) -> None:
        self._pin = torch.cuda.is_available()
        self._flat: dict[str, torch.Tensor] = {}
        self.copied: Any = None  # on GPU: the event after which the device has its copy

    def empty(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """A buffer with old content, in pinned memory when there is CUDA."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None
        kind, size = tensor_type(name, dtype), int(np.prod(shape))
        flat, start = self._flat.get(name), max(1, START_BYTES // kind.itemsize)
        if flat is None or flat.dtype != kind or flat.numel() < start + size:
            flat = self._flat[name] = torch.empty(start + size, dtype=kind, pin_memory=self._pin)
        return flat[start : start + size].view(shape).numpy()


class Ahead:
    """Runs `fill` on the rows of each plan, `depth` of them ahead of the one that is taken next."""

    def __init__(
        self,
        fill: Fill,
        plans: Iterator[Callable[[], Rows]],
        *,
        threads: int = 1,
        processes: int = 0,
        depth: int = 1,
        substitutes: Substitutes | None = None,
    ) -> None:
        self._fill, self._plans = fill, plans
        self._substitutes: Substitutes = {} if substitutes is None else substitutes
        self._stop = threading.Event()
        self._free: list[Buffers] = []
        self._lent: list[Buffers] = []
        self._jobs: deque[tuple[Future[MicroBatch], Buffers | None]] = deque()
        self._pool: ThreadPoolExecutor | ProcessPoolExecutor
        if processes:
            spawn = multiprocessing.get_context("spawn")  # no fork: this process has threads
            self._pool = ProcessPoolExecutor(processes, spawn, _begin, (fill, os.getpid()))
        else:
            self._pool = ThreadPoolExecutor(max(threads, 1), thread_name_prefix="loader")
        for _ in range(max(depth, 1)):
            self._submit()

    def _submit(self) -> None:
        plan = next(self._plans, None)
        if plan is None:
            return
        if isinstance(self._pool, ProcessPoolExecutor):
            self._jobs.append((self._pool.submit(_filled, plan(), dict(self._substitutes)), None))
        else:
            buffers = self._free.pop() if self._free else Buffers()
            job = self._pool.submit(self._on_thread, plan, buffers)
            self._jobs.append((job, buffers))

    def _on_thread(self, plan: Callable[[], Rows], buffers: Buffers) -> MicroBatch:
        return self._fill(plan(), self._substitutes, buffers.empty, self._stop.is_set)

    def take(self) -> MicroBatch:
        """The next micro batch; good until `give_back`. Raises what went wrong while it was prepared."""
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        job, buffers = self._jobs.popleft()
        self._submit()
        try:
            micro = job.result()
        except BrokenProcessPool:
            self.close()
            raise RuntimeError("a decoder process ended unasked; was it killed, because memory ran out?") from None
        except BaseException:
            self.close()
            raise
        if buffers is not None:
            self._lent.append(buffers)
        for found in micro.found:  # the first decision holds
            self._substitutes.setdefault((found.source, found.number), found.substitute)
        return micro

    def give_back(self) -> None:
        """What was taken so far is no longer looked at: its buffers may be filled again."""
        if self._lent and torch.cuda.is_available():  # copies to the device may still be under way
            event = torch.cuda.Event()
            event.record()
            for buffers in self._lent:
                buffers.copied = event
        self._free += self._lent
        self._lent.clear()

    def close(self) -> None:
        """Stop, and wait until threads and processes have ended; may be called twice."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._jobs.clear()


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
    return _fill(rows, substitutes)
