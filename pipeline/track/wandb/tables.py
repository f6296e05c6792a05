"""Samples to look at as tables of W&B, pictures in them: one for each held-out set at each evaluation.

W&B keeps a table as a file of the run and, with its pictures, as an artifact. It copies what goes into artifacts to a
staging folder first, in the home folder; here that is in the run's own, so that what was recorded offline is still
there when it is sent from another host. What it gives up: the pictures of a table that the server has not taken when a
run ends (references.py); a picture that is not there any more is left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.track import pictures

STAGING = "WANDB_DATA_DIR"  # W&B's name for the folder above artifacts/staging


def with_tables(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A row for W&B: lists of samples in it become tables."""
    return {name: _table(value, folder) if isinstance(value, list) else value for name, value in row.items()}


@contextmanager
def staged(folder: Path) -> Iterator[None]:
    """While it lasts, W&B's copies of what goes into artifacts come below `folder`, unless somebody says where."""
    if STAGING in os.environ:
        yield
        return
    os.environ[STAGING] = str(folder.absolute() / "wandb")
    try:
        yield
    finally:
        os.environ.pop(STAGING, None)


def _table(samples: Sequence[Mapping[str, Any]], folder: Path) -> Any:
    import wandb

    names = dict.fromkeys(name for sample in samples for name in sample)
    columns = [_alike([_cell(sample.get(name), folder) for sample in samples]) for name in names]
    return wandb.Table(columns=[*names], data=[list(row) for row in zip(*columns)])


def _cell(value: Any, folder: Path) -> Any:
    """A picture, or what W&B takes as it is; everything else as text."""
    import wandb

    name = pictures.name_in(value)
    if name is None:
        return value if value is None or isinstance(value, str | int | float) else str(value)
    path = pictures.find(folder, name)
    try:
        return path and wandb.Image(str(path))
    except (OSError, ValueError):  # damaged
        return None


def _alike(cells: list[Any]) -> list[Any]:
    """W&B refuses a column of several types."""
    kinds = {float if isinstance(cell, int) else type(cell) for cell in cells if cell is not None}
    return cells if len(kinds) < 2 else [cell if cell is None else str(cell) for cell in cells]
