"""What holds for every family, tried on the shipped configurations made tiny: the same losses at any number of workers
and ZeRO stage, resumed to the bit, bad samples named and replaced, one batch learnt by heart.

Each world size is one start of processes, at a ZeRO stage of its own.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import config as configs
from pipeline import tasks
from pipeline.checkpoint.diff import diff
from pipeline.checkpoint.format import list_checkpoints
from pipeline.data.reader import open_dataset
from pipeline.session import World
from tests import gloo, small_data
from tests.small_session import of_kind, records_of
from tests.test_configs import ROOT, TOY

pytestmark = pytest.mark.slow

FAMILIES = {
    "image": "digits.yaml",
    "language": "stdlib.yaml",
    "audio": "speech.yaml",
    "diffusion": "diffusion-digits.yaml",
}
STEPS, SAVED_AT = 8, 4
STAGES = {1: 0, 2: 1, 3: 2, 4: 3}  # of ZeRO, by the number of workers
BAD = (5, 11)  # samples with a flipped bit
PROMISED = dict.fromkeys(FAMILIES, 1e-6) | {"image": 1e-3}  # relative, of a loss: a ReLU can flip


def make_data(family: str, folder: Path) -> Path:
    """48 samples of the right kind."""
    match family:
        case "language":
            return small_data.rows(folder, count=48)
        case "audio":
            return small_data.sounds(folder)
        case _:
            return small_data.images(folder, count=48, size=28 if family == "image" else 8)


def settings(family: str, data: Path, stage: int = 1) -> list[str]:
    """Overrides that make a family's shipped configuration tiny; the rest is as shipped."""
    path = ROOT / "configs" / FAMILIES[family]
    found = [
        *TOY[configs.load_resolved(path).task.name],
        f"data.train={data}",
        "data.evaluate={}",
        "evaluate={}",
        f"steps={STEPS}",
        "global_batch_size=16",
        "micro_batch_size=4",
        "optim.schedule.warmup=2",
        "precision.dtype=fp32",
        f"zero.stage={stage}",
        f"checkpoint.every={SAVED_AT}",
        f"checkpoint.keep_every={SAVED_AT}",
    ]
    if family == "language":
        found.append(f"task.tokenizer={data}/tokenizer.json")
    return found


def train_all(world: World, data: dict[str, Path], runs: Path) -> dict[str, dict[str, Any]]:
    """Of every family: the losses of a run, and of one that goes on from its middle, and what is not as in it."""
    found: dict[str, dict[str, Any]] = {}
    for family, folder in data.items():
        stage = STAGES[world.world_size]
        config = configs.load(ROOT / "configs" / FAMILIES[family], settings(family, folder, stage))
        whole, again = runs / f"{family}-{world.world_size}", runs / f"{family}-{world.world_size}-again"
        steps = of_kind(records_of(world, config, whole), "step")
        if world.rank == 0:
            name = f"checkpoint-{SAVED_AT:08d}"
            shutil.copytree(whole / "checkpoints" / name, again / "checkpoints" / name)
        world.barrier()
        resumed = of_kind(records_of(world, config, again, attempt=2), "step")
        found[family] = {"steps": steps, "resumed": resumed}
        if world.rank == 0:
            found[family]["differs"] = differences(whole / "checkpoints", again / "checkpoints")
    return found


def differences(one: Path, other: Path) -> list[str]:
    """Tensors and other state that are not the same to the bit in the last two checkpoints."""
    a, b = (list_checkpoints(folder)[-1] for folder in (one, other))
    assert a.manifest and b.manifest and a.manifest.step == b.manifest.step == STEPS
    found = diff(a.path, b.path, (a.manifest, b.manifest))
    return [f"{each.key} of {each.parameter}" for each in found.tensors] + [fact.name for fact in found.state]


def train_damaged(world: World, data: dict[str, Path], runs: Path) -> dict[str, list[dict[str, Any]]]:
    """What is recorded of the bad samples of every family in an epoch."""
    changed = ["data.bad_samples=substitute", "steps=3"]
    found = {}
    for family, folder in data.items():
        config = configs.load(ROOT / "configs" / FAMILIES[family], [*settings(family, folder), *changed])
        found[family] = of_kind(records_of(world, config, runs / f"{family}-damaged"), "substitute")
    return found


def with_bad_samples(folder: Path, copy: Path) -> Path:
    """The data set with a flipped bit in the first field of two samples."""
    shutil.copytree(folder, copy)
    with open_dataset(folder) as dataset:
        for number in BAD:
            sample = dataset.sample(number)
            place = next(iter(sample._fields.values()))
            with (copy / Path(sample._shard.path).name).open("r+b") as tar:
                tar.seek(place.offset + place.length // 2)
                [byte] = tar.read(1)
                tar.seek(-1, 1)
                tar.write(bytes([byte ^ 4]))
    return copy


def on_one(world: World, data: dict[str, Path], bad: dict[str, Path], runs: Path) -> tuple[Any, Any]:
    return train_all(world, data, runs), train_damaged(world, bad, runs)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {family: make_data(family, folder / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def trained(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """By the number of workers; 0: what was recorded of bad samples."""
    runs = tmp_path_factory.mktemp("runs")
    bad = {family: with_bad_samples(folder, runs / f"{family}-data") for family, folder in data.items()}
    one, substitutes = gloo.run(on_one, 1, data, bad, runs, timeout=300)[0]
    more = {count: gloo.run(train_all, count, data, runs, timeout=300)[0] for count in (2, 3, 4)}
    return {0: substitutes, 1: one, **more}


@pytest.mark.parametrize("family", FAMILIES)
def test_workers_and_stages_change_nothing(trained: dict[int, Any], family: str) -> None:
    alone = trained[1][family]["steps"]
    assert [record["step"] for record in alone] == list(range(STEPS))
    for count in (2, 3, 4):
        together = trained[count][family]["steps"]
        for one, other in zip(alone, together, strict=True):
            assert other["samples"] == one["samples"] and other["metrics"]["optim/lr"] == one["metrics"]["optim/lr"]
            assert other["metrics"]["train/loss"] == pytest.approx(one["metrics"]["train/loss"], rel=PROMISED[family])


@pytest.mark.parametrize("workers", STAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_resume_is_bitwise(trained: dict[int, Any], family: str, workers: int) -> None:
    """At every ZeRO stage, each with another number of workers: losses, and every tensor of the last checkpoint."""
    found = trained[workers][family]
    losses = [record["metrics"]["train/loss"] for record in found["steps"]]
    assert [record["step"] for record in found["resumed"]] == list(range(SAVED_AT, STEPS))
    assert [record["metrics"]["train/loss"] for record in found["resumed"]] == losses[SAVED_AT:]
    assert found["differs"] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_bad_samples_are_named_and_replaced(trained: dict[int, Any], family: str) -> None:
    records = trained[0][family]
    assert sorted(record["number"] for record in records) == list(BAD)
    for record in records:
        assert record["substitute"] not in BAD and f"sample {record['number']}" in record["reason"]
        assert "not those that were indexed" in record["reason"] and f"{record['number']:05d}." in record["reason"]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_batch_is_learnt_by_heart(data: dict[str, Path], family: str) -> None:
    """Below 1 % of its first loss within 300 steps; of diffusion with noise and time steps held. Nothing augments."""
    path = ROOT / "configs" / FAMILIES[family]
    wider = {
        "image": "task.model={embedding_size: 16, hidden_sizes: [16, 32], depths: [1, 1], layer_type: basic}",
        "audio": "task.model={width: 32, layers: 1}",
        "diffusion": "task.model={block_out_channels: [16, 32], down_block_types: [DownBlock2D, DownBlock2D],"
        " up_block_types: [UpBlock2D, UpBlock2D], layers_per_block: 1, norm_num_groups: 4}",
    }
    toy = [*settings(family, data[family]), *([wider[family]] if family in wider else [])]
    config = configs.load(path, toy)
    task = tasks.find(config.task.name).Task(config.task)
    with open_dataset(data[family]) as dataset:
        rows = [task.prepare(dataset.sample(number), None) for number in range(8)]
    batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    torch.manual_seed(0)
    model = task.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=300)
    losses = []
    for _ in range(300):
        torch.manual_seed(1)
        loss, _ = task.loss(model, batch)
        optimizer.zero_grad()
        (loss / task.weight(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if losses[-1] < 0.01 * losses[0]:
            break
    assert losses[-1] < 0.01 * losses[0], losses[:: len(losses) // 10]
