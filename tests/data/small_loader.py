"""A small data set that says which sample is which, and loaders over it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.fill import Fill, MicroBatch
from pipeline.data.loader import Loader
from pipeline.data.mixture import Mixture, Source
from pipeline.data.pack.writer import Packing, silent, write_split
from pipeline.data.reader import Dataset, Sample
from pipeline.data.samples import Samples

SAMPLES = 103  # prime, so that nothing divides it
BLOCK = 7


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def write(folder: Path) -> Path:
    """Sample i has the key s<i> and holds [i, i * i]."""
    samples = ((f"s{i:04d}", {"npy": npy(np.array([i, i * i]))}) for i in range(SAMPLES))
    write_split(folder, samples, SAMPLES, 2000, Packing(min_shards=3), silent)
    return folder


def plain(sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    assert rng is None
    return {"x": sample["npy"], "key": np.array(int(sample.key[1:]))}


def noisy(sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    assert rng is not None
    return {"x": sample["npy"], "noise": rng.random(2)}


def gathered(samples: Samples) -> dict[str, np.ndarray] | None:
    """What `plain` gives, for all at once."""
    rows = samples.array("npy")
    return None if rows is None else {"x": rows, "key": rows[:, 0].copy()}


def order(micro_batch: int, micro_batches: int, samples: int = SAMPLES) -> Mixture:
    one = Source("train", "identity", samples, block=BLOCK)
    return Mixture.start([one], lanes=micro_batches, shuffle_blocks=4, seed=0, global_batch=micro_batch * micro_batches)


def loader(
    dataset: Dataset,
    prepare: Any = plain,
    *,
    micro_batch: int = 3,
    micro_batches: int = 4,
    seed: int | None = None,
    gather: Any = None,
    windows: int = 0,
    samples: int = SAMPLES,
    **changes: Any,
) -> Loader:
    options: dict[str, Any] = {"threads": 1, "prefetch": 2} | changes
    sizes: dict[str, int] = {"global_batch_size": micro_batch * micro_batches, "micro_batch_size": micro_batch}
    fill = Fill([dataset], prepare, gather, seed, blocks=[BLOCK], windows=windows)
    return Loader(fill, order(micro_batch, micro_batches, samples), **sizes, **options)


def content(micro: MicroBatch) -> tuple[int, tuple[int, ...], tuple[int, ...], dict[str, list]]:
    tensors = {name: tensor.tolist() for name, tensor in micro.batch.items()}
    return micro.index, tuple(micro.epochs.tolist()), tuple(micro.numbers.tolist()), tensors


def kept(batches: Iterator[MicroBatch]) -> list[MicroBatch]:
    """All of them, copied: a micro batch is good until the next one is asked for."""
    return [replace(micro, batch={name: value.clone() for name, value in micro.batch.items()}) for micro in batches]
