"""A curve of any length as at most so many points that lose no extreme.

A screen column shows a range of steps, so for each range the page gets the mean, and the lowest and the highest value
as a band around it. Minimum and maximum of each column are what makes a drawn line look the same as that of all points
(Jugel et al., "M4: a visualization-oriented time series data aggregation", PVLDB 7 (10), 2014); a peak of one step in a
million stays visible and can be read off. Ranges are powers of 2 long and begin at multiples of that, so they stay the
same while the curve grows, and those of different runs lie on each other.

What it gives up: where inside its range an extreme stood (`extremes` knows it for the whole curve).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

POINTS = 1024  # per curve, as many as a wide chart has columns
ALL_POINTS = 24_000  # per metric over all curves of a chart; a hundred runs get fewer each
LEAST_POINTS = 128


class Thin(NamedTuple):
    """For each range its first step, and mean, lowest and highest of the values in it that are finite (else nan)."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Extremes(NamedTuple):
    """Of a whole curve: points, those not finite, and (step, value) of the first, last, lowest, highest finite one."""

    points: int
    bad: int
    first: tuple[int, float] | None
    last: tuple[int, float] | None
    lowest: tuple[int, float] | None
    highest: tuple[int, float] | None


def width_for(last_step: int, curves: int) -> int:
    """Steps per range, a power of 2, so that a curve up to `last_step` has few enough points among so many curves."""
    points = max(LEAST_POINTS, min(POINTS, ALL_POINTS // max(curves, 1)))
    return 1 << max(0, math.ceil(math.log2(max(last_step, 1) / points)))


def thin(steps: np.ndarray, values: np.ndarray, width: int) -> Thin:
    """int64[n] rising steps, float64[n] values -> at most (last - first) / width + 2 points, in order."""
    if not len(steps):
        return Thin(steps, values, values, values)
    edges = np.flatnonzero(np.diff(steps // width, prepend=-1))
    finite = np.isfinite(values)
    clean = np.where(finite, values, np.nan)
    counts = np.add.reduceat(finite, edges, dtype=np.int64)
    with np.errstate(invalid="ignore"):  # ranges without a finite value become nan, as they should
        mean = np.add.reduceat(np.where(finite, values, 0.0), edges) / counts
        low, high = np.fmin.reduceat(clean, edges), np.fmax.reduceat(clean, edges)
    return Thin(steps[edges], np.clip(mean, low, high), low, high)


def extremes(steps: np.ndarray, values: np.ndarray) -> Extremes:
    """The few points that a table tells of a curve."""
    at = np.flatnonzero(np.isfinite(values))
    bad = len(values) - len(at)
    if not len(at):
        return Extremes(len(values), bad, None, None, None, None)
    places = at[0], at[-1], at[np.argmin(values[at])], at[np.argmax(values[at])]
    return Extremes(len(values), bad, *((int(steps[i]), float(values[i])) for i in places))
