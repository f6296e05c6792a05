"""Steps that are not finite, or empty, in the real loop: named, skipped or ended by the policy, alike on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configs
from pipeline import replicas
from pipeline.errors import RunError
from pipeline.run import Run
from pipeline.session import World
from tests import gloo, small_data, small_run
from tests.small_session import of_kind, records_of

TASK = {"name": "tests.poisoned_task", "poison": [5]}


def policies(world: World, path: Path, runs: Path) -> dict[str, Any]:
    """By case: this rank's records, or the error that ended it."""
    cases = {
        "skip 0": "zero.stage=0",
        "skip 3": "zero.stage=3",
        "stop": "guard.non_finite=stop",
        "mute": "task.mute=true",
    }
    found: dict[str, Any] = {}
    for name, change in cases.items():
        try:
            found[name] = records_of(world, configs.load(path, [change]), runs / name)
        except RunError as error:
            found[name] = str(error)
    for name, change in {"quiet": "task.poison=[]", "once": f"task.once={path.parent}/once"}.items():
        if name == "once" and world.rank == 1:
            (path.parent / "once").touch()
        world.barrier()
        found[name] = records_of(world, configs.load(path, ["task.poison=[]", change]), runs / name)
    found["diverged"] = diverged(world)
    return found


def diverged(world: World) -> list[str]:
    """What is said of a rank whose weights are others, at every stage that has whole ones, and of good ones."""
    from pipeline import replicas

    said = []
    for stage in (0, 1, 2):
        settings = small_run.config("words", stage)
        engine = small_run.start(world, settings, "words")
        replicas.compare(engine, world, 7)
        if world.rank == 1:
            next(iter(engine.module.parameters())).data.view(-1)[3].add_(1e-3)
        with pytest.raises(replicas.Diverged) as error:
            replicas.compare(engine, world, 7)
        said.append(str(error.value))
        engine.close()
    return said


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("guard")
    pictures = small_data.images(folder / "pictures")
    data = {"train": str(pictures), "evaluate": {"test": str(pictures)}}
    path = small_data.config(folder / "toy.yaml", TASK, pictures, data=data, steps=12, checkpoint={"every": 100})
    return gloo.run(policies, 2, path, folder / "runs")


@pytest.mark.parametrize("stage", [0, 3])
def test_a_poisoned_step_is_skipped_and_its_samples_named(two: list[dict[str, Any]], stage: int) -> None:
    """96 samples, 16 a step, 12 steps: sample 5 comes twice, once in each epoch, on whichever rank."""
    records = [rank[f"skip {stage}"] for rank in two]
    skipped = [[record["step"] for record in of_kind(each, "skip")] for each in records]
    assert skipped[0] == skipped[1] and len(skipped[0]) == 2
    for step in skipped[0]:
        named = [n for each in records for r in of_kind(each, "skip") if r["step"] == step for n in r["samples"]]
        assert 5 in named and len(named) == 16
    losses = {record["step"]: record["metrics"]["train/loss"] for record in of_kind(records[0], "step")}
    assert all((losses[step] != losses[step]) == (step in skipped[0]) for step in range(12))


def test_a_fault_that_does_not_repeat_leaves_no_trace(
    two: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One NaN on rank 1, once: the step is computed again, and losses and weights are those of the quiet run."""
    import torch
    from safetensors.torch import load_file

    assert [len(of_kind(two[0]["once"], kind)) for kind in ("recompute", "skip")] == [1, 0]
    curves = [[r["metrics"]["train/loss"] for r in of_kind(two[0][name], "step")] for name in ("quiet", "once")]
    assert curves[0] == curves[1]
    [runs] = tmp_path_factory.getbasetemp().glob("guard[0-9]*/runs")
    [quiet], [once] = (Run(runs / name).checkpoints() for name in ("quiet", "once"))
    for file in quiet.path.glob("*.safetensors"):
        left, right = load_file(file), load_file(once.path / file.name)
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_ranks_that_hold_other_weights_are_named(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert all("step 7: ranks 0, 1 differ in " in text for text in rank["diverged"])
    assert replicas.who([1, 1, 5, 1]) == "rank 2 differs from the others"
    assert replicas.who([1, 5, 5, 1, 1, 6]) == "ranks 1, 2, 5 differ from the others"


def test_the_policy_stop_ends_all_ranks(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert "gradient not finite" in rank["stop"] and "journal (kind: skip)" in rank["stop"]


def test_a_step_in_which_nothing_counts_is_named(two: list[dict[str, Any]]) -> None:
    records = two[0]["mute"]
    assert [record["step"] for record in of_kind(records, "skip")] == list(range(12))
    assert of_kind(records, "end")[0]["step"] == 12


def test_no_checkpoint_holds_what_is_not_finite(
    two: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Both runs met the poisoned sample twice and were saved after it."""
    import torch
    from safetensors.torch import load_file

    folders = list(tmp_path_factory.getbasetemp().glob("guard[0-9]*/runs/skip *"))
    assert len(folders) == 2
    for folder in folders:
        [last] = Run(folder).checkpoints()
        tensors = [tensor for file in last.path.glob("*.safetensors") for tensor in load_file(file).values()]
        assert tensors and all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
