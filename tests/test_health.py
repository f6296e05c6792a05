"""Looks at every layer in the real loop: the same at every ZeRO stage, without a trace in training, troubles named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configs
from pipeline.session import World
from tests import gloo, small_data
from tests.planted_task import ALIVE, UNITS
from tests.small_session import of_kind, records_of
from tests.test_train import GPT

STAGES = (0, 1, 2, 3)

pytestmark = pytest.mark.slow


def looks(world: World, pictures: Path, text: Path, runs: Path) -> dict[str, list[dict[str, Any]]]:
    """By case: this rank's records."""
    images = {f"images {stage}": (pictures, [f"zero.stage={stage}"]) for stage in STAGES}
    words = {f"text {stage}": (text, [f"zero.stage={stage}"]) for stage in (0, 3)}
    never = {
        f"text {stage} never": (text, [f"zero.stage={stage}", "track.health_every=null", "track.samples=0"])
        for stage in (0, 3)
    }
    planted = {
        "healthy": (pictures, []),
        "dead": (pictures, ["task.dead=true"]),
        "dead 3": (pictures, ["task.dead=true", "zero.stage=3"]),
        "loud": (pictures, ["task.loud=true", "zero.stage=2"]),
        "low": (pictures, ["precision.dtype=bf16", "zero.stage=1"]),
    }
    return {
        name: records_of(world, configs.load(path, changes), runs / name)
        for name, (path, changes) in (images | words | never | planted).items()
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("health")
    paths = []
    for name, shards, task in (
        ("pictures", small_data.images(folder / "shards"), {"name": "tests.planted_task"}),
        ("text", small_data.rows(folder / "rows"), GPT | {"tokenizer": str(folder / "rows" / "tokenizer.json")}),
    ):
        data: dict[str, Any] = {"train": str(shards)}
        rest = {"steps": 8, "checkpoint": {"every": 100}, "track": {"wandb": "off", "health_every": 2}}
        if name == "text":
            data, rest = data | {"evaluate": {"test": str(shards)}}, rest | {"evaluate": {"every": 4}}
        paths.append(small_data.config(folder / f"{name}.yaml", task, shards, name=name, data=data, **rest))
    return gloo.run(looks, 2, *paths, folder / "runs", timeout=240)[0]


def metrics_of(records: list[dict[str, Any]], look: int) -> dict[str, float]:
    return of_kind(records, "health")[look]["metrics"]


@pytest.mark.parametrize("kind", ["images", "text"])
def test_every_stage_sees_the_same(two: dict[str, list[dict[str, Any]]], kind: str) -> None:
    plain = metrics_of(two[f"{kind} 0"], 0)
    assert {name.rpartition("/")[2] for name in plain} >= {
        "grad_norm",
        "dead_units",
        "weight_norm",
        "update_ratio",
        "activation_mean",
        "activation_scale",
    }
    for name, records in two.items():
        if name.startswith(kind) and of_kind(records, "health"):
            found = metrics_of(records, 0)
            assert found.keys() == plain.keys()
            assert found == pytest.approx(plain, rel=2e-3, abs=1e-5), name


def test_gradient_norms_are_the_parts_of_the_whole(two: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("images 0", "images 1", "images 2", "images 3", "low", "text 3"):
        for record in of_kind(two[name], "health"):
            parts = [value for key, value in record["metrics"].items() if key.endswith("/grad_norm")]
            [step] = [each for each in of_kind(two[name], "step") if each["step"] == record["step"]]
            assert math.hypot(*parts) == pytest.approx(step["metrics"]["train/grad_norm"], rel=1e-3), name


@pytest.mark.parametrize("stage", [0, 3])
def test_looking_changes_nothing(two: dict[str, list[dict[str, Any]]], stage: int) -> None:
    """A network with dropout: losses and scores with and without looks, and samples shown, are equal to the bit."""
    curves = [[r["metrics"]["train/loss"] for r in of_kind(two[name], "step")] for name in _pair(stage)]
    assert curves[0] == curves[1] and len(curves[0]) == 8
    assert [len(of_kind(two[name], "health")) for name in _pair(stage)] == [4, 0]
    scores = [[r["metrics"] for r in of_kind(two[name], "evaluation")] for name in _pair(stage)]
    assert scores[0] == scores[1] and len(scores[0]) == 2
    assert [len(of_kind(two[name], "samples")) for name in _pair(stage)] == [2, 0]


def _pair(stage: int) -> tuple[str, str]:
    return f"text {stage}", f"text {stage} never"


def test_attention_is_between_one_place_and_all(two: dict[str, list[dict[str, Any]]]) -> None:
    """Fresh weights look at all earlier places alike: the mean of log(1), log(2), ..., log(16) at most."""
    entropies = [v for name, v in metrics_of(two["text 3"], 0).items() if name.endswith("attention_entropy")]
    alike = sum(math.log(n) for n in range(1, 17)) / 16
    assert len(entropies) == 2
    assert all(0.8 * alike < entropy <= alike + 1e-6 for entropy in entropies)


@pytest.mark.parametrize("case", ["dead", "dead 3"])
def test_a_dead_layer_is_named_once(two: dict[str, list[dict[str, Any]]], case: str) -> None:
    share = 1 - ALIVE / UNITS
    assert metrics_of(two[case], 0)["health/conv/dead_units"] == pytest.approx(share)
    [warning] = of_kind(two[case], "warning")
    assert warning["layer"] == "conv" and warning["step"] == 3  # the second look
    assert warning["message"] == f"conv: {share:.0%} of units dead since step 1"


def test_an_exploding_layer_is_named_at_once(two: dict[str, list[dict[str, Any]]]) -> None:
    warnings = [w for w in of_kind(two["loud"], "warning") if "scale" in w["message"]]
    assert [w["layer"] for w in warnings] == ["wide"] and warnings[0]["step"] == 1


def test_healthy_networks_give_no_warning(two: dict[str, list[dict[str, Any]]]) -> None:
    for name, records in two.items():
        if name.startswith(("images", "text", "healthy", "low")):
            assert not of_kind(records, "warning"), name
