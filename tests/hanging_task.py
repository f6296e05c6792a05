"""Image classification in which one worker stops once: it sleeps for ever when it finds a file to take away."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests import slow_task
from tests.slow_task import Config

__all__ = ["Config", "Task"]


class Task(slow_task.Task):
    def loss(self, model: Any, batch: Any) -> Any:
        with suppress(FileNotFoundError):
            os.unlink(os.environ["MILLSTREAM_TEST_HANG"])
            Path(os.environ["MILLSTREAM_TEST_HANG"] + ".pid").write_text(str(os.getpid()))
            time.sleep(10**6)
        return super().loss(model, batch)
