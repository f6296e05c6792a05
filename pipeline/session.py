"""What a worker knows of its world: who it is, where the run lies, what phase it is in, whether to stop.

`World` is torch.distributed seen small: host-side gathers of a few numbers, so that every rank sees every rank's
facts and all take the same branch. They go over a gloo group even on GPU, where a device-side collective would make
the host wait for the step. `Session` is the seam to whoever started the worker. It differs between Ray and one plain
process only in `send`: a function that delivers journal records and a heartbeat, and answers whether a stop has been
asked for. A thread calls it twice a second, so the training loop never waits for the journal. The heartbeat says how
long the rank has been in its phase, and how its time was spent so far: what hangs and what is slow is seen there. What
it gives up: a stop is seen half a second late, and where a lost worker was is known to within two.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.errors import MillstreamError

SEND_SECONDS = 0.5  # rank 0, which has the records
HEARTBEAT_SECONDS = 2.0  # the others
MEASURED_STEPS = 20  # before that many, a step's usual length is not known; compilation and warming up fall into them
KEPT_STEPS = 101  # whose lengths the median is of

# send(rank, records, heartbeat) -> stop asked?
Send = Callable[[int, list[dict[str, Any]], dict[str, Any]], bool]


@dataclass(frozen=True)
class World:
    """The ranks of one attempt. Built once torch.distributed is initialised."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    host: dist.ProcessGroup

    @staticmethod
    def join(timeout_seconds: float = 600.0) -> World:
        """Adopt the process group that is there, or make one of a single process.

        The timeout bounds host-side gathers: a rank that stops answering ends the attempt instead of hanging it.
        """
        timeout = timedelta(seconds=timeout_seconds)
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            # DeepSpeed reads the variables even when the group exists; without them it goes looking for MPI.
            alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
            for name, value in alone.items():
                os.environ.setdefault(name, value)
            backend = "nccl" if cuda else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        host = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(host, dist.ProcessGroup)
        return World(dist.get_rank(), dist.get_world_size(), local_rank, device, host)

    def gather(self, values: Sequence[float]) -> np.ndarray:
        """Every rank's `values`, as float64 [world_size, len(values)], the same on all ranks."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self.world_size == 1:
            return mine.view(1, -1).numpy()
        everyone = torch.empty(self.world_size * len(values), dtype=torch.float64)
        dist.all_gather_single(everyone, mine, group=self.host)
        return everyone.view(self.world_size, len(values)).numpy()

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's picklable `value` in rank order. For rare moments such as a commit, never inside the step."""
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, value, group=self.host)
        return everyone

    def ranks_here(self) -> list[int]:
        """The ranks on this host, itself among them. All ranks call it together."""
        hosts = self.gather_objects(socket.gethostname())
        return [rank for rank, host in enumerate(hosts) if host == hosts[self.rank]]

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of a device tensor over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        dist.barrier(group=self.host)


class Phases:
    """Which phase a rank is in, since when, and how many seconds went into each so far. Threads may look at it."""

    def __init__(self) -> None:
        self._phase, self._step, self._since = "start", 0, time.monotonic()
        self._spent: dict[str, float] = {}
        self._steps: deque[float] = deque(maxlen=KEPT_STEPS)
        self._step_began: float | None = None
        self._lock = threading.Lock()

    def enter(self, phase: str, step: int) -> None:
        """Leave the phase that was, for `phase` of `step`."""
        with self._lock:
            now = time.monotonic()
            self._spent[self._phase] = self._spent.get(self._phase, 0.0) + now - self._since
            if self._step_began is not None and self._phase == "step" and phase != "step":
                self._steps.append(now - self._step_began)
                self._step_began = None
            if phase == "data":
                self._step_began = now
            self._phase, self._step, self._since = phase, step, now

    def spent(self, phase: str) -> float:
        """Seconds that went into a phase, as often as it was left."""
        return self._spent.get(phase, 0.0)

    def place(self) -> dict[str, Any]:
        """{"phase", "step"} as they are now."""
        return {"phase": self._phase, "step": self._step}

    @property
    def step_seconds(self) -> float | None:
        """Median length of the steps so far; None until enough are measured."""
        return median(self._steps) if len(self._steps) >= MEASURED_STEPS else None

    def heartbeat(self) -> dict[str, Any]:
        """Place; phase_seconds: in it so far; spent: {phase: seconds}; step_seconds: median, None as yet unknown."""
        with self._lock:
            inside = time.monotonic() - self._since
            spent = self._spent | {self._phase: self._spent.get(self._phase, 0.0) + inside}
            return {**self.place(), "phase_seconds": inside, "spent": spent, "step_seconds": self.step_seconds}


class Forward:
    """Seconds of the forward passes since they were last asked for: of the device, whose work the host only queues."""

    def __init__(self, phases: Phases, device: torch.device) -> None:
        self._phases, self._device, self._taken = phases, device, 0.0
        self._begun: torch.cuda.Event | None = None
        self._passes: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def enter(self, phase: str) -> None:
        """A phase begins."""
        if self._device.type != "cuda" or (self._begun is None and phase != "forward"):
            return
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        if self._begun is not None:
            self._passes.append((self._begun, now))
        self._begun = now if phase == "forward" else None

    def take(self) -> float:
        """On GPU, waits until the device has come to the end of the last of them."""
        if self._device.type == "cuda":
            passes, self._passes = self._passes, []
            for _, end in passes[-1:]:
                end.synchronize()
            return sum(begin.elapsed_time(end) for begin, end in passes) / 1000
        before, self._taken = self._taken, self._phases.spent("forward")
        return self._taken - before


class Session:
    """One worker in one attempt: where the run lies, its phase, what it has to say, whether it should stop.

    owned: what is closed when the session is, however the attempt ends.
    """

    def __init__(self, world: World, run: Path, attempt: int, send: Send, new_order: bool = False) -> None:
        self.world, self.run, self.attempt = world, run, attempt
        self.new_order = new_order  # somebody wants the run to go on with other data, or in another order
        self.owned = ExitStack()
        self._send, self._stop = send, threading.Event()
        self._records: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.phases = Phases()
        self.forward = Forward(self.phases, world.device)
        self.host = socket.gethostname()
        self._process = {"host": self.host, "pid": os.getpid()}
        self._closing, self._wake, self._idle = threading.Event(), threading.Event(), threading.Condition()
        self._pending = 0
        self._failure: BaseException | None = None
        self._kills = _planned_kills(world.rank, attempt)
        self._sender = threading.Thread(target=self._deliver, name="session", daemon=True)
        self._sender.start()

    @property
    def stop_requested(self) -> bool:
        """Somebody asked the run to stop: finish the step, commit, leave. Read it into a gather so that all ranks
        agree.
        """
        return self._stop.is_set()

    def phase(self, name: str, step: int) -> None:
        """Say what this rank is doing now: start, restore, data, forward, backward, step, evaluation, commit, save or
        upload.
        """
        self.phases.enter(name, step)
        self.forward.enter(name)
        if (name, step) in self._kills:
            os.kill(os.getpid(), signal.SIGKILL)

    def record(self, kind: str, **fields: Any) -> None:
        """Hand a record to the journal. Returns at once; `flush` waits until it is durable."""
        with self._idle:
            self._pending += 1
        self._records.put({"kind": kind, **fields})

    def record_error(self, error: BaseException) -> None:
        """What ended this worker, with its place, so that the driver can say it in one line and keep the traceback."""
        self.record(
            "error",
            rank=self.world.rank,
            **self.phases.place(),
            type=type(error).__name__,
            message=str(error),
            traceback="".join(traceback.format_exception(error)),
            final=isinstance(error, MillstreamError),
            exit_code=getattr(error, "exit_code", 1),
        )

    def flush(self, timeout_seconds: float = 60.0) -> None:
        """Wait until everything recorded so far is in the journal. Raises what the journal's writer raised."""
        self._wake.set()
        with self._idle:
            written = self._idle.wait_for(lambda: self._pending == 0 or self._failure, timeout_seconds)
        if self._failure:
            raise self._failure
        if not written:
            raise TimeoutError(f"the journal did not take its records within {timeout_seconds:.0f} s")

    def close(self) -> None:
        """Close what is owned, deliver what is left and end the thread."""
        try:
            self.owned.close()
        finally:
            self._closing.set()
            self._wake.set()
            self._sender.join(timeout=30)

    def _deliver(self) -> None:
        while True:
            self._wake.wait(SEND_SECONDS if self.world.rank == 0 else HEARTBEAT_SECONDS)
            self._wake.clear()
            closing = self._closing.is_set()
            records: list[dict[str, Any]] = []
            while not self._records.empty():
                records.append(self._records.get())
            try:
                if self._send(self.world.rank, records, self._process | self.phases.heartbeat()):
                    self._stop.set()
            except BaseException as error:
                # The driver or its journal is gone. The loop learns it at the next flush, before anything is committed.
                self._failure = error
            with self._idle:
                self._pending -= len(records)
                self._idle.notify_all()
            if closing or self._failure:
                return


def _planned_kills(rank: int, attempt: int) -> set[tuple[str, int]]:
    """Fault injection for tests: MILLSTREAM_KILL="rank:attempt:phase:step,..." kills there; inert when unset."""
    plans = (plan.split(":") for plan in os.environ.get("MILLSTREAM_KILL", "").split(",") if plan)
    return {(phase, int(step)) for r, a, phase, step in plans if (int(r), int(a)) == (rank, attempt)}
