"""What a checkpoint says of how it was made, and what of that is otherwise now.

A run that goes on under other conditions is right to rounding, but no longer bit for bit what it would have been. Each
such condition is kept in the manifest, compared at a restore, and told in one line. What it gives up: conditions that
nobody has thought of, such as another version of the C library.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.checkpoint.manifest import FileDigest, FragmentPlace, Manifest
from pipeline.engine import DEEPSPEED_VERSION, Engine
from pipeline.models import exported

if TYPE_CHECKING:
    from pipeline.checkpoint.shards import Snapshot
    from pipeline.config import Config

# Sections and keys of the configuration that change no number of the training.
_WITHOUT_EFFECT = ("name", "runs", "checkpoint", "evaluate", "track", "guard", "cluster", "data")


def describe(
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
        network=exported.describe(engine.module),
        versions=_versions(),
        environment=dict(facts["environment"]),
        data=dict(facts["data"]),
        metrics=dict(facts["metrics"]),
        guard=dict(facts["guard"]),
    )


def differences(manifest: Manifest, engine: Engine, config: Config) -> list[str]:
    """What ends bitwise equality with a run that was never interrupted, as "what old -> new"."""
    old = {
        "workers": manifest.world_size,
        "zero.stage": manifest.zero_stage,
        **manifest.environment,
        **manifest.versions,
    }
    new = {"workers": engine.world.world_size, "zero.stage": engine.stage, **environment(engine), **_versions()}
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
    return {"torch": torch.__version__, "deepspeed": DEEPSPEED_VERSION, "python": platform.python_version()}


def environment(engine: Engine) -> dict[str, Any]:
    """What decides how sums are rounded: threads, vector instructions, processor, device."""
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
