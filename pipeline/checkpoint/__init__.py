"""Save and restore: engine -> fragments -> a committed folder, and back.

    save      capture (shards) -> every rank writes its file -> rank 0 checks coverage and commits (format)
    restore   rank 0 finds the newest folder that verifies -> every rank reads its slices (shards) -> notes

All ranks call both together and all raise when one of them fails, so that none waits for another. What it gives up: a
save blocks the training for as long as the disk takes; the folder must be one that all ranks see. This file imports
torch and DeepSpeed only inside the functions, as `checkpoint list` and `verify` need neither.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.checkpoint import format
from pipeline.checkpoint.format import FileDigest, FragmentPlace, Manifest
from pipeline.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.checkpoint.shards import Snapshot
    from pipeline.config import Config
    from pipeline.engine import Engine
    from pipeline.session import World

Result = TypeVar("Result")

# Sections and keys of the configuration that change no number of the training.
_WITHOUT_EFFECT = ("name", "runs", "checkpoint", "evaluate", "track", "guard", "cluster", "data")


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
    journal: Mapping[str, int] | None = None,
    newest_attempt: int | None = None,
) -> Path:
    """Commit a checkpoint of the state after `step` steps; returns its folder, on all ranks.

    `data` says which samples in which order; it is handed to `resume` at a restore. `newest_attempt`
    is the newest attempt known to own the run (default: this one); an older one is not committed. Raises
    CheckpointError with nothing changed but this checkpoint's absence.
    """
    from pipeline.checkpoint import fragments, shards

    snapshot = shards.capture(engine, buffers)
    needed = int(world.gather([snapshot.bytes]).sum())
    staging = _on_rank_0(world, lambda: format.stage(folder, step, attempt, needed))
    name = f"rank-{world.rank:05d}.safetensors"
    digest, failure = None, None
    try:
        digest = format.write(staging / name, fragments.file_chunks(snapshot.fragments))
    except CheckpointError as error:
        failure = str(error)
    written = world.gather_objects((name, digest, [fragment.place(name) for fragment in snapshot.fragments]))
    facts = {"step": step, "attempt": attempt, "data": data, "journal": journal or {}, "metrics": metrics or {}}
    newest = attempt if newest_attempt is None else newest_attempt
    try:
        shards.agree(world, failure)
        manifest = _manifest(engine, config, snapshot, written, facts)
        fragments.check_coverage(snapshot.parameters, snapshot.keys, manifest.fragments)
        return _on_rank_0(world, lambda: format.commit(folder, staging, manifest, newest_attempt=newest))
    except CheckpointError:
        if world.rank == 0:
            format.discard(staging)
        raise


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
    from pipeline.checkpoint import shards

    found = _on_rank_0(world, lambda: format.find(folder, step))
    if found is None:
        return None
    manifest = found.manifest
    try:
        followed = resume(found.step, manifest.data)
    except DataError as error:
        raise CheckpointError(f"{found.path} {error}") from error
    shards.restore(engine, buffers, manifest, found.path)
    notes = [*followed, *(f"damaged, passed over: {damage}" for damage in found.bad)]
    notes += [f"not bitwise: {line}" for line in _differences(manifest, engine, config)]
    return Restored(found.step, manifest, notes)


def _manifest(
    engine: Engine,
    config: Config,
    snapshot: Snapshot,
    written: list[tuple[str, FileDigest, list[FragmentPlace]]],
    facts: Mapping[str, Any],
) -> Manifest:
    """What all ranks have written, each (file, digest, fragments), with all that a restore compares."""
    return Manifest(
        step=facts["step"],
        attempt=facts["attempt"],
        world_size=engine.world.world_size,
        zero_stage=engine.stage,
        dtype=config.precision.dtype,
        parameters=snapshot.parameters,
        fragments=tuple(place for _, _, places in written for place in places),
        files={name: digest for name, digest, _ in written},
        aliases=snapshot.aliases,
        scalars=snapshot.scalars,
        config=config.model_dump(mode="json"),
        versions=_versions(),
        environment=_environment(engine),
        data=dict(facts["data"]),
        journal=dict(facts["journal"]),
        metrics=dict(facts["metrics"]),
    )


def _on_rank_0(world: World, action: Callable[[], Result]) -> Result:
    """Do it on rank 0 alone; its result, or its CheckpointError, on all ranks."""
    outcome: tuple[Result | None, str | None] = (None, None)
    if world.rank == 0:
        try:
            outcome = action(), None
        except (CheckpointError, OSError) as error:
            outcome = None, str(error)
    result, failure = world.gather_objects(outcome)[0]
    if failure is not None:
        raise CheckpointError(failure)
    return result


def _differences(manifest: Manifest, engine: Engine, config: Config) -> list[str]:
    """What ends bitwise equality with a run that was never interrupted, as "what old -> new"."""
    old = {
        "workers": manifest.world_size,
        "zero.stage": manifest.zero_stage,
        **manifest.environment,
        **manifest.versions,
    }
    new = {"workers": engine.world.world_size, "zero.stage": engine.stage, **_environment(engine), **_versions()}
    settings = (_leaves(values) for values in (manifest.config, config.model_dump(mode="json")))
    before, after = ({k: v for k, v in s.items() if k.split(".")[0] not in _WITHOUT_EFFECT} for s in settings)
    old, new = before | old, after | new
    return [f"{key} {old.get(key)} -> {new.get(key)}" for key in new | old if old.get(key) != new.get(key)]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def _versions() -> dict[str, str]:
    import torch

    from pipeline.engine import DEEPSPEED_VERSION

    return {"torch": torch.__version__, "deepspeed": DEEPSPEED_VERSION, "python": platform.python_version()}


def _environment(engine: Engine) -> dict[str, Any]:
    """What decides how sums are rounded: threads, vector instructions, processor, device."""
    import torch

    processor = platform.machine()
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        models = [
            line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if line.startswith("model name")
        ]
        processor = models[0] if models else processor
    cuda = engine.device.type == "cuda"
    return {
        "threads": torch.get_num_threads(),
        "processor": f"{processor}, {torch.backends.cpu.get_cpu_capability()}",
        "device": torch.cuda.get_device_name(engine.device) if cuda else "cpu",
    }
