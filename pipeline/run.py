"""A run as its folder tells it: configuration, journal, checkpoints. Reads only, also while the run goes on.

What it gives up: nothing is cached, every question reads its file again.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint import rollbacks
from pipeline.checkpoint.format import Listed, list_checkpoints
from pipeline.config import Config, load_resolved
from pipeline.errors import RunError
from pipeline.track import journal


@dataclass(frozen=True)
class Run:
    """One run folder, such as runs/digits."""

    folder: Path

    @property
    def config(self) -> Config:
        """The resolved configuration: every key, every path absolute."""
        return load_resolved(self.folder / "config.yaml")

    def records(self) -> list[dict[str, Any]]:
        """All that the journal has recorded, oldest first; steps that were done again after a restart stand twice."""
        return journal.read(self.folder / "journal.jsonl").records

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric such as train/loss or eval/test/accuracy: one value per step, the latest.

        A train/ metric stands at its step, counted from 0; an eval/ metric at the number of steps done before it.
        """
        return journal.curve(self.records(), name)

    def checkpoints(self) -> list[Listed]:
        """Checkpoints by step, cheaply: manifests and sizes are checked, contents are not."""
        return list_checkpoints(self.folder / "checkpoints")

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, value) of the best `evaluate.best` so far, or None when the config names none or none was recorded."""
        wanted = self.config.evaluate
        steps, values = self.curve(f"eval/{wanted.best}")
        finite = [(value, step) for step, value in zip(steps, values) if math.isfinite(value)]
        if wanted.best is None or not finite:
            return None
        value, step = (max if wanted.mode == "max" else min)(finite, key=lambda pair: pair[0])
        return step, value

    @property
    def finished(self) -> bool:
        """Whether a checkpoint of the last step is there."""
        return any(listed.step >= self.config.steps and not listed.damage for listed in self.checkpoints())


def open_run(folder: Path) -> Run:
    """The run in `folder`. Raises `RunError` when it is no run folder."""
    if not (folder / "config.yaml").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
        mend = f"runs in it: {', '.join(inside)}" if inside else "a run folder is made by `millstream train CONFIG`"
        raise RunError(f"{folder} is no run folder, it has no config.yaml; {mend}")
    return Run(folder.absolute())


def newest_attempt(folder: Path) -> int:
    """Number of the newest attempt at the run in `folder`, whoever made it; 0 when there was none.

    One that has decided to go back counts in any case: what follows it has to have a larger number.
    """
    names = (path.name for path in (folder / "attempts").glob("*.json"))
    numbers = [int(name[:-5]) for name in names if re.fullmatch(r"\d{4,}\.json", name)]
    return max([*numbers, *(decision.attempt for decision in rollbacks.read(folder / "checkpoints"))], default=0)
