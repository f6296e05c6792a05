"""Image classification that takes its time, so that a test can interrupt it in the middle."""

from __future__ import annotations

import time
from typing import Any

from pipeline.tasks import image_classification
from pipeline.tasks.image_classification import Config

__all__ = ["Config", "Task"]


class Task(image_classification.Task):
    def loss(self, model: Any, batch: Any) -> Any:
        time.sleep(0.3)
        return super().loss(model, batch)
