"""The facts that the end of a run says, from its journal: how far, how well, how fast, at what cost in restarts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, TypedDict

from pipeline.track.journal import curve, lineage

_LOWER_IS_BETTER = ("loss", "perplexity", "error", "bits_per_byte")
_TELLS_PROGRESS = ("start", "restore", "step", "evaluation", "save", "end")


class Summary(TypedDict):
    """What the end of a run says. Seconds of wall time are summed over attempts, pauses between them left out."""

    last_step: int
    attempts: int
    restarts: int
    evaluations: list[tuple[str, float, float, int]]
    """(metric, last value, best value, step of the best), without the "eval/" in front."""
    wall_seconds: float
    samples_per_second: float | None
    """Median over the steps that count."""
    data_wait_share: float | None
    """Seconds waited for data per second of step time, on the slowest rank."""


def summary(records: Iterable[Mapping[str, Any]], best: str | None = None, mode: str = "max") -> Summary:
    """The facts for the end of a run. `best` ("test/accuracy") is judged by `mode`, other metrics by their names."""
    everything = list(records)
    counted = lineage(everything)
    times: dict[int, list[float]] = {}
    for record in everything:
        times.setdefault(record["attempt"], []).append(record["time"])
    done = [record["step"] + (record["kind"] == "step") for record in counted if record["kind"] in _TELLS_PROGRESS]
    rates = [rate for rate in curve(everything, "throughput/samples_per_second")[1] if math.isfinite(rate)]
    seconds = sum(curve(everything, "time/step_seconds")[1])
    waited = sum(curve(everything, "data/wait_seconds")[1])
    names = dict.fromkeys(name for record in counted if record["kind"] == "evaluation" for name in record["metrics"])
    return Summary(
        last_step=max(done, default=0),
        attempts=len(times),
        restarts=max(0, len(times) - 1),
        evaluations=[last_and_best(name.removeprefix("eval/"), *curve(everything, name), best, mode) for name in names],
        wall_seconds=sum(max(clock) - min(clock) for clock in times.values()),
        samples_per_second=median(rates) if rates else None,
        data_wait_share=waited / seconds if seconds else None,
    )


def last_and_best(
    name: str, steps: Sequence[int], values: Sequence[float], best: str | None, mode: str
) -> tuple[str, float, float, int]:
    """(name, last value, best value, step of the best); the best of a metric that never was finite is nan."""
    lower = mode == "min" if name == best else name.endswith(_LOWER_IS_BETTER)
    finite = [(value, step) for step, value in zip(steps, values) if math.isfinite(value)]
    if not finite:
        return name, values[-1], math.nan, steps[-1]
    value, step = (min if lower else max)(finite, key=lambda point: point[0])
    return name, values[-1], value, step
