"""Where the time of a run went: every second of every rank is of one kind, and they add up to the wall time.

    useful      forward, backward and step of steps that count       data        waiting for samples (and their ranks)
    save        waiting for a checkpoint                             evaluation  scoring held-out sets
    restore     reading a checkpoint                                 start       from the launch to the first phase
    rework      steps that a later attempt did again, and the time   idle        between attempts of different
                until a loss was noticed                                         commands, and leaving

Goodput is the useful share ("effective training time ratio", Dubey et al. 2024, section 3.3). All of it is read from
the journal: `time` records say how each rank's seconds were spent; where a driver was killed before it could write
one, the steps themselves say it. What it gives up: the seconds of a step that is done again are those of rank 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.track.journal import lineage

KINDS: tuple[str, ...] = ("useful", "data", "save", "evaluation", "restore", "start", "rework", "idle")
_KIND_OF_PHASE = dict.fromkeys(("forward", "backward", "step"), "useful") | dict.fromkeys(("commit", "upload"), "save")


def ledger(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """{kind: rank-seconds}; together (wall seconds of each attempt, and of the pause before it) times its ranks."""
    everything = list(records)
    counting = {id(record) for record in lineage(everything)}
    attempts: dict[int, list[Mapping[str, Any]]] = {}
    for record in everything:
        attempts.setdefault(record["attempt"], []).append(record)
    total = dict.fromkeys(KINDS, 0.0)
    last_end: float | None = None
    for own in attempts.values():
        first = next((record for record in own if record["kind"] == "attempt"), own[0])
        ranks = max(first.get("workers", 1), 1)
        begin, end = first["time"], max(record["time"] for record in own)
        if last_end is not None:
            total["start" if first.get("relaunch") else "idle"] += ranks * max(begin - last_end, 0.0)
        undone = [record for record in own if record["kind"] == "step" and id(record) not in counting]
        for kind, seconds in _attempt(own, undone, begin, end, ranks).items():
            total[kind] += seconds
        last_end = end
    return total


def shares(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """{kind: share of all rank-seconds}; empty when nothing has begun. Goodput is the share of `useful`."""
    spent = ledger(records)
    whole = sum(spent.values())
    return {kind: seconds / whole for kind, seconds in spent.items()} if whole else {}


def _attempt(
    own: list[Mapping[str, Any]], undone: list[Mapping[str, Any]], begin: float, end: float, ranks: int
) -> dict[str, float]:
    """Rank-seconds of one attempt's records by kind; `undone` are its steps that were done again."""
    spent = dict.fromkeys(KINDS, 0.0)
    whole = ranks * (end - begin)
    steps = [record for record in own if record["kind"] == "step"]
    times = [record for record in own if record["kind"] == "time"]
    failed = not any(record["kind"] == "end" for record in own)
    ending = "rework" if failed else "idle"  # what the time counts for in which nothing was heard of a rank any more
    noted = known = times[-1]["time"] if times else begin
    later = [step for step in steps if step["time"] > noted]  # a driver that is killed notes no more how time was spent
    for seconds in times[-1]["ranks"].values() if times else ():
        for phase, share in seconds.items():
            silent = "useful" if later else ending
            spent[silent if phase == "silent" else _KIND_OF_PHASE.get(phase, str(phase))] += share
    if later:
        known = later[-1]["time"]
        took = min(sum(_seconds(step) for step in later), known - noted)
        waited = min(sum(_waited(step) for step in later), took)
        spent["data"] += ranks * waited
        spent["useful"] += ranks * (took - waited)
        spent["save"] += ranks * (known - noted - took) if times else 0.0  # what comes between two steps
    if failed:  # a step that was not finished is lost with the attempt, however long it hung
        unfinished = spent["useful"] + spent["data"] - ranks * sum(_seconds(step) for step in steps)
        _move(spent, "useful", unfinished)
    tail = min(ranks * (end - known), max(whole - sum(spent.values()), 0.0))  # after what is known of the ranks
    spent[ending] += tail
    spent["start"] += whole - sum(spent.values())  # before their workers were there; what is left, to the second
    _move(spent, "data", ranks * sum(_waited(step) for step in undone))
    _move(spent, "useful", ranks * sum(_seconds(step) - _waited(step) for step in undone))
    return spent


def _move(spent: dict[str, float], kind: str, seconds: float) -> None:
    """Count seconds of a kind, as far as there are any, as rework."""
    moved = min(max(seconds, 0.0), spent[kind])
    spent[kind] -= moved
    spent["rework"] += moved


def _seconds(step: Mapping[str, Any]) -> float:
    return step["metrics"].get("time/step_seconds") or 0.0


def _waited(step: Mapping[str, Any]) -> float:
    return min(step["metrics"].get("data/wait_seconds") or 0.0, _seconds(step))
