"""Save and restore: engine -> fragments -> a committed folder, and back.

    save      capture (shards) -> every rank writes its file -> rank 0 checks coverage and commits (format); saver.py
    restore   rank 0 finds the newest folder that verifies -> every rank reads its slices (shards) -> notes
    uploads   what is committed -> a second home (remote), from which a restore fetches what is missing here

All ranks call both together and all raise when one of them fails, so that none waits for another. What it gives up: the
folder must be one that all ranks see (probe.py finds out). This file imports torch and DeepSpeed only inside the
functions, as `checkpoint list` and `verify` need neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint import format
from pipeline.checkpoint.format import Manifest
from pipeline.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.checkpoint.remote import Remote
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
    try:
        saved = saver.begin(step, data=data, buffers=buffers, metrics=metrics) or saver.finish()
    finally:
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
    home: Remote | None = None,
) -> Restored | None:
    """Bring engine and `buffers` to the newest good checkpoint (or that of `step`); None when there is none.
    One that only the second home (`home`, on rank 0) holds whole is fetched into the folder first, and named.

    Any number of ranks, any ZeRO stage, any precision. `resume` is given the step and what the checkpoint keeps of the
    data; it raises DataError when those of now do not follow from them, or returns notes. Raises CheckpointError when
    there are only damaged ones, when the second home would have to be asked and cannot be, when model or optimizer are
    not those of the checkpoint, and for what `resume` raised.
    """
    from pipeline.checkpoint import facts, shards

    found = _found(world, folder, step, home)
    if found is None:
        return None
    manifest = found.manifest
    try:
        followed = resume(found.step, manifest.data)
    except DataError as error:
        raise CheckpointError(f"{found.path} {error}") from error
    begun = shards.restore(engine, buffers, manifest, found.path)
    notes = [*followed, *found.notes, *(f"damaged, passed over: {damage}" for damage in found.bad)]
    notes += [f"not bitwise: {line}" for line in (*begun, *facts.differences(manifest, engine, config))]
    return Restored(found.step, manifest, notes)


def _found(world: World, folder: Path, step: int | None, home: Remote | None) -> format.Found | None:
    """What `format.find` finds on rank 0, to all ranks; it may read and fetch for longer than ranks wait at once."""
    from pipeline.checkpoint import shards

    with ThreadPoolExecutor(1, thread_name_prefix="find") as thread:
        job = thread.submit(format.find, folder, step, home) if world.rank == 0 else None
        while world.gather([bool(job and wait([job], timeout=1.0).not_done)])[0, 0]:
            pass
        return shards.on_rank_0(world, lambda: job.result() if job else None)
