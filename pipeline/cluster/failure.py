"""Why an attempt ended: the cause among its many symptoms, from the journal.

When one worker dies, the others fail a moment later in a collective; those errors are symptoms. The cause is the
first error that is not one of a collective, or else a worker that is gone without a word: killed, or out of memory.
A worker that had stopped moving was ended by the driver, which has said so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SYMPTOMS = ("gloo", "nccl", "connection closed", "connection reset", "connection refused", "broken pipe", "socket")


@dataclass(frozen=True)
class Failure:
    """What ended an attempt. Two failures are the same when kind, reason and step are."""

    kind: str  # the error's type, or "lost"
    reason: str
    step: int
    traceback: str = ""
    final: bool = False  # trying again cannot help
    exit_code: int = 1

    def same(self, other: Failure) -> bool:
        return (self.kind, self.reason, self.step) == (other.kind, other.reason, other.step)


def diagnose(
    records: Sequence[Mapping[str, Any]], heartbeats: Mapping[int, Mapping[str, Any]], error: BaseException
) -> Failure:
    """The cause, from the attempt's records, each rank's last heartbeat, and what the launcher raised."""
    for record in records:
        if record["kind"] == "stall":  # it was ended for that
            stack = record["stacks"].get(str(record["rank"]), "")
            return Failure("stall", record["message"], record["step"], stack)
    errors = [record for record in records if record["kind"] == "error"]
    for record in errors:
        text = f"{record['type']} {record['message']}".lower()
        if record["final"] or not any(word in text for word in SYMPTOMS):
            reason = record["message"] or record["type"]
            where = (
                ""
                if record["final"]
                else f"worker {record['rank']}, {record['phase']} of step {record['step']}: {record['type']}: "
            )
            return Failure(
                record["type"],
                where + reason,
                record["step"],
                record["traceback"],
                record["final"],
                record["exit_code"],
            )
    spoke = {record["rank"] for record in errors}
    lost = {rank: beat for rank, beat in heartbeats.items() if rank not in spoke}
    if not heartbeats:
        return Failure("start", f"the workers did not start: {first_line(error)}", 0, str(error))
    places = [f"worker {rank} was lost in {beat['phase']} of step {beat['step']}" for rank, beat in lost.items()]
    reason = " and ".join(places) or f"the workers lost each other: {errors[0]['message'].splitlines()[0]}"
    return Failure(
        "lost", f"{reason} (killed, or out of memory)", max(b["step"] for b in heartbeats.values()), str(error)
    )


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
