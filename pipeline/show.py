"""Samples to look at: what the network makes of the first few of each held-out set, in pictures, words and numbers.

    first samples of a set -> task.show(model, batch) -> rows -> the journal; their pictures -> runs/<name>/samples/

Every rank computes the same rows from the same samples, and rank 0 keeps them: so they do not depend on the number of
workers, and all ranks call the network alike, as ZeRO-3 needs. It happens after the scores have been added up, so these
are bitwise what they are without.

Pictures are files, a few kB each, and the journal has their names: it is read whole by many. What it gives up: a moving
average of the weights is not shown; pictures stay for as long as the run's folder does.
"""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.config import Config
from pipeline.data.fill import Fill
from pipeline.data.loader import evaluation_batches
from pipeline.data.stream import open_set
from pipeline.engine import Engine
from pipeline.evaluate import on_device
from pipeline.session import Session
from pipeline.tasks import Row, Task
from pipeline.track.pictures import FOLDER

SIDE = 128  # pixels; larger pictures are made smaller
LOSSLESS = 64  # pixels; up to here pictures are PNG, where every pixel counts, and JPEG above


def show(config: Config, task: Task, engine: Engine) -> dict[str, list[Row]]:
    """Rows of the first `track.samples` samples of each held-out set, the same on all ranks; none when the task has no
    `show`.
    """
    if not config.track.samples or not hasattr(task, "show"):
        return {}
    return {name: _rows(folder, config, task, engine) for name, folder in config.data.evaluate.items()}


def keep(session: Session, step: int, shown: dict[str, list[Row]]) -> None:
    """Write the pictures and record all of it. A disk that takes no more of them is a warning."""
    sets: dict[str, list[dict[str, Any]]] = {}
    failed: OSError | None = None
    for name, rows in shown.items():
        sets[name] = []
        for number, row in enumerate(rows):
            pictures = {column: value for column, value in row.items() if isinstance(value, np.ndarray)}
            try:
                files = {
                    column: {"picture": _write(session.run / FOLDER, f"{step:08d}/{name}-{number}-{place}", pixels)}
                    for place, (column, pixels) in enumerate(pictures.items())
                }
            except OSError as error:
                failed, files = error, dict.fromkeys(pictures)
            sets[name].append({**row, **files})
    if failed:
        session.record("warning", step=step, message=f"pictures of samples were not written: {failed}")
    session.record("samples", step=step, sets=sets)


def _rows(folder: Path | str, config: Config, task: Any, engine: Engine) -> list[Row]:
    """What the task shows of one set. Micro batches are no larger than those of training, so they fit where it fits."""
    count = config.track.samples
    size = min(config.micro_batch_size, count)
    rows: list[Row] = []
    dataset = open_set(config, folder)
    engine.model.eval()
    try:
        batches = evaluation_batches(Fill([dataset], task.prepare, getattr(task, "gather", None)), size)
        # another size of batch would be compiled anew
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), closing(batches):
            for micro in islice(batches, -(-count // size)):
                batch = {name: tensor[: count - len(rows)] for name, tensor in micro.batch.items()}
                told = task.show(engine.model, on_device(batch, engine.device))
                rows += [{name: _own(value) for name, value in row.items()} for row in told]
    finally:
        dataset.close()
        engine.model.train()
    return rows


def _own(value: Any) -> Any:
    """Pixels may lie in memory that the next micro batch takes."""
    return value.copy() if isinstance(value, np.ndarray) else value


def _write(folder: Path, name: str, pixels: np.ndarray) -> str:
    """Write a picture, uint8 [H, W, 1 or 3]; its name in the folder. Raises OSError."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((SIDE, SIDE))
    file = f"{name}.png" if max(image.size) <= LOSSLESS else f"{name}.jpg"
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    image.save(folder / file, quality=85)  # of JPEG; PNG has none
    return file
