"""Save and restore: engine -> fragments -> a committed folder, and back.

    save      capture (shards) -> every rank writes its file -> rank 0 checks coverage and commits (format); saver.py
    restore   rank 0 finds the newest folder that verifies -> every rank reads its slices (shards) -> notes

All ranks call both together and all raise when one of them fails, so that none waits for another. What it gives up: the
folder must be one that all ranks see. This file imports torch and DeepSpeed only inside the functions, as `checkpoint
list` and `verify` need neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint import format
from pipeline.checkpoint.format import Manifest
from pipeline.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.config import Config
    from pipeline.engine import Engine
    from pipeline.session import World


@dataclass(frozen=True)
class Restored:
    """What the run goes on from. `notes`: a line for each thing to know, such as "not bitwise: workers 2 -> 1"."""

    step: int
    manifest: Manifest
    notes: list[str]


def save(
    engine: Engine,
    world: World,
    folder: Path,
    *,
    step: int,
    attempt: int,
    config: Config,
    data: Mapping[str, Any],
    buffers: Mapping[str, Tensor],
    metrics: Mapping[str, float] | None = None,
    newest_attempt: int | None = None,
) -> Path:
    """Commit a checkpoint of the state after `step` steps and wait for it; returns its folder, on all ranks.

    `data` says which samples in which order; it is handed to `resume` at a restore. `newest_attempt` is the newest
    attempt known to own the run (default: this one); an older one is not committed. Raises CheckpointError with nothing
    changed but this checkpoint's absence. A run that trains on meanwhile holds a `saver.Saver`.
    """
    from pipeline.checkpoint.saver import Saver

    newest = attempt if newest_attempt is None else newest_attempt
    saver = Saver(engine, world, folder, config, attempt=attempt, newest_attempt=lambda: newest, copies=False)
    saved = saver.begin(step, data=data, buffers=buffers, metrics=metrics) or saver.finish()
    saver.close()
    assert saved is not None
    if saved.path is None:
        raise CheckpointError(saved.failure or "")
    return saved.path


def restore(
    engine: Engine,
    world: World,
    folder: Path,
    *,
    config: Config,
    resume: Callable[[int, Mapping[str, Any]], list[str]],
    buffers: Mapping[str, Tensor],
    step: int | None = None,
) -> Restored | None:
    """Bring engine and `buffers` to the newest good checkpoint (or that of `step`); None when the folder holds none.

    Any number of ranks, any ZeRO stage, any precision. `resume` is given the step and what the checkpoint keeps of the
    data; it raises DataError when those of now do not follow from them, or returns notes. Raises CheckpointError when
    there are only damaged ones, when model or optimizer are not those of the checkpoint, and for what `resume` raised.
    """
    from pipeline.checkpoint import facts, shards

    found = shards.on_rank_0(world, lambda: format.find(folder, step))
    if found is None:
        return None
    manifest = found.manifest
    try:
        followed = resume(found.step, manifest.data)
    except DataError as error:
        raise CheckpointError(f"{found.path} {error}") from error
    shards.restore(engine, buffers, manifest, found.path)
    notes = [*followed, *(f"damaged, passed over: {damage}" for damage in found.bad)]
    notes += [f"not bitwise: {line}" for line in facts.differences(manifest, engine, config)]
    return Restored(found.step, manifest, notes)
