"""A task outside the package: brightness of an image by a network with a dead layer and one that is far too loud."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.sections import Strict

if TYPE_CHECKING:
    from torch import Tensor, nn

UNITS, ALIVE = 40, 2


class Config(Strict):
    name: str
    dead: bool = False
    loud: bool = False


class Task:
    augments = False

    def __init__(self, config: Config) -> None:
        self.config = config

    def build_model(self) -> nn.Module:
        import torch
        from torch import nn

        conv = nn.Conv2d(4, UNITS, 3, padding=1)
        layers = {"first": nn.Conv2d(1, 4, 3), "conv": conv, "relu": nn.ReLU(), "flat": nn.Flatten()}
        wide, head = nn.Linear(UNITS * 100, 8), nn.Linear(8, 1)
        model = nn.Sequential(OrderedDict(layers | {"wide": wide, "gelu": nn.GELU(), "head": head}))
        with torch.no_grad():
            if self.config.dead:
                conv.get_parameter("bias")[ALIVE:] = -1e3  # below zero whatever comes in
            if self.config.loud:
                wide.weight.mul_(1e6)
                head.weight.mul_(1e-6)
        return model

    def prepare(self, sample: Any, rng: object) -> dict[str, np.ndarray]:
        pixels = sample["png"].astype(np.float32).reshape(1, 12, 12) / 255
        return {"pixels": pixels, "target": pixels.mean()}

    def weight(self, batch: dict[str, Tensor]) -> float:
        return float(len(batch["target"]))

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        error = (model(batch["pixels"]).squeeze(1).float() - batch["target"]).square().sum()
        return error, {"loss": (error.detach(), len(batch["target"]))}

    def score(self, model: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
        return self.loss(model, batch)[1]

    def flops_per_sample(self) -> float:
        return 1.0
