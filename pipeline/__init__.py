"""Millstream: exact, elastic training of deep networks from sharded data.

    import pipeline

    config = pipeline.load("configs/digits.yaml", ["cluster.workers=1"])
    run = pipeline.train(config)
    steps, losses = run.curve("train/loss")

Importing this costs nothing: torch, ray and deepspeed are loaded by the first call that needs them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from pipeline.config import Config
    from pipeline.data.reader import Dataset
    from pipeline.run import Run

__all__ = ["__version__", "load", "open_dataset", "open_run", "train"]
__version__ = "0.1.0"


def load(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file, lays `key.path=value` overrides over it and checks everything, in under a second.

    Raises `pipeline.problems.InvalidConfig` (a `ConfigError`) with every problem found: `.problems`.
    """
    from pipeline import config

    return config.load(path, overrides)


def train(config: Config, *, fresh: bool = False, address: str | None = None, new_order: bool = False) -> Run:
    """Trains `config` to its last step, or goes on where an earlier call or command with its name stopped.

    `fresh` starts anew in a new run folder; `new_order` goes on though data, weights, seed or batch sizes are others
    now; `address` is that of a running Ray cluster. Ctrl-C saves and returns a run
    that is not `.finished`. Raises `MillstreamError` for what a person can mend, `RunError` when the run was given up.
    """
    from pipeline.cluster import driver, history
    from pipeline.config import resolve
    from pipeline.errors import RunError
    from pipeline.run import Run

    code = driver.run(config, fresh=fresh, address=address, new_order=new_order)
    run = Run(history.run_folder(resolve(config), fresh=False))
    if code not in (driver.DONE, driver.AGAIN):
        raise RunError(f"run {config.name} was given up; what happened is in {run.folder / 'journal.jsonl'}")
    return run


def open_dataset(folder: str | os.PathLike[str], *, check_digests: bool = True) -> Dataset:
    """Opens a folder of indexed tar shards, or a URL of one: `len(dataset)`, `dataset.sample(number)`.

    What comes from a URL is kept below the system's temporary folder. Raises `DataError`.
    """
    import os

    from pipeline.data import reader

    return reader.open_dataset(os.fspath(folder), check_digests)


def open_run(folder: str | os.PathLike[str]) -> Run:
    """Opens a run folder, such as runs/digits, to look at: `.config`, `.curve("train/loss")`, `.checkpoints()`."""
    from pathlib import Path

    from pipeline import run

    return run.open_run(Path(folder))


class _Face(ModuleType):
    """Keeps `pipeline.train` the function: importing the module of that name would put itself in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if name != "train" or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
