"""A task with a bug at its fourth step. For tests of crash loops."""

from __future__ import annotations

from typing import Any

from tests import poisoned_task
from tests.poisoned_task import Config

__all__ = ["Config", "Task"]


class Task(poisoned_task.Task):
    calls = 0

    def loss(self, model: Any, batch: dict[str, Any]) -> Any:
        self.calls += 1
        return super().loss(model, batch) if self.calls <= 12 else 1 / 0
