"""Saving behind the training: a copy in host memory now, the disk later, at most one checkpoint in flight.

    begin     capture (shards); training goes on, a thread copies into buffers of our own, then writes this rank's file
    hold      before the next step changes the state: wait until it is copied, which forward and backward have hidden
    advance   once every rank's file is on the disk: digests gathered, a thread of rank 0 commits and deletes old ones

What other threads do, each rank tells by `ready`, which the loop carries in the gather that a step needs anyway. So all
ranks come to the collective parts together, and no thread but the main one ever talks to another rank. A checkpoint
exists from its commit on: a run that dies before goes on from the one before it. What it gives up: host memory for a
second copy of this rank's state (none when it is built with `copies=False`; then `finish` right after `begin`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.checkpoint import facts, format, fragments, shards
from pipeline.checkpoint.format import FileDigest
from pipeline.config import Config
from pipeline.engine import Engine
from pipeline.errors import CheckpointError
from pipeline.session import World

ALIGNED = 16  # bytes; where each fragment's copy begins


class Saved(NamedTuple):
    """How a save ended. path: the committed folder.  failure: why there is none.  removed: old ones that were deleted.

    blocked_seconds: that training waited.  seconds: from `begin` to the end.  bytes: of all ranks together.
    """

    step: int
    path: Path | None
    failure: str | None
    blocked_seconds: float
    seconds: float
    bytes: int
    removed: tuple[Path, ...] = ()


@dataclass
class _Flight:
    """The save under way."""

    step: int
    staging: Path
    facts: Mapping[str, Any]
    snapshot: shards.Snapshot
    began: float
    bytes: int
    copying: Future[shards.Snapshot] | None = None
    blocked_seconds: float = 0.0
    committing: bool = False


class Saver:
    """One rank's part in saving; all ranks call `begin`, `advance` and `finish` together, and each `hold` by itself.

    before: run in the writing thread first (the journal must be durable up to the step).  newest_attempt: asked at the
    commit, on rank 0.  committed: told after it, on rank 0.  prune: then deletes old checkpoints, and says which.
    """

    def __init__(
        self,
        engine: Engine,
        world: World,
        folder: Path,
        config: Config,
        *,
        attempt: int,
        before: Callable[[], None] = lambda: None,
        newest_attempt: Callable[[], int] | None = None,
        committed: Callable[[], None] = lambda: None,
        prune: Callable[[], list[Path]] = list,
        copies: bool = True,
    ) -> None:
        self._engine, self._world, self._folder, self._config, self._attempt = engine, world, folder, config, attempt
        self._before, self._newest = before, newest_attempt or (lambda: attempt)
        self._committed, self._prune = committed, prune
        self._copies = copies
        self._host: Tensor | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._job: Future[Any] | None = None
        self._flight: _Flight | None = None

    @property
    def ready(self) -> bool:
        """Whether this rank's part of what is in flight is done; all ranks ready: `advance` has something to do."""
        return self._flight is not None and (self._job is None or self._job.done())

    def begin(
        self,
        step: int,
        *,
        data: Mapping[str, Any],
        buffers: Mapping[str, Tensor],
        metrics: Mapping[str, float] | None = None,
        guard: Mapping[str, Any] | None = None,
    ) -> Saved | None:
        """Start to save the state after `step` steps; returns a failure when the disk refuses at once.

        One that is in flight must have been finished. Raises CheckpointError when the state is not fit to be saved
        (ranks that should hold the same do not).
        """
        assert self._flight is None, "a save is in flight: finish it first"
        began = time.perf_counter()
        snapshot = shards.capture(self._engine, buffers)
        total = int(self._world.gather([snapshot.bytes]).sum())
        noted = {"step": step, "attempt": self._attempt, "data": dict(data), "metrics": dict(metrics or {})}
        noted["guard"] = dict(guard or {})
        noted["environment"] = facts.environment(self._engine)  # here: a thread has numbers of its own
        try:
            staging = shards.on_rank_0(self._world, lambda: format.stage(self._folder, step, self._attempt, total))
        except CheckpointError as error:
            waited = time.perf_counter() - began
            return Saved(step, None, str(error), waited, waited, total)
        flight = self._flight = _Flight(step, staging, noted, snapshot, began, total)
        if self._copies:
            flight.copying = self._thread.submit(self._copied, snapshot)
        self._job = self._thread.submit(self._write, flight, flight.copying)
        flight.blocked_seconds = time.perf_counter() - began
        return None

    def hold(self) -> None:
        """Wait until what is in flight no longer looks at the engine's state; then a step may change it."""
        if self._flight is not None and self._flight.copying is not None:
            began = time.perf_counter()
            self._flight.copying.result()
            self._flight.blocked_seconds += time.perf_counter() - began
            self._flight.copying = None

    def advance(self) -> Saved | None:
        """The next collective part, once all ranks are `ready`; how the save ended, when that was the last.

        Raises CheckpointError when the weights of the forward pass are not the rounded masters.
        """
        flight = self._flight
        assert flight is not None
        began = time.perf_counter()
        ended = self._end(flight) if flight.committing else self._seal(flight)
        flight.blocked_seconds += time.perf_counter() - began
        if ended is None:
            return None
        path, failure, removed = ended
        self._flight = self._job = None
        if failure and self._world.rank == 0:
            format.discard(flight.staging)
        seconds = time.perf_counter() - flight.began
        return Saved(flight.step, path, failure, flight.blocked_seconds, seconds, flight.bytes, tuple(removed))

    def finish(self) -> Saved | None:
        """Wait for what is in flight; how it ended, None when nothing was."""
        ended = None
        while self._flight is not None:
            began = time.perf_counter()
            if self._job is not None:
                self._job.exception()  # waits; what went wrong is said where the result is looked at
            self._flight.blocked_seconds += time.perf_counter() - began
            ended = self.advance()
        return ended

    def close(self) -> None:
        """End the thread; what is in flight is left to the sweep of the next save."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _write(self, flight: _Flight, copying: Future[shards.Snapshot] | None) -> FileDigest:
        snapshot = flight.snapshot if copying is None else copying.result()
        shards.check_rounding(snapshot)
        self._before()
        return format.write(flight.staging / self._file, fragments.file_chunks(snapshot.fragments))

    @property
    def _file(self) -> str:
        return f"rank-{self._world.rank:05d}.safetensors"

    def _copied(self, snapshot: shards.Snapshot) -> shards.Snapshot:
        """The same in host memory of our own, which is used again the next time; pinned for a GPU."""
        tensors = [each.tensor for each in snapshot.fragments] + [each.weights for each in snapshot.rounded]
        ends = list(accumulate(-(-tensor.nbytes // ALIGNED) * ALIGNED for tensor in tensors))
        if self._host is None or self._host.numel() < ends[-1]:
            self._host = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=self._engine.device.type == "cuda")
        copies = []
        for tensor, at in zip(tensors, [0, *ends]):
            copy = self._host[at : at + tensor.nbytes].view(tensor.dtype)
            copies.append(copy.copy_(tensor, non_blocking=True))
        if self._engine.device.type == "cuda":
            torch.cuda.current_stream(self._engine.device).synchronize()
        held, rest = copies[: len(snapshot.fragments)], copies[len(snapshot.fragments) :]
        return replace(
            snapshot,
            fragments=[each._replace(tensor=copy) for each, copy in zip(snapshot.fragments, held)],
            rounded=[each._replace(weights=copy) for each, copy in zip(snapshot.rounded, rest)],
        )

    def _seal(self, flight: _Flight) -> tuple[Path | None, str | None, list[Path]] | None:
        """All files are written, or one failed: digests to all ranks, and the commit to rank 0's thread."""
        assert self._job is not None
        digest, failure, unfit = None, _failure(self._job), isinstance(self._job.exception(), shards.UnfitState)
        if failure is None:
            digest = self._job.result()
        places = [fragment.place(self._file) for fragment in flight.snapshot.fragments]
        written = self._world.gather_objects((self._file, digest, places, failure, unfit))
        failures = [f"rank {rank}: {text}" for rank, (*_, text, _) in enumerate(written) if text]
        if any(unfit for *_, unfit in written):
            if self._world.rank == 0:
                format.discard(flight.staging)
            raise CheckpointError("; ".join(failures))
        if failures:
            return None, "; ".join(failures), []
        flight.committing, self._job = True, None
        if self._world.rank == 0:
            self._job = self._thread.submit(self._commit, flight, [each[:3] for each in written])
        return None

    def _commit(self, flight: _Flight, written: list[Any]) -> tuple[Path, list[Path]]:
        manifest = facts.describe(self._engine, self._config, flight.snapshot, written, flight.facts)
        fragments.check_coverage(flight.snapshot.parameters, flight.snapshot.keys, manifest.fragments)
        path = format.commit(self._folder, flight.staging, manifest, newest_attempt=self._newest)
        self._committed()
        return path, self._prune()

    def _end(self, flight: _Flight) -> tuple[Path | None, str | None, list[Path]]:
        """What came of the commit, told to all ranks."""
        outcome: tuple[Path | None, str | None, list[Path]] = (None, None, [])
        if self._job is not None:
            failure = _failure(self._job)
            path, removed = (None, []) if failure else self._job.result()
            outcome = path, failure, removed
        return self._world.gather_objects(outcome)[0]


def _failure(job: Future[Any]) -> str | None:
    """What a person can mend, as text; a bug is raised."""
    error = job.exception()
    if error is None:
        return None
    if isinstance(error, CheckpointError | OSError):
        return str(error)
    raise error
