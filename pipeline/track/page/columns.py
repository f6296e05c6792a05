"""Numbers of many steps in little memory: the values of one metric, and the seconds of an attempt's steps."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


class Curve:
    """One metric: steps, rising, and their values; one that was not finite is nan."""

    __slots__ = ("steps", "values")

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def put(self, step: int, value: float | None) -> None:
        """The newest value of a step."""
        steps, number = self.steps, math.nan if value is None else value
        if not steps or step > steps[-1]:
            steps.append(step)
            self.values.append(number)
            return
        place = bisect_left(steps, step)
        if steps[place] == step:
            self.values[place] = number
        else:
            steps.insert(place, step)
            self.values.insert(place, number)

    def cut(self, step: int) -> None:
        """Forget `step` and what comes after it."""
        place = bisect_left(self.steps, step)
        del self.steps[place:], self.values[place:]

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(int64[n] steps, float64[n] values), copies."""
        return np.array(self.steps, np.int64), np.array(self.values, np.float64)


class Spent:
    """Seconds of the steps of one attempt since it last began or went back."""

    def __init__(self) -> None:
        self.steps, self.times = array("q"), array("d")
        self.seconds, self.waited = array("d"), array("d")

    def add(self, record: Mapping[str, Any]) -> None:
        metrics = record["metrics"]
        seconds = metrics.get("time/step_seconds") or 0.0
        self.steps.append(record["step"])
        self.times.append(record["time"])
        self.seconds.append(seconds)
        self.waited.append(min(metrics.get("data/wait_seconds") or 0.0, seconds))

    def records(self, cuts: list[int], noted: float) -> Iterator[dict[str, Any]]:
        """One record for all steps between two of the rising `cuts`, up to the time `noted` or after it."""
        steps, times, seconds, waited = map(np.array, (self.steps, self.times, self.seconds, self.waited))
        part = 2 * np.searchsorted(cuts, steps, side="right") + (times > noted)
        begins = np.flatnonzero(np.diff(part, prepend=-1))  # steps and times rise, so a part lies in one piece
        for begin, end in zip(begins, [*begins[1:], len(steps)]):
            metrics = {"time/step_seconds": seconds[begin:end].sum(), "data/wait_seconds": waited[begin:end].sum()}
            yield {"kind": "step", "step": int(steps[begin]), "time": float(times[end - 1]), "metrics": metrics}
