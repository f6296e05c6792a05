"""Finds the worker that has stopped without dying: every phase has a limit, and a rank that passes it has stalled.

The ranks run in step, so when one stalls all others soon wait for it, in phases of their own that also pass their
limits. The one to blame is the one that has gone silent (its process is stopped, or its host is gone), else the one
that is furthest behind. The limit of a step's phases is learnt, once steps were measured: a worker that hangs is found
within ten times the median step, or 10 s if that is more, the look itself included.

What it gives up: a rank of which nothing is heard between two heartbeats (2 s) is taken to be still where it was, so
a phase that takes all but 2 s of its limit may count as stalled.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipeline.cluster.output import rank_log
from pipeline.sections import Stall

STACKS = signal.SIGUSR2  # a worker answers it with the stacks of its threads, in its log
STACK_SECONDS = 1.0  # it has for that

STEP_PHASES = {"data": 0, "forward": 1, "backward": 1, "step": 2}  # -> how far in the step; the rest comes before it
FOUND_SECONDS = 10.0  # in which a hang is found however short the steps are;
MEDIANS = 10.0  # or in so many median steps
LOOK_SECONDS = 1.0  # between two looks at the workers
LATE_SECONDS = 1.5  # by which the look may come late: it takes a moment itself
SILENT_SECONDS = 5.0  # a heartbeat comes every 0.5 to 2


class Watched(Protocol):
    """What is needed of an attempt: see attempt.Attempt."""

    number: int
    folder: Path

    def heartbeats(self) -> dict[int, dict[str, Any]]: ...
    def record(self, record: dict[str, Any]) -> None: ...
    def signal(self, beat: Mapping[str, Any], number: int) -> str: ...


class Stalled(NamedTuple):
    """The rank to blame, where it was, for how long, and the limit that was passed; silent: not even heard."""

    rank: int
    phase: str
    step: int
    seconds: float
    limit: float
    silent: bool
    host: str
    pid: int

    def __str__(self) -> str:
        what = "is silent" if self.silent else "does not move"
        return (
            f"worker {self.rank} (process {self.pid} on {self.host}) {what}: {self.seconds:.0f} s in {self.phase} of "
            f"step {self.step}, the limit is {self.limit:.0f} s"
        )


def find(beats: Mapping[int, Mapping[str, Any]], limits: Stall) -> Stalled | None:
    """The stalled rank, from every rank's last heartbeat (`Board.heartbeats`); None when all is well."""
    late = [rank for rank, beat in beats.items() if _seconds(beat) > limit_of(beat, limits)]
    if not late:
        return None
    silent = [rank for rank, beat in beats.items() if beat["silent_seconds"] > SILENT_SECONDS]
    rank = max(silent, key=lambda rank: beats[rank]["silent_seconds"]) if silent else min(beats, key=_progress(beats))
    beat, worst = beats[rank], max(late, key=lambda rank: _seconds(beats[rank]))
    return Stalled(
        rank,
        beat["phase"],
        beat["step"],
        max(_seconds(beat), _seconds(beats[worst])),
        limit_of(beats[worst], limits),
        bool(silent),
        beat["host"],
        beat["pid"],
    )


def look(attempt: Watched, limits: Stall) -> bool:
    """Whether a rank has stalled; then it is recorded with the stacks of all, and every worker is killed.

    The others are killed too: they wait in a collective for one that will not come.
    """
    beats = attempt.heartbeats()
    stalled = find(beats, limits)
    if stalled is None:
        return False
    logs = {rank: rank_log(attempt.folder, attempt.number, rank) for rank in beats}
    before = {rank: _size(path) for rank, path in logs.items()}
    states = {rank: attempt.signal(beat, STACKS) for rank, beat in beats.items()}
    time.sleep(STACK_SECONDS)
    stacks = {str(rank): _training_stack(path, before[rank]) for rank, path in logs.items()}
    known = {"T": ", its process is stopped", "D": ", it waits for a device or a file system", "": ", it is gone"}
    message = f"{stalled}{known.get(states[stalled.rank], '')}"
    attempt.record({"kind": "stall", **stalled._asdict(), "message": message, "stacks": stacks})
    for beat in beats.values():
        attempt.signal(beat, signal.SIGKILL)
    return True


def limit_of(beat: Mapping[str, Any], limits: Stall) -> float:
    """Seconds that the phase of this heartbeat may last."""
    phase, usual = beat["phase"], beat["step_seconds"]
    if phase == "data" or phase not in STEP_PHASES:
        return float(getattr(limits, phase))
    return limits.step if usual is None else max(FOUND_SECONDS, MEDIANS * usual) - LATE_SECONDS


def _seconds(beat: Mapping[str, Any]) -> float:
    return beat["phase_seconds"] + beat["silent_seconds"]


def _progress(beats: Mapping[int, Mapping[str, Any]]) -> Any:
    """How far a rank has come; of two that are equally far the one that has been there longer comes first."""

    def key(rank: int) -> tuple[int, int, float]:
        beat = beats[rank]
        return beat["step"], STEP_PHASES.get(beat["phase"], -1), -_seconds(beat)

    return key


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _training_stack(log: Path, begin: int) -> str:
    """The stack of the thread that trains, from what was written to a worker's log since `begin`; else all of it."""
    if _size(log) <= begin:
        return ""
    with log.open("rb") as file:
        file.seek(begin)
        text = file.read().decode(errors="replace").strip()
    threads = [thread for thread in text.split("\n\n") if "pipeline/train.py" in thread]
    return "\n\n".join(threads) or text
