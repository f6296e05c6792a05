"""Image classification whose second rank meets with accidents: one an attempt, as the files of a folder say; and which
computes more slowly than the first.

A file is taken away before its accident happens, so each happens once: `<number>-<what>`, in that order.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline import pace
from pipeline.tasks import image_classification

__all__ = ["Config", "Task"]

AT_CALL = 10  # of the loss
WINDOW = 3, 0.2  # of pace.py: what a run shows in minutes is seen in a second


class Config(image_classification.Config):
    accidents: str  # the folder


class Task(image_classification.Task):
    calls = 0

    def loss(self, model: Any, batch: Any) -> Any:
        self.calls += 1
        pace.WINDOW = WINDOW  # here, in a worker: the module is loaded to check a configuration, too
        if dist.get_rank() == 1:
            time.sleep(0.05)
            assert isinstance(self.config, Config)
            accidents = sorted(Path(self.config.accidents).iterdir())
            if self.calls == AT_CALL and accidents:
                accidents[0].unlink()
                happen(accidents[0].name.partition("-")[2])
        return super().loss(model, batch)


def happen(what: str) -> None:
    """One accident."""
    if what == "allocate":
        torch.empty(2**50)
    if what == "crash":
        ctypes.string_at(0)
    os.kill(os.getpid(), getattr(signal, what))
    time.sleep(60)
