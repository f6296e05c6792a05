"""Exact evaluation over the ranks: every sample once, at any world size.

Micro batch i of the held-out set goes to rank i % R; the last one is simply shorter. When the micro batches do not
divide evenly, a rank without one repeats its last and throws the result away (ZeRO-3 needs all ranks in every
forward). Sums, not means, are added up, so the metric is that of the whole set.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import ema
from pipeline.config import Config
from pipeline.data.fill import Fill
from pipeline.data.loader import evaluation_batches
from pipeline.data.stream import open_set
from pipeline.engine import Engine
from pipeline.errors import ConfigError, DataError
from pipeline.session import World
from pipeline.tasks import Sums, Task


def evaluate(config: Config, task: Task, engine: Engine, world: World) -> dict[str, float]:
    """Score every held-out set of the configuration: {"eval/<set>/<metric>": value}, the same on all ranks.

    With a moving average of the weights also {"eval/<set>/ema/<metric>": value}, for the average.
    """
    metrics = _score_sets("", config, task, engine, world)
    if config.ema:
        with ema.averaged(engine):
            metrics |= _score_sets("ema/", config, task, engine, world)
    return metrics


def no_best(config: Config, metrics: Mapping[str, float]) -> ConfigError | None:
    """What is wrong when `evaluate.best` is not among an evaluation's metrics: no checkpoint would be the best."""
    best = config.evaluate.best
    if not best or not metrics or f"eval/{best}" in metrics:
        return None
    there = ", ".join(name.removeprefix("eval/") for name in metrics)
    return ConfigError(f"evaluate.best: {best!r} is not what an evaluation tells; set it to one of {there}")


def _score_sets(which: str, config: Config, task: Any, engine: Engine, world: World) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, folder in config.data.evaluate.items():
        sums = _score(folder, config, task, engine, world)
        found = means(sums, world.gather(flat(sums)))
        found |= task.derive(found) if hasattr(task, "derive") else {}
        metrics |= {f"eval/{name}/{which}{metric}": value for metric, value in found.items()}
    return metrics


def _score(folder: Path | str, config: Config, task: Task, engine: Engine, world: World) -> Sums:
    """This rank's share of one set, as sums over its samples."""
    engine.model.eval()
    total: Sums = {}
    data = config.data
    dataset = open_set(config, folder)
    try:
        fill = Fill([dataset], task.prepare, getattr(task, "gather", None))
        size = config.micro_batch_size
        batches = evaluation_batches(fill, size, world.rank, world.world_size, data.threads, data.processes)
        with torch.no_grad():
            for micro in batches:
                sums = task.score(engine.model, on_device(micro.batch, world.device))
                if not micro.filler:
                    add(total, sums)
    finally:
        dataset.close()
        engine.model.train()
    if not total:
        raise DataError(
            f"{folder} gave rank {world.rank} nothing to evaluate: the set has fewer samples than there are workers"
        )
    return total


def on_device(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch where the model is; from pinned memory the copy runs beside the computation."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def add(total: Sums, sums: Sums) -> None:
    """Add one micro batch's sums (numerator, denominator), in float64, without waiting for the device."""
    for name, (numerator, denominator) in sums.items():
        top, bottom = (torch.as_tensor(value).detach().double() for value in (numerator, denominator))
        had = total.get(name)
        total[name] = (had[0] + top, had[1] + bottom) if had else (top, bottom)


def flat(sums: Sums) -> list[float]:
    """Numerators and denominators in turn, on the host, to be gathered from all ranks; waits for the device."""
    return [float(value) for pair in sums.values() for value in pair]


def means(sums: Sums, everyone: np.ndarray) -> dict[str, float]:
    """The metrics of the whole from every rank's `flat(sums)` [R, 2 * metrics]. Sets without terms give nan."""
    totals = everyone.sum(axis=0).reshape(-1, 2)  # [metrics, (numerator, denominator)]
    return {
        name: float(top / bottom) if bottom else float("nan") for name, (top, bottom) in zip(sums, totals, strict=True)
    }
