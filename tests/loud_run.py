"""A small run whose samples spoil chosen steps: each sample comes once, so a step is spoilt by naming its samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pipeline import config as configs
from pipeline.data.stream import Stream
from pipeline.run import Run
from pipeline.track import journal
from tests import small_data

STEPS = 24
TROUBLE = range(14, 17)  # one more than `max_skipped`
LEFT_OUT = (13, 17)  # and one on either side


def project(folder: Path, **changes: Any) -> Path:
    """A configuration in `folder` and what it needs: a step on either side of two steps in a row is left out."""
    pictures = small_data.images(folder / "pictures", count=16 * STEPS)
    data = {"train": str(pictures), "evaluate": {"test": str(pictures)}}
    guard = {"spike_window": 8, "spike_power": 4, "max_skipped": len(TROUBLE) - 1, "margin": 1}
    settings: dict[str, Any] = {"steps": STEPS, "data": data, "guard": guard} | changes
    return small_data.config(folder / "toy.yaml", {"name": "tests.poisoned_task"}, pictures, **settings)


def samples(path: Path, steps: range) -> list[int]:
    """The numbers of the samples of these steps."""
    data = Stream(configs.load(path))
    numbers = data.mixture.plan(steps, range(4), 4)[2]
    data.close()
    return sorted(numbers.ravel().tolist())


def ledger(records: list[dict[str, Any]]) -> dict[int, int]:
    """Step -> digest of the samples that it was trained on, of the steps that count. `attempt` is 1 where none is."""
    counted = journal.lineage({"attempt": 1, **record} for record in records)
    return {record["step"]: record["samples"] for record in counted if record["kind"] == "step"}


def same_end(one: Path, other: Path) -> bool:
    """Whether two run folders hold the same last checkpoint: tensors, data, what the guard has seen."""
    (left, right), states = (Run(folder).checkpoints()[-1] for folder in (one, other)), []
    assert left.manifest and right.manifest and left.step == right.step == STEPS
    for each in (left, right):
        files = sorted(each.path.glob("*.safetensors"))
        states.append({f"{file.name}:{name}": value for file in files for name, value in load_file(file).items()})
    assert len(states[0]) > 10 and states[0].keys() == states[1].keys()
    equal = all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    kept = [(m.data["skipped"], m.guard["losses"], m.guard["norms"]) for m in (left.manifest, right.manifest)]
    return equal and left.manifest.scalars == right.manifest.scalars and kept[0][1:] == kept[1][1:]
