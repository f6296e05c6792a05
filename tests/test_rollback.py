"""Jumps of the loss in the real loop, at every ZeRO stage, on two ranks: refused before they change a weight, or gone
back from when they stay; then the run is, to the bit, one that has left these steps out from the start.
"""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configs
from pipeline.checkpoint import rollbacks
from pipeline.cluster import driver
from pipeline.run import Run
from pipeline.session import World
from tests import gloo, loud_run
from tests.loud_run import LEFT_OUT, STEPS, TROUBLE
from tests.small_session import of_kind, records_of

STAGES = [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2)), 3]


def runs_of(world: World, path: Path, runs: Path, stage: int) -> dict[str, Any]:
    """By case: this rank's records of each attempt."""
    one, all_of_it = loud_run.samples(path, TROUBLE[:1]), loud_run.samples(path, TROUBLE)
    once, gone = [f"task.loud={one}", "guard.spike=skip"], [f"task.loud={all_of_it}", "guard.spike=rollback"]
    found: dict[str, Any] = {}

    def train(name: str, *changes: str, attempt: int = 1, outcome: str = "done") -> None:
        config = configs.load(path, [f"zero.stage={stage}", *changes])
        found.setdefault(name, []).append(records_of(world, config, runs / name, attempt, outcome))
        world.barrier()

    train("told one", *once, f"data.skip_steps=[[{TROUBLE[0]}, {TROUBLE[0]}]]")
    train("skipped", *once)
    train("told", *gone, f"data.skip_steps=[{[*LEFT_OUT]}]")
    train("back", *gone, outcome="rollback")
    if world.rank == 0:
        shutil.copytree(runs / "back", runs / "killed")
    train("back", *gone, attempt=2)
    train("not finite", f"task.poison={all_of_it}", outcome="rollback")
    train("not finite", f"task.poison={all_of_it}", attempt=2)
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loud_run.project(tmp_path_factory.mktemp("loud"))


@pytest.fixture(scope="module")
def two(path: Path) -> Any:
    """Of a stage: its runs' folder, and each rank's records."""

    @cache
    def of(stage: int) -> tuple[Path, list[dict[str, Any]]]:
        runs = path.parent / f"runs-{stage}"
        return runs, gloo.run(runs_of, 2, path, runs, stage, timeout=400)

    return of


@pytest.mark.parametrize("stage", STAGES)
def test_a_jump_is_refused_before_it_changes_anything_and_its_samples_are_named(
    two: Any, path: Path, stage: int
) -> None:
    runs, ranks = two(stage)
    [records], skips = ranks[0]["skipped"], [of_kind(rank["skipped"][0], "skip") for rank in ranks]
    assert [record["step"] for rank in skips for record in rank] == [TROUBLE[0]] * 2
    assert sorted(n for rank in skips for n in rank[0]["samples"]) == loud_run.samples(path, TROUBLE[:1])
    assert skips[0][0]["value"] > skips[0][0]["limit"] and skips[0][0]["limit"] == skips[1][0]["limit"]
    assert "far above the recent ones" in skips[0][0]["reason"]
    assert [record["step"] for record in of_kind(records, "recompute")] == [TROUBLE[0]]
    assert loud_run.same_end(runs / "skipped", runs / "told one")
    assert [*loud_run.ledger(records)] == [*range(STEPS)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["back", "not finite"])
def test_a_trouble_that_stays_is_gone_back_from_and_left_out(two: Any, stage: int, name: str) -> None:
    runs, ranks = two(stage)
    first, second = ranks[0][name]
    [event] = of_kind(first, "rollback")
    assert (event["step"], event["last"], event["from_step"], event["to_step"]) == (*LEFT_OUT, TROUBLE[-1], 10)
    assert [of_kind(rank[name][0], "rollback") for rank in ranks[1:]] == [[]]
    assert [r["step"] for r in of_kind(first, "spike" if name == "back" else "skip")] == [*TROUBLE]
    [restored] = of_kind(second, "restore")
    assert restored["step"] == 10 and "steps 13 to 17 are left out" in restored["notes"]
    assert [(r["step"], r["last"]) for r in of_kind(second, "left_out")] == [LEFT_OUT]
    assert loud_run.same_end(runs / name, runs / "told")
    [told] = ranks[0]["told"]
    both = [{"attempt": n, **record} for n, records in enumerate((first, second), 1) for record in records]
    assert loud_run.ledger(both) == loud_run.ledger(told)
    assert [*loud_run.ledger(both)] == [
        step for step in range(STEPS) if step not in range(LEFT_OUT[0], LEFT_OUT[1] + 1)
    ]
    kept = [manifest.data["skipped"] for each in Run(runs / name).checkpoints() if (manifest := each.manifest)]
    assert kept[-1] == [[*LEFT_OUT]]


def test_another_number_of_workers_keeps_to_it(two: Any, path: Path) -> None:
    """What two ranks of ZeRO-3 have decided, one plain process of ZeRO-1 goes on from."""
    runs, ranks = two(3)
    assert [(each.first, each.last) for each in rollbacks.read(runs / "killed" / "checkpoints")] == [LEFT_OUT]
    loud = f"task.loud={loud_run.samples(path, TROUBLE)}"
    assert driver.run(configs.load(path, [f"runs={runs}", "name=killed", "cluster.workers=0", loud])) == driver.DONE
    records = Run(runs / "killed").records()
    assert [record["step"] for record in of_kind(records, "restore")] == [10]
    told = loud_run.ledger(ranks[0]["told"][0])
    assert loud_run.ledger(records) == {step: samples for step, samples in told.items() if step >= 10}
    losses = [of_kind(each, "step")[-1]["metrics"]["train/loss"] for each in (records, ranks[0]["told"][0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
