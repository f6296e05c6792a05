"""A trouble that stays, from the driver's side: the attempt ends, the next one goes on from before it, also when all is
killed right after the decision; so many times, and then the run ends with what to do.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configs
from pipeline.checkpoint import rollbacks
from pipeline.checkpoint.format import checkpoint_name
from pipeline.cluster import driver, history
from pipeline.run import Run
from tests import loud_run
from tests.loud_run import LEFT_OUT, STEPS, TROUBLE
from tests.small_session import of_kind

BEST = ["evaluate.every=5", "evaluate.best=test/loss", "evaluate.mode=min", "checkpoint.keep_best=1"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loud_run.project(tmp_path_factory.mktemp("loud"))


def train(toy: Path, name: str, *changes: str) -> int:
    return driver.run(configs.load(toy, ["cluster.workers=0", f"name={name}", *changes]))


def poison(toy: Path, *troubles: range) -> str:
    return f"task.poison={[number for steps in troubles for number in loud_run.samples(toy, steps)]}"


def records(toy: Path, name: str, kind: str) -> list[dict[str, Any]]:
    return of_kind(Run(toy.parent / "runs" / name).records(), kind)


@pytest.fixture(scope="module")
def told(toy: Path) -> Path:
    """The run that leaves the steps out from the start."""
    assert train(toy, "told", poison(toy, TROUBLE), f"data.skip_steps=[{[*LEFT_OUT]}]", *BEST) == driver.DONE
    return toy.parent / "runs" / "told"


def test_the_next_attempt_goes_on_from_before_it(toy: Path, told: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = toy.parent / "runs" / "back"
    assert train(toy, "back", poison(toy, TROUBLE), *BEST) == driver.DONE
    said = capsys.readouterr().out
    assert "step 16: 3 steps in a row not finite, or far above the recent ones: going back to step 10" in said
    assert "steps 13 to 17 are left out (time 1 of 2)" in said and "Traceback" not in said
    assert "going on from step 10; steps 13 to 17 are left out" in said and "done: step 24 of 24" in said
    assert len(records(toy, "back", "attempt")) == 2 and not records(toy, "back", "failure")
    assert loud_run.same_end(run, told)
    assert loud_run.ledger(Run(run).records()) == loud_run.ledger(Run(told).records())
    assert Run(run).curve("train/loss") == Run(told).curve("train/loss")
    assert Run(run).curve("eval/test/loss") == Run(told).curve("eval/test/loss") and Run(run).best == Run(told).best
    assert [each.step for each in Run(run).checkpoints()] == [each.step for each in Run(told).checkpoints()]
    attempts = {each.step: each.manifest.attempt for each in Run(run).checkpoints() if each.manifest}
    assert all(attempt == 2 for step, attempt in attempts.items() if step > LEFT_OUT[0])


def test_so_many_times_and_then_the_run_ends_with_what_to_do(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two troubles, the second at the very end; and one before anything was saved."""
    late = range(20, 23)
    assert train(toy, "twice", poison(toy, TROUBLE, late), "guard.rollbacks=1") == driver.GIVE_UP
    said = capsys.readouterr().out
    assert "step 22: loss nan, gradient not finite, 3 step(s) in a row, gone back 1 time(s) before" in said
    assert "raise guard.max_skipped or guard.rollbacks" in said and "Traceback" not in said
    assert train(toy, "twice", poison(toy, TROUBLE, late), "guard.rollbacks=2") == driver.DONE
    assert "going back to step 15" in capsys.readouterr().out
    last = Run(toy.parent / "runs" / "twice").checkpoints()[-1]
    assert last.manifest is not None and last.step == STEPS
    assert last.manifest.data["skipped"] == [[13, 17], [19, 23]] and last.manifest.metrics

    assert train(toy, "early", poison(toy, range(1, 4)), "guard.margin=0") == driver.DONE
    assert "going back to step 0; steps 1 to 3 are left out" in capsys.readouterr().out
    assert [record["step"] for record in records(toy, "early", "start")] == [0, 0]
    assert [*loud_run.ledger(Run(toy.parent / "runs" / "early").records())] == [0, *range(4, STEPS)]


def test_a_trouble_goes_on_behind_a_restart_and_needs_a_checkpoint_from_before_it(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the middle of it; then all that was saved before it is taken away."""
    changes = [poison(toy, TROUBLE), "optim.schedule.name=constant"]
    assert train(toy, "broken", "steps=15", *changes) == driver.DONE
    [*_, (kept, manifest)] = [(each.step, each.manifest) for each in Run(toy.parent / "runs" / "broken").checkpoints()]
    assert kept == 15 and manifest is not None and manifest.guard["in_a_row"] == 1
    shutil.copytree(toy.parent / "runs" / "broken", toy.parent / "runs" / "bare")
    assert train(toy, "broken", *changes) == driver.DONE
    assert "going back to step 10" in capsys.readouterr().out
    for step in (5, 10):
        shutil.rmtree(toy.parent / "runs/bare/checkpoints" / checkpoint_name(step), ignore_errors=True)
    assert train(toy, "bare", *changes) == driver.GIVE_UP
    assert "no checkpoint from before step 13 is left to go back to" in capsys.readouterr().out


def test_killed_right_after_the_decision(toy: Path, told: Path) -> None:
    """SIGKILL of the only process as soon as the decision is on the disk: what was given up is never gone on from."""
    run = toy.parent / "runs" / "killed"
    changes = ["name=killed", "cluster.workers=0", poison(toy, TROUBLE), *BEST]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "train", str(toy), *changes],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not (run / "checkpoints" / rollbacks.FILE).exists():
            assert process.poll() is None
            time.sleep(0.002)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert (run / "checkpoints" / checkpoint_name(15)).exists() and not records(toy, "killed", "restore")
    assert not Run(run).finished and Run(run).checkpoints()[-1].step == 10
    history.expect_checkpoint(configs.load(toy, changes), run)
    assert driver.run(configs.load(toy, changes)) == driver.DONE
    assert [record["step"] for record in records(toy, "killed", "restore")] == [10]
    assert loud_run.same_end(run, told)
    assert loud_run.ledger(Run(run).records()) == loud_run.ledger(Run(told).records())


@pytest.mark.slow
def test_two_workers_under_ray(toy: Path) -> None:
    """A loss that jumps and stays, under Ray, beside a run that leaves the steps out from the start."""
    spoilt = [f"task.loud={loud_run.samples(toy, TROUBLE)}", "guard.spike=rollback", "zero.stage=2"]
    output = {}
    for name, changes in {"ray": spoilt, "ray-told": [*spoilt, f"data.skip_steps=[{[*LEFT_OUT]}]"]}.items():
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "train", str(toy), f"name={name}", *changes],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            timeout=290,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        output[name] = done.stdout
    assert "going back to step 10; steps 13 to 17 are left out" in output["ray"]
    assert "going back" not in output["ray-told"]
    ray, ray_told = (toy.parent / "runs" / name for name in ("ray", "ray-told"))
    assert loud_run.same_end(ray, ray_told)
    assert loud_run.ledger(Run(ray).records()) == loud_run.ledger(Run(ray_told).records())
