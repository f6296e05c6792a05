"""Whether a number is far above those before it: how a loss that jumps is told from the noise of an ordinary one.

    limit = median x (largest / median) ^ power        over the last `window` ordinary values, never below 1.1 medians

The largest of a hundred values shows how far up noise reaches, whatever the shape of its tail; the power goes as far
again, and again, on the log scale. For normal noise the default, 3, is about 8 standard deviations above the median.
The window of 128 steps, judged once half of it is filled, is that of OLMo-core's SkipStepOptimizer
(src/olmo_core/optim/skip_step_optimizer.py); its limit of 6 standard deviations is not taken, as classification losses
near 0 and gradient norms have long upper tails and pass it on ordinary days (tests/test_spikes.py counts how often).

Division and multiplication only, no logarithm: they are rounded alike on every processor, so ranks on unlike hosts come
to the same decision. What it gives up: what falls, or rises step by step, is never a spike, and a curve that falls
steeply hides small ones until the window has left the slope.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

LEAST = 1.1  # a value within a tenth of the median is no spike, however quiet the curve


class Recent:
    """The last ordinary values of a number, in order, and how far above them the next may be."""

    def __init__(self, window: int, power: int, values: Iterable[float] = ()) -> None:
        self.window, self.power = window, power
        self.values = deque(values, maxlen=window)

    @property
    def limit(self) -> float | None:
        """A value above it is a spike; None while too few are known. Values that may be negative count by distances."""
        if len(self.values) < max(2, self.window // 2):
            return None
        ordered = sorted(self.values)
        middle, top = self.median, ordered[-1]
        if ordered[0] > 0:
            reach = math.prod([top / middle] * self.power)
            return middle * max(reach, LEAST)
        return middle + max(self.power * (top - middle), (LEAST - 1) * abs(middle))

    @property
    def median(self) -> float:
        ordered, half = sorted(self.values), len(self.values) // 2
        return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2

    def add(self, value: float) -> None:
        """An ordinary value, finite; the oldest falls out."""
        self.values.append(value)
