"""Every shipped configuration loads, names what it needs, and trains two steps at toy width through the real engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configs
from pipeline.session import World
from tests import gloo, small_data
from tests.small_session import of_kind, records_of

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
TOY: dict[str, list[str]] = {
    "image_classification": ["task.model={embedding_size: 4, hidden_sizes: [4, 4], depths: [1, 1], layer_type: basic}"],
    "audio_classification": ["task.model={width: 4, layers: 1}", "task.mels=10"],
    "mnist.yaml": [
        "task.model={hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 2, patch_size: 7}"
    ],
    "diffusion": [
        "task.image_size=8",
        "task.model={block_out_channels: [4, 8], down_block_types: [DownBlock2D, AttnDownBlock2D],"
        " up_block_types: [AttnUpBlock2D, UpBlock2D], layers_per_block: 1, norm_num_groups: 2, attention_head_dim: 4}",
        "task.sampling_steps=2",
    ],
    "language_modeling": [
        "task.length=16",
        "task.model={hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2,"
        " num_key_value_heads: 1}",
    ],
    "lstm": ["task.length=16", "task.model={hidden_size: 16, num_hidden_layers: 1}"],
    "mamba2": [
        "task.length=16",
        "task.model={hidden_size: 16, num_hidden_layers: 1, num_heads: 4, head_dim: 8, state_size: 8, n_groups: 1}",
    ],
}


def two_steps(world: World, names: list[str], work: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of two steps of each configuration, on small data of the right kind."""
    made = {
        "image_classification": small_data.images(work / "images", count=256, size=28),
        "audio_classification": small_data.sounds(work / "sounds"),
        "diffusion": small_data.images(work / "small images", size=8),
        "language_modeling": small_data.rows(work / "rows"),
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        path = ROOT / "configs" / name
        shipped: Any = configs.load_resolved(path)
        section, decays = shipped.task, shipped.optim.schedule.decay
        task, data = section.name, made[section.name]
        toy = [
            *(TOY.get(name) or TOY.get(getattr(section, "architecture", None) or "") or TOY[task]),
            f"data.train={data}",
            f"data.evaluate={{test: {data}}}",
            "steps=2",
            f"optim.schedule={{name: {shipped.optim.schedule.name}, warmup: 1{', decay: 1' if decays else ''}}}",
        ]
        if task == "language_modeling":
            toy.append(f"task.tokenizer={data}/tokenizer.json")
        config = configs.load(path, [*toy, "evaluate.every=1", "checkpoint.every=2"])
        found[name] = records_of(world, config, work / "runs" / name)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return gloo.run(two_steps, 1, [path.name for path in SHIPPED], tmp_path_factory.mktemp("configs"))[0]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configuration_trains_two_steps(trained: dict[str, list[dict[str, Any]]], path: Path) -> None:
    records = trained[path.name]
    steps = of_kind(records, "step")
    assert [record["step"] for record in steps] == [0, 1]
    assert all(math.isfinite(record["metrics"]["train/loss"]) for record in steps)
    assert {record["kind"] for record in records} >= {"start", "step", "evaluation", "save", "end"}
    best = configs.load_resolved(path).evaluate.best
    assert any(f"eval/{best}" in record["metrics"] for record in of_kind(records, "evaluation"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_header_says_what_a_person_asks(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("command", "hardware", "time", "expect", "data"):
        assert any(line.startswith(f"#   {word} ") for line in header), word
