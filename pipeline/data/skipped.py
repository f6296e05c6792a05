"""Steps that are left out: windows of the run of which nothing is read and nothing is computed.

Each counts as a step: number, learning rate and the order of the others are as if it had been trained. Windows come
from the configuration (`data.skip_steps`) and from a run that went back to before a trouble; once a checkpoint has
recorded one it stays. What it gives up: the samples of such a step do not come in that epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Window = tuple[int, int]


@dataclass(frozen=True)
class Skipped:
    """Windows (first step, last step), both left out; in order, none touching the next."""

    windows: tuple[Window, ...] = ()

    @staticmethod
    def of(windows: Iterable[Sequence[int]]) -> Skipped:
        """Any windows; those that overlap or touch become one."""
        joined: list[Window] = []
        for first, last in sorted((first, last) for first, last in windows):
            if joined and first <= joined[-1][1] + 1:
                joined[-1] = joined[-1][0], max(joined[-1][1], last)
            else:
                joined.append((first, last))
        return Skipped(tuple(joined))

    def window(self, step: int) -> Window | None:
        """The window that a step lies in, if any."""
        return next((window for window in self.windows if window[0] <= step <= window[1]), None)

    def next(self, step: int) -> int:
        """The first step from `step` on that is not left out."""
        inside = self.window(step)
        return inside[1] + 1 if inside else step

    def since(self, step: int) -> Skipped:
        """What of it lies at `step` or behind."""
        return Skipped(tuple((max(first, step), last) for first, last in self.windows if last >= step))
