"""A small checkpoint whose content follows from (step, attempt), saved by the real protocol."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

from pipeline.checkpoint import format
from pipeline.checkpoint.format import FileDigest, FragmentPlace, Manifest


def save(
    root: Path,
    step: int,
    attempt: int = 1,
    newest_attempt: int | None = None,
    size: int = 1500,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """A small checkpoint of two files whose content follows from (step, attempt)."""
    staging = format.stage(root, step, attempt)
    files: dict[str, FileDigest] = {}
    for rank in range(2):
        name = f"rank-{rank:05d}.safetensors"
        content = random.Random(f"{step} {attempt} {rank}").randbytes(size)
        files[name] = format.write(staging / name, [content[:700], memoryview(content)[700:]])
    manifest = Manifest(
        step=step,
        attempt=attempt,
        world_size=2,
        zero_stage=1,
        dtype="fp32",
        parameters={"weight": (3, 5), "bias": (3,)},
        fragments=tuple(FragmentPlace(name, "weight|master|0", "weight", "master", 0, 8, "F32") for name in files),
        files=files,
        aliases={"head.weight": "weight"},
        scalars={"step": 3.0},
        config={"seed": 0, "optim": {"betas": [0.9, 0.999]}},
        environment={"threads": 1},
        journal={"attempt": attempt, "seq": 7 * step},
        metrics=dict(metrics or {"train/loss": 0.1 + step}),
    )
    return format.commit(root, staging, manifest, newest_attempt=lambda: newest_attempt or attempt)


def found_step(root: Path) -> int | None:
    found = format.find(root)
    return None if found is None else found.step
