"""When to save next: every so many steps, or as often as pays.

    every: 100     after every step whose number is a multiple
    every: auto    so far apart that saving and the work that a failure undoes cost least together:
                   sqrt(2 x seconds that a save holds up training x seconds between failures)

The formula is that of Young (1974) and Daly (2006). The cost of a save and the length of a step are measured as the
run goes, the slowest rank's; the time between failures is what the configuration says, corrected by the failures that
the run has had. What it gives up: with `auto` other steps are saved in every run; what is computed is the same.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from pipeline.checkpoint.saver import Saved
from pipeline.sections import Checkpoint
from pipeline.session import World

FIRST_STEPS = 20  # after which a run's first save shows what one costs; until then a step's usual length is not known
KEPT_SAVES = 9  # whose costs the median is of: one slow moment of a disk says little
NEAR = 0.25  # intervals that differ by less than this share cost the same, to a few per cent of what saving costs


class Learnt(NamedTuple):
    """Another interval, in steps, and what it follows from: seconds that a save waits, that a step takes."""

    every: int
    save_seconds: float
    step_seconds: float


class Cadence:
    """Which steps are saved. All ranks make the same calls and get the same answers.

    records: the run's journal so far; rank 0's counts, which alone need have read it.
    """

    def __init__(self, world: World, rule: Checkpoint, first: int, records: Sequence[Mapping[str, Any]]) -> None:
        self._world, self._every = world, rule.every
        mean, every = world.gather([between_failures(rule, records), last_interval(records)])[0].tolist()
        self._mean, self._interval = mean, int(every)
        self._next = first + self._interval
        self._costs: deque[float] = deque(maxlen=KEPT_SAVES)

    def due(self, step: int) -> bool:
        """Whether to save after `step` steps."""
        return step >= self._next if isinstance(self._every, str) else step % self._every == 0

    def began(self, step: int) -> None:
        """A save of the state after `step` steps has begun."""
        self._next = step + self._interval

    def learn(self, saved: Saved, step_seconds: float | None) -> Learnt | None:
        """What a save has cost this rank, and how long its steps are; the new interval, if it is another."""
        if self._every != "auto":
            return None
        blocked, step = self._world.gather([saved.blocked_seconds, step_seconds or 0.0]).max(axis=0).tolist()
        self._costs.append(blocked)
        usual, before = median(self._costs), self._interval
        found = interval(usual, step, self._mean)
        if found is None or (len(self._costs) > 1 and abs(found - before) <= NEAR * before):
            return None
        self._interval = found
        self._next += found - before
        return Learnt(found, usual, step) if found != before else None


def interval(save_seconds: float, step_seconds: float, between_failures: float) -> int | None:
    """Steps between saves, at least one; None when the length of a step is not known."""
    if not step_seconds:
        return None
    return max(1, round(math.sqrt(2 * save_seconds * between_failures) / step_seconds))


def last_interval(records: Sequence[Mapping[str, Any]]) -> int:
    """Steps between saves as the attempts before have learnt it: who fails often must not wait to learn it anew."""
    return next((record["every"] for record in reversed(records) if record["kind"] == "cadence"), FIRST_STEPS)


def between_failures(rule: Checkpoint, records: Iterable[Mapping[str, Any]]) -> float:
    """Seconds between failures: what is assumed counts as one failure in that time, beside those of the journal."""
    failures, clocks = 1, {}
    for record in records:
        failures += record["kind"] == "failure"
        clocks.setdefault(record["attempt"], []).append(record["time"])
    return (rule.failure_hours * 3600 + sum(max(times) - min(times) for times in clocks.values())) / failures
