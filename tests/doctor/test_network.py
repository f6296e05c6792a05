"""The network without its memory: the same parameters as the real one, and bytes that are counted while they live."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import config as configs
from pipeline.doctor import memory, network, samples
from pipeline.doctor.findings import Report
from tests.doctor import corpus

UNET = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus.make_good(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("base", ["words", "images"])
def test_it_has_the_parameters_of_the_real_one(base: str, good: Path, tmp_path: Path) -> None:
    config = configs.load(corpus.make({"id": "x", "base": base}, good, tmp_path / "it"))
    report = Report()
    found = network.look(config, report, samples.look(config, report))
    from pipeline import tasks

    real = tasks.find(config.task.name).Task(config.task).build_model()
    assert found and found.parameters == found.trained == sum(p.numel() for p in real.parameters())
    assert found.buffers == sum(buffer.numel() * buffer.element_size() for buffer in real.buffers())
    assert (found.activations and "loss" in found.metrics) or base == "words"
    assert report.findings == []


def test_an_evaluation_that_wants_numbers_hides_no_activations(good: Path, tmp_path: Path) -> None:
    task = {"name": "diffusion", "image_size": 8, "channels": 1, "classes": 4, "model": UNET}
    entry = {"id": "x", "base": "images", "set": {"task": task, "evaluate.best": "test/loss", "evaluate.mode": "min"}}
    config = configs.load(corpus.make(entry, good, tmp_path / "it"))
    report = Report()
    found = network.look(config, report, samples.look(config, report))
    assert found and found.activations and report.of("error", "note") == []


def test_larger_micro_batches_keep_more_alive(good: Path, tmp_path: Path) -> None:
    config = configs.load(corpus.make({"id": "x", "base": "images"}, good, tmp_path / "it"))
    looked = samples.look(config, Report())
    sizes = []
    for rows in (4, 8, 16):
        found = network.look(config.model_copy(update={"micro_batch_size": rows}), Report(), looked)
        assert found and found.activations
        sizes.append(found.activations)
    assert sizes[1] - sizes[0] == pytest.approx((sizes[2] - sizes[1]) / 2, rel=0.05)


def test_bytes_count_while_they_live() -> None:
    with network.Alive() as alive:
        one = torch.zeros(1000)
        view = one.view(10, 100)
        two = one + 1
        assert alive.now == 8000
        del two
        assert alive.now == 4000
        del one
        assert alive.now == 4000 and view.shape == (10, 100)
        del view
    assert alive.now == 0 and alive.peak == 8000


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_stage_shares_more(stage: int, good: Path, tmp_path: Path) -> None:
    config = configs.load(corpus.make({"id": "x", "base": "words", "set": {"zero": {"stage": stage}}}, good, tmp_path))
    it = network.Network("N", 10**9, 10**9, 10**6, (10**9,), 0, 0, ())
    alone, four = memory.need(config, it, 1), memory.need(config, it, 4)
    assert four.optimizer == alone.optimizer // (4 if stage else 1)
    assert four.gradients == alone.gradients // (4 if stage >= 2 else 1)
    assert (four.weights < alone.weights) == (stage == 3)


def test_a_shard_that_lacks_a_field_is_looked_into(good: Path, tmp_path: Path) -> None:
    change = {"folder": "images", "field": "cls", "drop": True, "only": [95]}
    config = configs.load(
        corpus.make({"id": "x", "base": "images", "data": [{"rewrite": change}]}, good, tmp_path / "it")
    )
    report = Report()
    prepared = samples.look(config, report)
    assert any("00095" in finding.problem.message for finding in report.of("error"))
    assert len(prepared) == config.micro_batch_size and isinstance(prepared[0]["image"], np.ndarray)
