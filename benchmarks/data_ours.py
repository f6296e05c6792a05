"""Millstream's side of data.py: its loader over each content, with digests compared, and everything else as in a run.

Each function yields batches for ever (tokens, packed: uint16, images: uint8 [batch, height, width, 3], raw_bytes: a
list of the bytes). `threads` stands for the peers' worker processes: decoders run beside each other in threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import Data
from pipeline.data import augment
from pipeline.data.index import scan
from pipeline.data.loader import Loader
from pipeline.data.order import Order, block_samples
from pipeline.data.reader import Dataset, Sample, open_dataset

SEED = 7
CROP = 224


def tokens(folder: Path, batch: int, threads: int) -> Iterator[Any]:
    """[batch, 1024], a row of each member."""
    return _batches(folder, batch, threads, _row)


def packed(folder: Path, batch: int, threads: int) -> Iterator[Any]:
    """[batch, 512, 1024], whole members."""
    return _batches(folder, batch, threads, _row)


def images64(folder: Path, batch: int, threads: int) -> Iterator[Any]:
    """Decoded as they are."""
    return _batches(folder, batch, threads, _image)


def images224(folder: Path, batch: int, threads: int) -> Iterator[Any]:
    """A random piece of each, resized to 224."""
    return _batches(folder, batch, threads, _cropped, augments=True)


def raw_bytes(folder: Path, batch: int, threads: int) -> Iterator[list[Any]]:
    """The bytes of each image, not decoded."""
    with open_dataset(folder / "tar") as dataset:
        order = _order(dataset)
        for step in count():
            _, numbers = order.rows(step, 0, batch, batch)
            yield [dataset.sample(number).raw("jpg") for number in numbers.tolist()]


def first_batch(folder: Path, batch: int, step: int, field: str) -> float:
    """Seconds from opening the data set to the first batch at any step."""
    began = time.perf_counter()
    next(_batches(folder, batch, 1, _row if field == "npy" else _image, start=step))
    return time.perf_counter() - began


def index_members(folder: Path) -> Iterator[int]:
    """Members of each shard as its headers are read, digests computed and its segment written; over and over."""
    fields = 2 if "images" in folder.name else 1
    while True:
        yield from (shard.samples * fields for shard in scan(folder / "tar"))


def _row(sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    return {"data": sample["npy"]}


def _image(sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    return {"data": sample["jpg"], "label": np.array(sample["cls"], np.int64)}


def _cropped(sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    assert rng is not None
    image = augment.random_resized_crop(sample["jpg"], CROP, rng)
    return {"data": image, "label": np.array(sample["cls"], np.int64)}


def _order(dataset: Dataset) -> Order:
    """As a run without a word about `data` in its configuration has it, with one micro batch per step."""
    defaults = {name: Data.model_fields[name].default for name in ("block_bytes", "shuffle_blocks")}
    block = block_samples(len(dataset), dataset.index.bytes, defaults["block_bytes"])
    return Order(len(dataset), block, lanes=1, shuffle_blocks=defaults["shuffle_blocks"], seed=SEED)


def _batches(
    folder: Path,
    batch: int,
    threads: int,
    prepare: Callable[[Sample, np.random.Generator | None], dict[str, np.ndarray]],
    *,
    augments: bool = False,
    start: int = 0,
) -> Iterator[Any]:
    with (
        open_dataset(folder / "tar") as dataset,
        Loader(
            dataset,
            _order(dataset),
            prepare,
            augments=augments,
            seed=SEED,
            global_batch_size=batch,
            micro_batch_size=batch,
            threads=threads,
            start_step=start,
        ) as loader,
    ):
        for step in count(start):
            yield loader.step(step)[0].batch["data"]
