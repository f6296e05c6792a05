"""A sweep by the real Ray Tune: every point a run of its own, weak ones ended early, gone on with after a stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cluster import sweep
from pipeline.errors import ConfigError, RunError
from pipeline.run import Run
from tests import small_data

ROOT = Path(__file__).parents[2]
TASK = {"name": "tests.poisoned_task"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    pictures = small_data.images(folder / "pictures")
    data = {"train": str(pictures), "evaluate": {"test": str(pictures)}}
    return small_data.config(
        folder / "toy.yaml",
        TASK,
        pictures,
        data=data,
        steps=36,
        evaluate={"every": 4, "best": "test/loss", "mode": "min"},
        cluster={"workers": 0},
        checkpoint={"every": 12},
        track={"wandb": "off", "health_every": None},
    )


def test_the_grid_is_the_product_and_ranges_are_drawn(config: Path) -> None:
    words = ["optim.lr=1e-3,1e-2", "zero.stage=0,1,2", "optim.clip=log(0.1,10)", "optim.betas=[0.9,0.99]"]
    planned, first = sweep.plan(config, words, samples=5)
    assert planned.trials == 2 * 3 * 5
    assert planned.folder.name == "toy-sweep" and first.optim.lr == 1e-3
    assert planned.fixed == ("optim.betas=[0.9,0.99]",) and planned.drawn["optim.clip"] == ("log", 0.1, 10.0)


@pytest.mark.parametrize(
    ("overrides", "samples", "said"),
    [
        (["optim.lr=1e-3"], 1, "nothing to sweep over"),
        (["optim.lr=1e-3,1e-2"], 4, "no key has one"),
        (["optim.lr=log(0,1)"], 1, "a smaller number first, above 0"),
        (["optim.lr=uniform(2,1)"], 1, "a smaller number first"),
        (["seed=int(1.5,3)"], 1, "two whole numbers"),
        (["optim.lr=uniform(a,b)"], 1, "two numbers"),
        (["zero.stage=1,7"], 1, "zero.stage=7"),
        (["optim.lrr=1,2"], 1, "optim.lr"),
        (["name=a,b"], 1, "sets that itself"),
        (["optim.lr=1e-3,1e-2", "evaluate.best=null"], 1, "evaluate.best is not set"),
        (["seed=int(0,9)"], 20_000, "more than 10,000"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_starts(
    config: Path, overrides: list[str], samples: int, said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        sweep.plan(config, overrides, samples)
    assert said in str(error.value)


def command(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", "sweep", str(config), *arguments]


@pytest.mark.slow
def test_a_sweep_is_stopped_gone_on_with_and_ends_weak_runs_early(config: Path) -> None:
    """Rates of almost 0 learn nothing; of nine runs those are ended before their last step, which is far enough away
    for that.
    """
    arguments = ["optim.lr=1e-7,1e-6,1e-2", "seed=1,2,3", "steps=300", "--early", "--parallel", "2"]
    runs = config.parent / "runs" / "toy-sweep"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with (config.parent / "out").open("wb") as out:
        first = subprocess.Popen(command(config, *arguments), stdout=out, stderr=out, env=env, cwd=ROOT)
        until = time.monotonic() + 240
        while not any("evaluation" in p.read_text() for p in runs.glob("*/journal.jsonl")):
            assert time.monotonic() < until and first.poll() is None, (config.parent / "out").read_text()
            time.sleep(0.5)
        first.send_signal(signal.SIGINT)
        assert first.wait(120) != 0
    again = subprocess.run(command(config, *arguments), capture_output=True, text=True, env=env, cwd=ROOT, timeout=120)
    assert again.returncode == 1 and "--resume" in again.stderr
    done = subprocess.run(
        command(config, *arguments, "--resume"), capture_output=True, text=True, env=env, cwd=ROOT, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    planned, config_of_first = sweep.plan(config, arguments[:3])
    trials = sweep.outcome(planned, config_of_first)
    assert len(trials) == 9
    assert [trial.keys["optim.lr"] for trial in trials[:3]] == ["0.01"] * 3
    assert trials[0].state == "done"
    early = [trial for trial in trials if trial.state == "ended early"]
    assert early, done.stdout
    for trial in trials:
        steps = [record["step"] for record in Run(trial.folder).records() if record["kind"] == "end"]
        assert Run(trial.folder).checkpoints()[-1].step == steps[-1]
    assert trials[0].folder.name in done.stdout and "state" in done.stdout


@pytest.mark.slow
def test_runs_under_ray_take_their_own_workers(config: Path, tmp_path: Path) -> None:
    arguments = ["optim.lr=1e-3,1e-2", "cluster.workers=1", "steps=8", f"runs={tmp_path}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(config, *arguments), capture_output=True, text=True, env=env, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = sweep.outcome(*sweep.plan(config, arguments))
    assert [(trial.state, Run(trial.folder).finished) for trial in trials] == [("done", True)] * 2
    assert "Configuration for experiment" not in done.stdout


def test_a_sweep_that_is_there_is_not_written_over(config: Path, tmp_path: Path) -> None:
    planned, first = sweep.plan(config, ["optim.lr=1e-3,1e-2", f"runs={tmp_path}"])
    with pytest.raises(RunError, match="no sweep to go on with"):
        sweep.run(planned, first, None, True, print)
    (planned.folder / "sweep").mkdir(parents=True)
    with pytest.raises(RunError, match="--resume"):
        sweep.run(planned, first, None, False, print)
    (planned.folder / "points.json").write_text("{}")
    with pytest.raises(RunError, match="over other points"):
        sweep.run(planned, first, None, True, print)
