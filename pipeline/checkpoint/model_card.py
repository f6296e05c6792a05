"""What stands beside the weights in an exported folder: settings for its library, and a page of where it is from.

The network's own settings come from the network, those of its input (tokenizer, image processor) from the task. What it
gives up: a task that cannot be loaded here costs its files, not the export; a note says so.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import ValidationError

from pipeline import task_file
from pipeline.checkpoint import format
from pipeline.checkpoint.export_plan import Plan
from pipeline.checkpoint.manifest import Manifest
from pipeline.errors import MillstreamError
from pipeline.models import exported

PAGE = """\
---
library_name: {library}
tags: [millstream]
---

# {run}, after {step:,} steps

{first}    from {library} import {opener}
    {model} = {opener}.from_pretrained("{folder}")

| | |
|---|---|
| network | {network}, {parameters:,} parameters |
| weights | {weights}, rounded once to {dtype} |
| run | {run}, step {step}, attempt {attempt}, {workers} workers, ZeRO stage {stage}, trained in {trained} |
| task | {task} |
| scores | {scores} |
| configuration, sha256 | {config} |
| checkpoint, sha256 of its manifest (which holds those of its files) | {manifest} |
| versions | {versions} |
"""


def write_beside(plan: Plan, path: Path, manifest: Manifest, staging: Path, folder: Path) -> tuple[str, list[str]]:
    """Write all but the tensors of an export of the checkpoint `path` into `staging`.

    Returns the class that opens it, and a line for what is left out.
    """
    dtype = str(plan.dtype).removeprefix("torch.")
    if plan.index is not None:
        index = staging / f"{exported.weights_name(plan.module)}.safetensors.index.json"
        index.write_text(json.dumps(plan.index, indent=2) + "\n", encoding="utf-8")
    exported.write_settings(plan.module, staging, dtype)
    notes = _write_task_settings(manifest, staging)
    if needs := exported.needs(plan.module):
        notes.append(f"this network is Millstream's own: `import {needs}` before transformers opens it")
    opener = exported.opener(plan.module, staging)
    configuration = json.dumps(manifest.config, sort_keys=True).encode()
    page = PAGE.format(
        run=manifest.config.get("name", "a run"),
        step=manifest.step,
        library=exported.package(plan.module),
        opener=opener,
        first=f"    import {needs}\n" if needs else "",
        model="pipeline" if opener.endswith("Pipeline") else "model",
        folder=folder.name,
        network=type(plan.module).__name__,
        parameters=sum(parameter.numel() for parameter in plan.module.parameters()),
        weights="running averages (EMA) of the fp32 masters" if plan.state == "ema" else "fp32 masters",
        dtype=dtype,
        attempt=manifest.attempt,
        workers=manifest.world_size,
        stage=manifest.zero_stage,
        trained=manifest.dtype,
        task=manifest.config.get("task", {}).get("name", "unknown"),
        scores=", ".join(f"{name} {value:.4g}" for name, value in manifest.metrics.items()) or "none were kept",
        config=hashlib.sha256(configuration).hexdigest(),
        manifest=hashlib.sha256((path / format.MANIFEST).read_bytes()).hexdigest(),
        versions=", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    )
    (staging / "README.md").write_text(page, encoding="utf-8")
    return opener, notes


def _write_task_settings(manifest: Manifest, staging: Path) -> list[str]:
    section = manifest.config.get("task")
    if not section:
        return []
    try:
        config = task_file.validate(section)
        task = task_file.find(section["name"]).Task(config)
        if hasattr(task, "write_settings"):
            task.write_settings(staging)
    except (MillstreamError, ValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        return [
            f"without the settings of its input (tokenizer, image processor), as the task cannot be loaded: {reason}"
        ]
    return []
