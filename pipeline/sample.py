"""New samples from a trained network: texts, numbers and pictures.

    checkpoint -> bare network (checkpoint/weights.py) -> task.sample(...) -> rows -> samples.jsonl, PNG, grid.png

The same checkpoint, prompts, options and seed give the same samples on the same kind of processor with as many threads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline import task_file
from pipeline.checkpoint.weights import Loaded
from pipeline.errors import ConfigError, RunError
from pipeline.tasks import Row

TABLE, GRID = "samples.jsonl", "grid.png"
GAP = 2  # pixels between the pictures of a grid


def sample(
    loaded: Loaded,
    prompts: Sequence[str],
    *,
    count: int = 1,
    seed: int = 0,
    options: Mapping[str, str] | None = None,
) -> list[Row]:
    """`count` samples of a network (`weights.load`) for each prompt, one prompt after the other; `count` without any.

    Raises ConfigError when its task generates nothing, or refuses an option.
    """
    if not hasattr(loaded.task, "sample"):
        named = loaded.manifest.config["task"]["name"]
        able = [name for name in task_file.names() if hasattr(task_file.find(name).Task, "sample")]
        raise ConfigError(f"{loaded.path}: task {named} generates nothing; those that do: {', '.join(able)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return loaded.task.sample(loaded.module.to(device), list(prompts), count, generator, dict(options or {}))


def refuse_existing(folder: Path) -> None:
    """Raises RunError when `folder` is there: what it holds is never written over."""
    if folder.exists():
        raise RunError(f"{folder} is there already; name a new folder for the samples, or remove this one")


def write(folder: Path, rows: Sequence[Row], columns: int | None = None) -> list[Path]:
    """Write rows into the new folder `folder`; the files, samples.jsonl first: a JSON object a row, pictures by name.

    Pictures, uint8 [H, W, 1 or 3], become PNG files, and grid.png shows all of them, `columns` in a line (default: as
    many as make it square). Raises RunError when the folder is there or cannot be written.
    """
    refuse_existing(folder)
    lines, pictures, files = [], [], []
    try:
        folder.mkdir(parents=True)
        for number, row in enumerate(rows):
            told: dict[str, str | int | float] = {}
            for name, value in row.items():
                if isinstance(value, np.ndarray):
                    file = folder / f"{number:04d}-{name}.png"
                    _image(value).save(file)
                    pictures.append(value)
                    files.append(file)
                    told[name] = file.name
                else:
                    told[name] = value
            lines.append(json.dumps(told, ensure_ascii=False))
        (folder / TABLE).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        if pictures:
            _image(grid(pictures, columns)).save(folder / GRID)
            files.append(folder / GRID)
    except OSError as error:
        raise RunError(
            f"samples cannot be written to {folder}: {error.strerror or error}; choose another place"
        ) from error
    return [folder / TABLE, *files]


def grid(pictures: Sequence[np.ndarray], columns: int | None = None) -> np.ndarray:
    """Pictures uint8 [H, W, 1 or 3] beside each other on white, each in a cell of the largest size: uint8 [*, *, 3]."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    lines = -(-len(pictures) // columns)
    height, width = (max(picture.shape[axis] for picture in pictures) + GAP for axis in (0, 1))
    whole = np.full((lines * height + GAP, columns * width + GAP, 3), 255, dtype=np.uint8)
    for number, picture in enumerate(pictures):
        top, left = GAP + number // columns * height, GAP + number % columns * width
        whole[top : top + picture.shape[0], left : left + picture.shape[1]] = picture  # one channel becomes three
    return whole


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
