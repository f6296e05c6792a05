"""Which checkpoints stay: the newest few, one to go back to, those at every so many steps, the best by a metric. The
others are deleted, and so are those of a line that the run has gone back from (rollbacks.py).

`Retention` decides from steps and metrics alone, so the same words hold for a folder here and for a second home
(remote.py). In a folder only those count among the newest and the best that have been read back whole; a damaged one
takes nobody's place. What it gives up: each is read back once in a process, so damage that comes later is found at the
next start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.checkpoint import disk, format
from pipeline.checkpoint.format import Listed

if TYPE_CHECKING:
    from pipeline.config import Config


@dataclass(frozen=True)
class Retention:
    """keep: newest that stay, at least 1.  keep_every: steps; multiples stay for good.  keep_best: that many stay that
    have the largest (`mode` max) or smallest (min) metric `best`, a name such as eval/test/accuracy.  behind: steps;
    one at least so far behind the newest stays, as a run may have to go back so far.
    """

    keep: int = 2
    keep_every: int | None = None
    keep_best: int = 0
    best: str | None = None
    mode: Literal["max", "min"] = "max"
    behind: int = 0

    @staticmethod
    def of(config: Config) -> Retention:
        """What the sections `checkpoint` and `evaluate` ask for."""
        asked, scored, guard = config.checkpoint, config.evaluate, config.guard
        best = f"eval/{scored.best}" if scored.best else None
        behind = guard.max_skipped + guard.margin if guard.rollbacks else 0
        return Retention(asked.keep, asked.keep_every, asked.keep_best, best, scored.mode, behind)

    def newest(self, good: Collection[int]) -> list[int]:
        """The steps that stay as the newest, in order."""
        return sorted(good)[-max(self.keep, 1) :]

    def fallback(self, good: Collection[int]) -> list[int]:
        """The step that stays to go back to, and the one that will take its place when it is far enough behind."""
        far = max(good, default=0) - self.behind
        return [*sorted(step for step in good if step <= far)[-1:], *sorted(step for step in good if step > far)[:1]]

    def best_ones(self, good: Mapping[int, Mapping[str, float]]) -> list[int]:
        """The steps that stay as the best, the best first; of two that are equally good the earlier."""
        sign = -1 if self.mode == "max" else 1
        values = ((sign * metrics.get(self.best or "", math.nan), step) for step, metrics in good.items())
        return [step for _, step in sorted(pair for pair in values if math.isfinite(pair[0]))][: self.keep_best]

    def kept(self, good: Mapping[int, Mapping[str, float]]) -> set[int]:
        """The steps that stay, of good checkpoints by step with their metrics."""
        always = {step for step in good if self.keep_every and step % self.keep_every == 0}
        return {*self.newest(good), *self.fallback(good), *self.best_ones(good), *always}


@dataclass
class Keeper:
    """Applies a Retention to a folder of checkpoints, and remembers which of them it has read back whole."""

    root: Path
    rules: Retention
    protect: Callable[[], Collection[int]] = tuple
    """Asked each time: steps that stay though no rule keeps them, such as one that is being sent."""
    _whole: set[tuple[int, int]] = field(default_factory=set)

    def doomed(self) -> list[Listed]:
        """What `prune` would delete, by step: older than the newest `keep` good ones, and kept by no rule.

        Empty while there are fewer than `keep` good ones: the only good one stays whatever `keep` says.
        """
        listed = format.list_checkpoints(self.root)
        good = {each.step: each for each in listed if not each.damage}
        while True:
            metrics = {step: each.manifest.metrics for step, each in good.items() if each.manifest}
            kept, newest = self.rules.kept(metrics), self.rules.newest(good)
            counted = {*newest, *self.rules.fallback(good), *self.rules.best_ones(metrics)}
            broken = [step for step in sorted(counted) if not self._read_back(good[step])]
            if not broken:
                break
            for step in broken:
                del good[step]
        if len(newest) < max(self.rules.keep, 1):
            return []
        every = self.rules.keep_every
        spared = {*kept, *self.protect(), *(each.step for each in listed if every and each.step % every == 0)}
        return [each for each in listed if each.step < newest[0] and each.step not in spared]

    def prune(self) -> list[Path]:
        """Delete what was given up and what `doomed` names; the paths that are gone. A kill leaves each whole, or none
        of it.
        """
        removed = [*format.given_up(self.root), *(each.path for each in self.doomed())]
        for path in removed:
            with disk.explained(path):
                format.delete(path)
        return removed

    def _read_back(self, each: Listed) -> bool:
        assert each.manifest is not None
        known = each.step, each.manifest.attempt
        if known not in self._whole and not format.verify(each.path):
            self._whole.add(known)
        return known in self._whole
