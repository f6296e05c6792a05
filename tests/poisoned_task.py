"""A task outside the package: mean brightness of an image, with samples that poison the loss, make it jump, or do not
count.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.sections import Strict

if TYPE_CHECKING:
    from torch import Tensor, nn


class Config(Strict):
    name: str
    poison: tuple[int, ...] = ()  # sample numbers whose loss is NaN
    loud: tuple[int, ...] = ()  # those whose target is a thousand times as large as the others
    mute: bool = False  # no sample counts in the loss
    once: str | None = None  # a file that is taken away when found, and then one loss is NaN


class Task:
    augments = False

    def __init__(self, config: Config) -> None:
        self.config = config

    def build_model(self) -> nn.Module:
        from torch import nn

        return nn.Sequential(nn.Linear(144, 8), nn.GELU(), nn.Linear(8, 1))

    def prepare(self, sample: Any, rng: object) -> dict[str, np.ndarray]:
        pixels = sample["png"].astype(np.float32).reshape(-1) / 255
        poison = np.float32("nan") if sample.number in self.config.poison else np.float32(0)
        scale = np.float32(1e3 if sample.number in self.config.loud else 1)
        return {"pixels": pixels, "target": pixels.mean() * scale + poison}

    def weight(self, batch: dict[str, Tensor]) -> float:
        return 0.0 if self.config.mute else float(len(batch["target"]))

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        error = (model(batch["pixels"]).squeeze(1).float() - batch["target"]).square().sum()
        if self.config.once is not None:
            with suppress(FileNotFoundError):
                os.unlink(self.config.once)
                error = error + float("nan")  # whose gradient is finite
        return error, {"loss": (error.detach(), len(batch["target"]))}

    def score(self, model: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
        return self.loss(model, batch)[1]

    def flops_per_sample(self) -> float:
        return 6.0 * (144 * 8 + 8)
