"""Proof that a run can be resumed: given where it is so, refused where it is not, and nothing left behind."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configs
from pipeline import same_run
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.problems import InvalidConfig
from pipeline.verify_resume import Report, another, planned, verify
from tests import small_data
from tests.test_train import RESNET

FORGETFUL = {"name": "tests.forgetful_task"}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return small_data.images(tmp_path / "pictures")


def alone(pictures: Path, task: dict[str, Any], **changes: Any) -> Config:
    """One plain process with one micro batch a step, so that there is no other number of workers."""
    path = pictures.parent / "toy.yaml"
    settings = {"micro_batch_size": 16, "cluster": {"workers": 0}, **changes}
    return configs.load(small_data.config(path, task, pictures, **settings))


def verified(config: Config, steps: int, more: int) -> tuple[Report, list[str]]:
    """The report, and what was said meanwhile; nothing may be left afterwards."""
    said: list[str] = []
    with planned(config, steps, more) as plan:
        report = verify(plan, said.append, lambda name, done, total: None)
        assert json.loads(json.dumps(report.to_json(), allow_nan=False))["passed"] == report.passed
    assert not plan.folder.exists() and not config.runs.exists()
    return report, said


def outcomes(report: Report) -> dict[str, tuple[bool, bool]]:
    """(kept, equal) of each thing that was compared at the same number of workers."""
    return {check.what: (check.kept, check.equal) for check in report.comparisons[0].checks}


EVERYTHING = ("weights", "optimizer state", "samples", "learning rate", "loss curve")


def test_a_run_that_can_be_resumed(pictures: Path) -> None:
    report, said = verified(alone(pictures, RESNET), steps=3, more=2)
    assert report.passed and outcomes(report) == dict.fromkeys(EVERYTHING, (True, True))
    assert report.skipped.startswith("a step has one micro batch")
    assert "then SIGKILL of 1 worker" in said[1] and said[2] == "going on from step 3, 1 worker"
    assert report.environment["device"] == "cpu"


@pytest.mark.slow
def test_state_that_no_checkpoint_holds_is_found(pictures: Path) -> None:
    report, _ = verified(alone(pictures, FORGETFUL), steps=3, more=2)
    assert not report.passed
    found = outcomes(report)
    assert found["samples"] == found["learning rate"] == (True, True)
    assert found["weights"] == found["optimizer state"] == found["loss curve"] == (False, False)
    losses = report.comparisons[0].checks[-1]
    assert "differs in 2 steps, first in 3" in losses.said and "before the kill" not in losses.said


@pytest.mark.slow
def test_a_run_that_follows_the_clock_is_found_and_said(pictures: Path) -> None:
    report, _ = verified(alone(pictures, {**FORGETFUL, "follows": "clock"}), steps=2, more=1)
    assert not report.passed
    assert "apart since step 0, before the kill" in report.comparisons[0].checks[-1].said


def test_the_other_number_of_workers() -> None:
    assert [another(1, 4), another(2, 4), another(3, 4), another(4, 4), another(3, 6)] == [2, 1, 2, 2, 2]
    assert another(1, 3) == 3 and another(1, 1) is None


def test_a_plan_is_refused_before_anything_runs(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configs.load(small_data.config(pictures.parent / "toy.yaml", RESNET, pictures))  # 4 micro batches
    with pytest.raises(InvalidConfig, match="5 workers share 4 micro batches"), planned(config, 2, 2, 5):
        pass
    with pytest.raises(ConfigError, match="what the run has anyway"), planned(config, 2, 2, 2):
        pass
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ConfigError, match="unset RAY_ADDRESS"), planned(config, 2, 2):
        pass
    assert not config.runs.exists()


def test_the_user_s_run_is_kept_but_for_what_is_beside_it(pictures: Path) -> None:
    schedule = {"name": "wsd", "warmup": 10, "decay": 40}
    optim = {"name": "adamw", "lr": 1e-3, "schedule": schedule}
    checkpoint = {"every": 50, "keep": 7, "background": False}
    data = {"train": str(pictures), "evaluate": {"test": str(pictures)}}
    changes = {"optim": optim, "checkpoint": checkpoint, "data": data, "evaluate": {"every": 10}, "steps": 100}
    with planned(alone(pictures, RESNET, **changes), 6, 4) as plan:
        whole, killed = plan.run("whole"), plan.run("killed")
    assert killed.steps == 10 and killed.optim.schedule.warmup == 1 and killed.optim.schedule.decay == 4
    assert (whole.checkpoint.every, killed.checkpoint.every, killed.checkpoint.background) == (10, 6, False)
    assert not killed.data.evaluate and killed.evaluate.every is None and killed.track.wandb == "off"
    assert sorted(configs.difference(whole, killed)) == ["checkpoint.every", "runs"]


def lines(losses: list[float], **changes: Any) -> dict[int, dict[str, Any]]:
    return {k: {"samples": 7 + k, "learning rate": 0.1, "loss": loss, **changes} for k, loss in enumerate(losses)}


@pytest.mark.parametrize(
    ("dtype", "first", "later", "kept"),
    [
        ("fp32", 5e-7, 5e-4, True),
        ("fp32", 5e-6, 5e-6, False),
        ("fp32", 0.0, 5e-3, False),
        ("bf16", 5e-3, 5e-3, True),
        ("bf16", 0.0, 5e-2, False),
        ("fp32", 0.0, math.nan, False),
    ],
)
def test_how_near_losses_must_be_at_another_number_of_workers(
    dtype: str, first: float, later: float, kept: bool
) -> None:
    whole, resumed = lines([3.0, 2.0, 2.0, 2.0]), lines([9.0, 2.0, 2.0 * (1 + first), 2.0 * (1 + later)])
    check = same_run._losses(whole, resumed, 2, 4, same=False, dtype=dtype)
    assert check.kept is kept
    assert not same_run._losses(whole, resumed, 2, 4, same=True, dtype=dtype).kept


def test_other_samples_or_steps_that_are_missing_are_never_right() -> None:
    whole = lines([3.0, 2.0, 2.0])
    samples, rates = same_run._columns(whole, whole | {2: {**whole[2], "samples": 1}}, 3)
    assert (samples.kept, rates.kept) == (False, True) and "first in 2" in samples.said
    missing = {k: whole[k] for k in (0, 2)}
    assert [check.kept for check in same_run._columns(whole, missing, 3)] == [False, False]
    assert not same_run._losses(whole, missing, 0, 3, same=False, dtype="fp32").kept
    assert same_run._losses(lines([math.nan] * 2), lines([math.nan] * 2), 0, 2, same=True, dtype="fp32").equal


def command(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "200", "STARTED_FOR": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "verify-resume", "toy.yaml", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def processes_of(folder: Path) -> list[int]:
    """Those that carry STARTED_FOR=folder in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"STARTED_FOR={folder}" in path.read_text(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def ray_folders() -> set[Path]:
    """Of all drivers on this machine; their names carry the driver's process id."""
    return set(Path(tempfile.gettempdir()).glob("millstream-ray-*"))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stop_leaves_nothing_behind(pictures: Path, stop: signal.Signals) -> None:
    """In the middle of a run of two workers under Ray."""
    folder = pictures.parent
    small_data.config(folder / "toy.yaml", {**RESNET, "name": "tests.slow_task"}, pictures)
    process = command("--steps", "50", folder=folder)
    journal = "runs/verify-resume-*/whole/toy/journal.jsonl"
    while not any('"kind":"step"' in path.read_text() for path in folder.glob(journal)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    processes = processes_of(folder)
    started = [path for path in ray_folders() if int(path.name.split("-")[2]) in processes]
    assert len(processes) > 4 and started
    for _ in range(3):  # an impatient one must not interrupt the clearing away
        process.send_signal(stop)
        time.sleep(0.05)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and output.rstrip().endswith("no file is half-written"), output
    assert not (folder / "runs").exists() and processes_of(folder) == []
    assert not [path for path in started if path.exists()]


@pytest.mark.slow
def test_two_workers_under_ray_go_on_as_two_and_as_one(pictures: Path) -> None:
    folder = pictures.parent
    small_data.config(folder / "toy.yaml", RESNET, pictures, zero={"stage": 3})
    process = command("--steps", "4", "--more", "6", "--json", "report.json", folder=folder)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert "resumed with 2 workers" in output and "resumed with 1 worker\n" in output
    report = json.loads((folder / "report.json").read_text())
    assert report["passed"] and [each["workers"] for each in report["comparisons"]] == [2, 1]
    assert all(check["equal"] for check in report["comparisons"][0]["checks"])
    other = {check["what"]: check for check in report["comparisons"][1]["checks"]}
    assert other["samples"]["equal"] and other["learning rate"]["equal"]
    assert not other["weights"]["equal"] and other["loss curve"]["relative"] <= 1e-6
    assert not (folder / "runs").exists()
