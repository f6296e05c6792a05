"""Image classification through the whole loop: learnt by heart, gone on with to the bit, the same at other world sizes.

A vision transformer with all that is drawn at random (crops, RandAugment, colours, erasing, mixup, cutmix), a learning
rate for each layer, and a moving average; and the plain convnet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configs
from pipeline.checkpoint.diff import diff
from pipeline.checkpoint.format import MANIFEST, Manifest
from pipeline.session import World
from tests import gloo, small_data
from tests.small_session import of_kind, records_of

VIT = {
    "name": "image_classification",
    "classes": 4,
    "channels": 1,
    "image_size": 12,
    "architecture": "vit",
    "model": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
    | {"intermediate_size": 32},
}
DRAWN = {"crop": 1, "randaugment": {"count": 2, "magnitude": 5}, "colour": {"brightness": 0.2}, "erase": 0.3}
DRAWN |= {"mixup": 0.4, "cutmix": 1.0, "mix_probability": 0.8, "label_smoothing": 0.1, "center_crop": 0.9}
CONVNET = {key: VIT[key] for key in ("name", "classes", "channels", "image_size")} | {
    "convnet": {"depth": 8, "width": 8}
}
SAVED_AT, END = 5, 12
STAGES = {2: (0, 1, 2, 3), 3: (1, 2), 4: (0, 3)}  # of ZeRO, by the number of workers; three have unequal shares


def small(work: Path, task: dict[str, Any], **changes: Any) -> Path:
    optim = {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1, "schedule": {"name": "constant", "warmup": 2}}
    checkpoint = {"every": SAVED_AT, "keep": 9}
    values = {"optim": optim, "checkpoint": checkpoint, "steps": END, "zero": {"stage": 1}} | changes
    return small_data.config(work / "config.yaml", task, work / "squares", **values)


def drawing(work: Path, stage: int) -> configs.Config:
    optim = {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1, "layer_decay": 0.6, "schedule": {"warmup": 2}}
    path = small(work, VIT | DRAWN, optim=optim, ema={"decay": 0.5}, zero={"stage": stage})
    return configs.load(path, ["track.health_every=null"])


def by_heart(world: World, work: Path, task: dict[str, Any]) -> list[float]:
    """Losses of 150 steps on the same 16 images."""
    work.mkdir()
    small_data.images(work / "squares", count=16, shards=1)
    path = small(work, task, steps=150, checkpoint={"every": 1000})
    records = records_of(world, configs.load(path, ["micro_batch_size=8"]), work / "run")
    return [record["metrics"]["train/loss"] for record in of_kind(records, "step")]


def losses(records: list[dict[str, Any]]) -> dict[int, float]:
    return {record["step"]: record["metrics"]["train/loss"] for record in of_kind(records, "step")}


def gone_on(run: Path, other: Path) -> Path:
    """A run folder with the other's checkpoint of SAVED_AT, as a kill leaves it."""
    (other / "checkpoints").mkdir(parents=True)
    name = f"checkpoint-{SAVED_AT:08d}"
    (other / "checkpoints" / name).symlink_to(run / "checkpoints" / name, target_is_directory=True)
    return other


def alone(world: World, work: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        "vit": by_heart(world, work / "vit", VIT),
        "convnet": by_heart(world, work / "convnet", CONVNET),
    }
    small_data.images(work / "squares")
    config = drawing(work, 1)
    found["whole"] = losses(records_of(world, config, work / "whole"))
    found["on"] = losses(records_of(world, config, gone_on(work / "whole", work / "on"), attempt=2))
    folders = [work / run / "checkpoints" / f"checkpoint-{END:08d}" for run in ("whole", "on")]
    manifests = [Manifest.from_bytes((folder / MANIFEST).read_bytes()) for folder in folders]
    found["other"] = [each.parameter for each in diff(folders[0], folders[1], (manifests[0], manifests[1])).tensors]
    return found


def together(world: World, work: Path) -> dict[str, Any]:
    """On several ranks: the same run at each stage, and going on with what one rank has saved."""
    found: dict[str, Any] = {}
    for stage in STAGES[world.world_size]:
        own = work / f"{world.world_size} workers, stage {stage}"
        if world.rank == 0:
            own.mkdir()
            (own / "squares").symlink_to(work / "squares", target_is_directory=True)
            gone_on(work / "whole", own / "on")
            drawing(own, stage)
        world.barrier()
        config = configs.load(own / "config.yaml", ["track.health_every=null"])
        found[f"{stage}"] = losses(records_of(world, config, own / "run"))
        found[f"{stage} on"] = losses(records_of(world, config, own / "on", attempt=2))
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learning")


@pytest.fixture(scope="module")
def one(work: Path) -> dict[str, Any]:
    return gloo.run(alone, 1, work, timeout=240)[0]


@pytest.fixture(scope="module", params=STAGES)
def several(request: pytest.FixtureRequest, work: Path, one: dict[str, Any]) -> dict[str, Any]:
    return gloo.run(together, request.param, work, timeout=240)[0]


@pytest.mark.parametrize("network", ["vit", "convnet"])
def test_one_batch_is_learnt_by_heart(one: dict[str, Any], network: str) -> None:
    assert one[network][-1] < 0.01 * one[network][0]


def test_it_goes_on_to_the_bit_with_everything_drawn(one: dict[str, Any]) -> None:
    assert list(one["whole"]) == list(range(END)) and list(one["on"]) == list(range(SAVED_AT, END))
    assert one["on"] == {step: one["whole"][step] for step in one["on"]}
    assert one["other"] == []  # weights, moments and the average


@pytest.mark.slow
def test_several_workers_draw_the_same_at_every_stage(one: dict[str, Any], several: dict[str, Any]) -> None:
    """Other draws would move the loss in its first digits."""
    for name, losses in several.items():
        assert losses == pytest.approx(one["on" if name.endswith(" on") else "whole"], rel=1e-6), name
