"""Image classification in which one rank is slower than the others: its forward passes take a moment more."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

from pipeline.tasks import image_classification
from pipeline.tasks.image_classification import Config

__all__ = ["Config", "Task"]

SLOW_RANK, SECONDS = 1, 0.08


class Task(image_classification.Task):
    def loss(self, model: Any, batch: Any) -> Any:
        if dist.get_rank() == SLOW_RANK:
            time.sleep(SECONDS)
        return super().loss(model, batch)
