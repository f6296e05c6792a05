"""What faults have cost a run, from its journal, beside the least that they could have cost it.

    journal + faults -> when each was noticed, when the next step that counts was done
    journal -> ledger (pipeline/track/goodput.py) -> costs -> the bound of Young and Daly

The bound is the largest expected share of useful time at these costs. While it trains, a run saves every T seconds,
each save keeps it waiting for d, and faults that undo work come at random at the rate r. Until T seconds of work are
done and saved it takes (exp(r (T + d)) - 1) / r seconds on average: Daly's complete model for exponentially distributed
faults (A higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22(3), 2006). So the share is
r T / (exp(r (T + d)) - 1), largest at the T with (1 - r T) exp(r (T + d)) = 1, which is sqrt(2 d / r) to first order
(Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974). It holds for the time in
which the run is up; the rest of the wall time is its first start, and for each fault that ended an attempt the seconds
until it was noticed and those until the next useful step.

What it counts: waiting for saves, work that is done again, noticing, starting. What it does not: that ranks wait for
samples and each other within a step, that a checkpoint counts a moment after it was begun, and the way out at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, NamedTuple

from pipeline.track import goodput
from pipeline.track.journal import lineage

Records = Sequence[Mapping[str, Any]]

# What is done -> the record that says that it was noticed; None: the command's end, which the scheduler sees.
NOTICED_BY: dict[str, str | None] = {
    "worker killed": "failure",
    "worker stopped": "stall",
    "driver killed": None,
    "driver told to stop": None,
    "disk full": "save_failed",
    "one NaN": "recompute",
}
ENDS_AN_ATTEMPT = ("worker killed", "worker stopped", "driver killed", "driver told to stop")
UNDOES_WORK = ENDS_AN_ATTEMPT[:3]  # who is told to stop saves first


@dataclass
class Fault:
    """One that was done. at: Unix seconds.  attempt, step: the last that the journal had then."""

    kind: str
    at: float
    attempt: int
    step: int
    noticed: float | None = None  # Unix seconds
    useful: tuple[float, float] | None = None  # when the next step that counts began and was there

    @property
    def seconds_to_notice(self) -> float | None:
        return None if self.noticed is None else max(0.0, self.noticed - self.at)

    @property
    def seconds_to_useful(self) -> float | None:
        return None if self.useful is None else max(0.0, self.useful[1] - self.at)


class Costs(NamedTuple):
    """Measured, in seconds of wall time, and counts of faults.

    wall: of the ledger.  start: before the first step of all, unless a fault was in the way.  ending: faults that ended
    an attempt.  undoing: those of them that undo work.  notice, restart: of a fault that ended an attempt, on average.
    save: that one keeps waiting.
    """

    wall: float
    start: float
    ending: int
    undoing: int
    notice: float
    restart: float
    save: float

    @property
    def up(self) -> float:
        """Seconds in which the run could train."""
        return max(0.0, self.wall - self.start - self.ending * (self.notice + self.restart))


class Bound(NamedTuple):
    """interval: seconds between saves that cost least.  share: of useful time, at best, of all time."""

    interval: float
    share: float


def follow_up(faults: Iterable[Fault], records: Records, ends: Sequence[float]) -> None:
    """Fill in when each fault was noticed, and the next step that counts. `ends`: when the command was seen to end."""
    counting = [record for record in lineage(records) if record["kind"] == "step"]
    for fault in faults:
        kind, later = NOTICED_BY[fault.kind], fault.kind in ENDS_AN_ATTEMPT
        told = [r["time"] for r in records if r["kind"] == kind and (r["attempt"] == fault.attempt or not later)]
        fault.noticed = min((at for at in (told if kind else ends) if at >= fault.at), default=None)
        for step in counting:
            if step["time"] > fault.at and step["attempt"] >= fault.attempt + later:
                fault.useful = (step["time"] - step["metrics"]["time/step_seconds"], step["time"])
                break


def not_injected(records: Records, faults: Sequence[Fault]) -> list[str]:
    """What failures say of attempts that no fault was meant to end."""
    hit = {fault.attempt for fault in faults if fault.kind in ENDS_AN_ATTEMPT}
    return [record["message"] for record in records if record["kind"] == "failure" and record["attempt"] not in hit]


def costs(records: Records, faults: Sequence[Fault]) -> Costs:
    """What was measured. Faults of which one came before the run had recovered from another share their seconds."""
    ranks = next(record["workers"] for record in records if record["kind"] == "attempt")
    spent = goodput.ledger(records)
    begin, end = records[0]["time"], max(record["time"] for record in records)
    first = next(record for record in records if record["kind"] == "step")
    ending = [fault for fault in faults if fault.kind in ENDS_AN_ATTEMPT]
    downs = [(max(f.at, begin), f.useful[0] if f.useful else end) for f in ending]
    down, first_step = union(downs), first["time"] - first["metrics"]["time/step_seconds"]
    noticing = [seconds for fault in ending if (seconds := fault.seconds_to_notice) is not None]
    notice = mean(noticing) if noticing else 0.0
    saves = sum(record["kind"] in ("save", "save_failed") for record in records)
    return Costs(
        wall=sum(spent.values()) / ranks,
        start=union([*downs, (begin, first_step)]) - down,
        ending=len(ending),
        undoing=sum(fault.kind in UNDOES_WORK for fault in ending),
        notice=notice,
        restart=down / len(ending) - notice if ending else 0.0,
        save=spent["save"] / ranks / saves if saves else 0.0,
    )


def bound(costs: Costs) -> Bound:
    """The largest expected share of useful time; see above."""
    if not costs.undoing or not costs.save or not costs.up:
        return Bound(math.inf if costs.save else 0.0, costs.up / costs.wall)
    rate = costs.undoing / costs.up
    between = interval(costs.save, rate)
    return Bound(between, costs.up / costs.wall * share(between, costs.save, rate))


def interval(save: float, rate: float) -> float:
    """Seconds between saves of `save` > 0 seconds that cost least, with `rate` faults a second; below 1 / rate."""
    low, high = 0.0, 1 / rate
    for _ in range(100):
        middle = (low + high) / 2
        if (1 - rate * middle) * math.exp(rate * (middle + save)) > 1:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def share(between: float, save: float, rate: float) -> float:
    """Expected share of useful time while a run is up that saves every `between` seconds."""
    return rate * between / math.expm1(rate * (between + save))


def union(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds that are in at least one of the spans (begin, end)."""
    total, reached = 0.0, -math.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
