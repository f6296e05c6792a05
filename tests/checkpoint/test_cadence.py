"""How often to save: the formula, and what the run learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline import config as configs
from pipeline.checkpoint import cadence
from pipeline.checkpoint.saver import Saved
from pipeline.cluster import driver
from pipeline.run import Run
from pipeline.sections import Checkpoint
from pipeline.session import World
from tests import gloo, small_data


def test_the_interval_is_the_one_that_costs_least() -> None:
    """Against the sum itself: saves hold up, and a failure undoes half an interval on average."""
    save, step, mean = 3.0, 0.5, 3600.0

    def lost(steps: int) -> float:
        seconds = steps * step
        return save / seconds + seconds / 2 / mean

    best = min(range(1, 2000), key=lost)
    assert cadence.interval(save, step, mean) == pytest.approx(best, abs=1)
    assert cadence.interval(0.0, step, mean) == 1
    assert cadence.interval(save, 0.0, mean) is None


def test_failures_of_the_run_count() -> None:
    rule = Checkpoint(every="auto", failure_hours=2)
    assert cadence.between_failures(rule, []) == 7200
    records = [{"kind": "attempt", "attempt": a, "time": 1000.0 * a} for a in (1, 2)]
    records += [{"kind": "failure", "attempt": a, "time": 1000.0 * a + 600} for a in (1, 2)]
    assert cadence.between_failures(rule, records) == pytest.approx((7200 + 1200) / 3)


def test_a_run_finds_its_interval(tmp_path: Path) -> None:
    pictures = small_data.images(tmp_path / "pictures")
    task = {"name": "tests.poisoned_task"}
    path = small_data.config(tmp_path / "toy.yaml", task, pictures, steps=120, data={"train": str(pictures)})
    changes = ["cluster.workers=0", "checkpoint.every=auto", "checkpoint.failure_hours=0.001"]
    assert driver.run(configs.load(path, changes)) == driver.DONE
    run = Run(tmp_path / "runs" / "toy")
    saves = [record["step"] for record in run.records() if record["kind"] == "save"]
    learnt = [record for record in run.records() if record["kind"] == "cadence"]
    assert saves[0] == cadence.FIRST_STEPS and saves[-1] == 120 and learnt
    began, stepped = (next(r["time"] for r in run.records() if r["kind"] == kind) for kind in ("attempt", "step"))
    for record in learnt:  # 3.6 s as configured, and what the run had lasted when it counted
        least, most = (
            cadence.interval(record["save_seconds"], record["step_seconds"], mean)
            for mean in (3.6, 3.6 + stepped - began)
        )
        assert least <= record["every"] <= most and record["save_seconds"] > 0


def learns(world: World) -> tuple[list[int], cadence.Learnt | None]:
    """The first saves, and what is learnt. Only rank 0 has read the journal, and each rank has other costs."""
    rule = Checkpoint(every="auto", failure_hours=100 / 3600)
    records = [{"kind": "cadence", "attempt": 1, "time": 0.0, "every": 7}] if world.rank == 0 else []
    records += [{"kind": "failure", "attempt": 1, "time": 50.0}] if world.rank == 0 else []
    found = cadence.Cadence(world, rule, 40, records)
    saves = [step for step in range(40, 60) if found.due(step)]
    return saves[:1], found.learn(Saved(20, None, None, 0.5 + world.rank, 1.0, 1), 0.25)


def test_all_ranks_begin_with_the_last_interval_and_find_the_same() -> None:
    one, other = gloo.run(learns, 2)
    assert one == other == ([47], (cadence.interval(1.5, 0.25, 75.0), 1.5, 0.25))


def test_one_slow_save_changes_nothing() -> None:
    world = World(0, 1, 0, torch.device("cpu"), None)  # pyright: ignore[reportArgumentType]
    found = cadence.Cadence(world, Checkpoint(every="auto", failure_hours=100 / 3600), 0, [])
    costs = [0.5, 0.5, 9.0, 0.45, 0.55, 0.5]
    learnt = [found.learn(Saved(20, None, None, cost, 1.0, 1), 0.25) for cost in costs]
    assert learnt == [(cadence.interval(0.5, 0.25, 100.0), 0.5, 0.25)] + [None] * 5
    slower = [found.learn(Saved(20, None, None, 2.0, 1.0, 1), 0.25) for _ in range(9)]
    assert [each for each in slower if each][-1] == (cadence.interval(2.0, 0.25, 100.0), 2.0, 0.25)
