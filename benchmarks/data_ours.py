"""Millstream's side of data.py: the data of a run as it reads them, with digests compared and all else at its defaults.

Each function yields batches for ever (tokens, packed: uint16; images: uint8 [batch, height, width, 3]; raw_bytes: a
list of the bytes). `threads` stands for the peers' worker processes: decoders run beside each other in threads, or, as
the peers do it without workers, in the loop itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from data_content import CLASSES

from pipeline import config as configuration
from pipeline.data import index
from pipeline.data.loader import PLANNED_ROWS
from pipeline.data.reader import Sample
from pipeline.data.samples import Lookup, Samples
from pipeline.data.stream import Preparing, Stream
from pipeline.tasks import image_classification


class Rows:
    """A task for plain arrays: what the member holds is the row of the batch."""

    augments = False

    def prepare(self, sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        return {"data": sample["npy"]}

    def gather(self, samples: Samples) -> dict[str, np.ndarray] | None:
        stacked = samples.array("npy")
        return None if stacked is None else {"data": stacked}


def tokens(folder: Path, batch: int, threads: int) -> Iterator[Any]:
    """[batch, 1024], a row of each member."""
    return _batches(_stream(folder, batch, threads), Rows(), "data")


def packed(folder: Path, batch: int, threads: int) -> Iterator[Any]:
    """[batch, 512, 1024], whole members."""
    return _batches(_stream(folder, batch, threads), Rows(), "data")


def images64(folder: Path, batch: int, threads: int) -> Iterator[Any]:
    """Decoded as they are."""
    return _batches(_stream(folder, batch, threads), _images(64), "image")


def images224(folder: Path, batch: int, threads: int) -> Iterator[Any]:
    """A random piece of each, resized to 224."""
    return _batches(_stream(folder, batch, threads), _images(224, random_resized_crop=0.08), "image")


def raw_bytes(folder: Path, batch: int, threads: int) -> Iterator[list[Any]]:
    """The bytes of each image, not decoded."""
    stream, steps = _stream(folder, batch, threads), max(1, PLANNED_ROWS // batch)
    for first in count(0, steps):
        sources, _, numbers = stream.mixture.plan(range(first, first + steps), range(1), batch)
        lookup = Lookup(stream.datasets, sources.ravel(), numbers.ravel())
        for low in range(0, steps * batch, batch):
            views = Samples(lookup, low, low + batch).raw("jpg")
            assert views is not None  # every image has this field
            yield list(views)


def first_batch(folder: Path, batch: int, step: int) -> float:
    """Seconds from opening the data set to the first batch at any step."""
    task, name = (Rows(), "data") if folder.name == "tokens" else (_images(64), "image")
    _stream(folder, batch, 1)  # what is loaded once in a process
    began = time.perf_counter()
    next(_batches(_stream(folder, batch, 1), task, name, step))
    return time.perf_counter() - began


def index_members(folder: Path) -> Iterator[int]:
    """Members of a data set each time that it is indexed: headers read, digests computed, index written."""
    fields = 2 if "images" in folder.name else 1
    while True:
        yield index.build(folder / "tar").samples * fields


def _images(size: int, **options: Any) -> Preparing:
    """The project's own task, whose network nobody builds."""
    settings = {"classes": CLASSES, "image_size": size, "architecture": "resnet", **options}
    return image_classification.Task(image_classification.Config(**settings))


def _stream(folder: Path, batch: int, threads: int) -> Stream:
    """As a run opens its data; one micro batch per step."""
    task = {"name": "image_classification", "classes": CLASSES, "image_size": 64, "architecture": "resnet"}
    values = {
        "name": "benchmark",
        "steps": 1,
        "global_batch_size": batch,
        "micro_batch_size": batch,
        "data": {"train": str(folder / "tar"), "threads": threads},
        "task": task,
        "optim": {"name": "adamw", "lr": 1e-3},
        "cluster": {"workers": 1},
    }
    return Stream(configuration.Config.model_validate(values))


def _batches(stream: Stream, task: Preparing, name: str, start: int = 0) -> Iterator[Any]:
    with stream.loader(task, rank=0, world_size=1, first=start) as loader:
        for step in count(start):
            yield loader.step(step)[0].batch[name]
