"""A task that cannot be resumed as promised: its loss depends on what no checkpoint holds.

counter: calls since this process began, a global state.  clock: the time of day.  Otherwise it is poisoned_task.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from tests import poisoned_task

CALLS = 0


class Config(poisoned_task.Config):
    follows: Literal["counter", "clock"] = "counter"


class Task(poisoned_task.Task):
    config: Config

    def loss(self, model: Any, batch: Any) -> Any:
        global CALLS
        CALLS += 1
        error, sums = super().loss(model, batch)
        factor = 1 + 0.01 * (CALLS if self.config.follows == "counter" else time.time() % 1)
        return error * factor, {"loss": (error.detach() * factor, sums["loss"][1])}
