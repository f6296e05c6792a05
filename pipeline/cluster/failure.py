"""Why an attempt ended: the cause among its many symptoms, from the journal.

When one worker dies, the others fail a moment later in a collective; those errors are symptoms. The cause is the
first error that is not one of a collective, or else a worker that is gone without a word; what became of that one is
asked of its host (fate.py). A worker that had stopped moving was ended by the driver, which has said so. An error for
want of memory says how less of it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.cluster.fate import LESS_MEMORY, OUT_OF_MEMORY, UNKNOWN, short_of_memory

SYMPTOMS = ("gloo", "nccl", "connection closed", "connection reset", "connection refused", "broken pipe", "socket")


@dataclass(frozen=True)
class Failure:
    """What ended an attempt. Two failures are the same when kind, reason and step are."""

    kind: str  # the error's type, or "lost", "stall", "start"; "memory" when that ran out
    reason: str
    step: int
    traceback: str = ""
    final: bool = False  # trying again cannot help
    exit_code: int = 1

    def same(self, other: Failure) -> bool:
        return (self.kind, self.reason, self.step) == (other.kind, other.reason, other.step)


def diagnose(
    records: Sequence[Mapping[str, Any]],
    heartbeats: Mapping[int, Mapping[str, Any]],
    error: BaseException,
    fate: Callable[[int, Mapping[str, Any], BaseException], str] = lambda rank, beat, error: UNKNOWN,
) -> Failure:
    """The cause, from the attempt's records, each rank's last heartbeat, and what the launcher raised.

    fate: what became of the rank of a heartbeat, as far as that can be found out (attempt.Attempt).
    """
    for record in records:
        if record["kind"] == "stall":  # it was ended for that
            stack = record["stacks"].get(str(record["rank"]), "")
            return Failure("stall", record["message"], record["step"], stack)
    errors = [record for record in records if record["kind"] == "error"]
    for record in errors:
        text = f"{record['type']} {record['message']}".lower()
        if record["final"] or not any(word in text for word in SYMPTOMS):
            return _raised(record)
    spoke = {record["rank"] for record in errors}
    lost = {rank: beat for rank, beat in heartbeats.items() if rank not in spoke}
    named = getattr(error, "worker_failures", {})  # Ray Train's, of those it found dead; the rest it has ended itself
    lost = {rank: beat for rank, beat in lost.items() if rank in named} or lost
    if not heartbeats:
        return Failure("start", f"the workers did not start: {first_line(error)}", 0, str(error))
    ends = {rank: fate(rank, beat, error) for rank, beat in lost.items()}
    places = [f"worker {r} was lost in {b['phase']} of step {b['step']} ({ends[r]})" for r, b in lost.items()]
    reason = " and ".join(places) or f"the workers lost each other: {errors[0]['message'].splitlines()[0]}"
    memory = any(end.startswith(OUT_OF_MEMORY) for end in ends.values())
    reason += f". {LESS_MEMORY}" if memory else ""
    return Failure("memory" if memory else "lost", reason, max(b["step"] for b in heartbeats.values()), str(error))


def _raised(record: Mapping[str, Any]) -> Failure:
    """The failure that a worker's own error is."""
    reason, kind, step, final = record["message"] or record["type"], record["type"], record["step"], record["final"]
    if not final:
        reason = f"worker {record['rank']}, {record['phase']} of step {step}: {kind}: {reason}"
        if mend := short_of_memory(kind, record["message"]):
            kind, reason = "memory", f"{reason.splitlines()[0]}. {mend}"
    return Failure(kind, reason, step, record["traceback"], final, record["exit_code"])


def first_line(error: BaseException) -> str:
    """The first line that says something: Ray's errors begin with headings, which end with a colon."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line and not line.endswith(":")), type(error).__name__)
