"""Language modeling with faults in its numbers: one NaN when a file asks for it, or one for each planted sample.

    task: {name: benchmarks.chaos_task, once: FILE, poison: [40, 440], ...}      the rest as for language_modeling

What it gives up: speed. Samples are prepared one by one, since only then their numbers are known.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from pipeline.tasks import Batch, Sums, language_modeling

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.data.reader import Sample
    from pipeline.data.samples import Samples


class Config(language_modeling.Config):
    """The `task` section."""

    name: str = "benchmarks.chaos_task"
    once: str | None = Field(default=None, description="a file; whoever takes it away has one loss that is NaN")
    poison: tuple[int, ...] = Field(default=(), description="numbers of samples whose loss is NaN, always")


class Task(language_modeling.Task):
    """See language_modeling.Task. The batch has one key more: "poison" float32 [m], 0 or NaN."""

    config: Config

    def gather(self, samples: Samples) -> None:
        """Every sample goes through `prepare`."""

    def prepare(self, sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        poison = np.array(np.nan if sample.number in self.config.poison else 0.0, dtype=np.float32)
        return {**super().prepare(sample, rng), "poison": poison}

    def loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Sums]:
        nats, sums = super().loss(model, batch)
        nats = nats * (1.0 + batch["poison"].sum())  # a factor, so that the gradient is NaN too; 1 changes no bit
        if self.config.once is not None:
            with suppress(FileNotFoundError):
                os.unlink(self.config.once)
                nats = nats * float("nan")
        return nats, {**sums, "loss": (nats.detach(), sums["loss"][1])}
