"""Whole runs through the command line, under real Ray, with real kills: the weights at the end are those of a quiet
run, bit for bit.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.run import Run
from tests import small_data
from tests.test_train import RESNET

STEPS = 20


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small data set and toy.yaml."""
    folder = tmp_path_factory.mktemp("project")
    pictures = str(small_data.images(folder / "pictures"))
    data = {"train": pictures, "evaluate": {"test": pictures}}
    task = {**RESNET, "name": "tests.slow_task"}  # slow enough to be caught in the middle
    small_data.config(folder / "toy.yaml", task, folder / "pictures", data=data, steps=STEPS, zero={"stage": 2})
    return folder


def millstream(project: Path, *arguments: str, kills: str = "") -> subprocess.Popen[str]:
    """Start the command in `project`; its process group is its own, so that a test can end all of it."""
    environment = {**os.environ, "MILLSTREAM_KILL": kills, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment["MILLSTREAM_TEST_HANG"] = str(project / "hang")
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.Popen(
        command,
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], code: int) -> str:
    """Wait for the command's end; its output."""
    try:
        output, _ = process.communicate(timeout=500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, output
    return output


def wait_for_step(folder: Path, step: int, attempt: int, process: subprocess.Popen[str]) -> None:
    """Until the journal has `step` of this attempt or a later one."""
    while process.poll() is None:
        steps = [r for r in Run(folder).records() if r["kind"] == "step"] if folder.exists() else []
        if any(record["attempt"] >= attempt and record["step"] >= step for record in steps):
            return
        time.sleep(0.1)
    raise AssertionError(f"ended before step {step}:\n{process.communicate()[0]}")


def state(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by file and name."""
    files = sorted((folder / "checkpoints" / f"checkpoint-{step:08d}").glob("*.safetensors"))
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_state(one: Path, other: Path) -> None:
    left, right = state(one), state(other)
    assert left.keys() == right.keys() and len(left) > 10
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def scratch(process: subprocess.Popen[str]) -> set[Path]:
    """Temporary folders of the Ray cluster that this command has started."""
    return set(Path(tempfile.gettempdir()).glob(f"millstream-ray-{process.pid}-*"))


def ray_processes(folders: set[Path]) -> list[str]:
    """Command lines of processes that belong to one of these Ray sessions."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        found += [line[:200] for folder in folders if str(folder) in line]
    return found


@pytest.fixture(scope="module")
def quiet(project: Path) -> Iterator[Path]:
    """The uninterrupted run that the others are compared with."""
    process = millstream(project, "train", "toy.yaml", "name=quiet")
    output = finish(process, 0)
    assert "done: step 20 of 20" in output and "test/accuracy" in output
    assert "Traceback" not in output and "Warning" not in output and "raylet" not in output
    assert scratch(process) == set()
    yield project / "runs" / "quiet"


@pytest.mark.slow
def test_killed_workers_change_nothing(project: Path, quiet: Path) -> None:
    """SIGKILL of a worker at five seeded moments of one run: it goes on by itself each time."""
    draw = random.Random(5)
    phases = ["forward", "backward", "step", "data", "save"]
    draw.shuffle(phases)
    kills, step = [], 0
    for attempt, phase in enumerate(phases, 1):
        step += draw.randint(1, 4)
        at = -(-step // 5) * 5 if phase == "save" else step  # saves happen every 5 steps
        step = max(step, at)
        kills.append(f"{draw.randint(0, 1)}:{attempt}:{phase}:{at}")
    output = finish(millstream(project, "train", "toy.yaml", "name=killed", kills=",".join(kills)), 0)
    run = Run(project / "runs" / "killed")
    assert output.count("going on from the last checkpoint (restart") == 5, (kills, output)
    assert len([r for r in run.records() if r["kind"] == "attempt"]) == 6
    assert_same_state(run.folder, quiet)
    assert run.curve("train/loss") == Run(quiet).curve("train/loss")


@pytest.mark.slow
def test_killed_driver_then_ctrl_c_change_nothing(project: Path, quiet: Path) -> None:
    """SIGKILL of a worker, then of the driver; again: Ctrl-C commits and says how to go on; again, and it ends."""
    run = project / "runs" / "driver"
    first = millstream(project, "train", "toy.yaml", "name=driver", kills="1:1:backward:3")
    wait_for_step(run, 6, 2, first)
    started = scratch(first)
    assert ray_processes(started)
    first.kill()
    output, _ = first.communicate()
    assert "worker 1 was lost" in output and "restart 1 of 8" in output

    second = millstream(project, "train", "toy.yaml", "name=driver")
    wait_for_step(run, 6, 3, second)
    assert ray_processes(started) == []  # the first one's cluster died with it
    second.send_signal(signal.SIGINT)
    output = finish(second, 75)
    assert "stopping: finishing the step and saving" in output and "stopped and saved" in output
    stopped = [record["step"] for record in Run(run).records() if record["kind"] == "end"]
    assert len(state(run, stopped[-1])) > 10

    third = millstream(project, "train", "toy.yaml", "name=driver")
    output = finish(third, 0)
    assert f"going on from step {stopped[-1]}" in output
    assert_same_state(run, quiet)
    assert Run(run).curve("train/loss") == Run(quiet).curve("train/loss")
    assert scratch(first) == scratch(second) == scratch(third) == set()

    again = finish(millstream(project, "train", "toy.yaml", "name=driver"), 0)
    assert "is finished" in again


def workers(folder: Path, attempt: int) -> dict[int, int]:
    """{rank: process} of the workers of an attempt: those that write its logs."""
    found = {}
    for rank in (0, 1):
        log = str((folder / "logs" / f"attempt-{attempt:04d}-rank-{rank}.log").resolve())
        for path in Path("/proc").glob("[0-9]*/fd/1"):
            with suppress(OSError):
                if os.readlink(path) == log:
                    found[rank] = int(path.parts[2])
    return found


@pytest.mark.slow
def test_workers_that_do_not_move_are_named_with_their_stack_and_change_nothing(project: Path, quiet: Path) -> None:
    """One hangs in its loss, one is stopped (SIGSTOP): each is found, the run goes on, the weights are the same."""
    run = project / "runs" / "hung"
    process = millstream(
        project, "train", "toy.yaml", "name=hung", "task.name=tests.hanging_task", "guard.stall.step=6"
    )
    wait_for_step(run, 2, 1, process)
    (project / "hang").touch()
    wait_for_step(run, 7, 2, process)
    stopped = workers(run, 2)
    os.kill(stopped[1], signal.SIGSTOP)
    output = finish(process, 0)
    hung = int((project / "hang.pid").read_text())
    first, second = [record for record in Run(run).records() if record["kind"] == "stall"]
    assert (first["pid"], first["phase"], first["silent"]) == (hung, "forward", False)
    stack = first["stacks"][str(first["rank"])]
    assert "hanging_task.py" in stack and "in loss" in stack
    assert (second["rank"], second["pid"], second["silent"]) == (1, stopped[1], True)
    assert "its process is stopped" in second["message"] and second["stacks"]["0"]
    assert output.count("going on from the last checkpoint (restart") == 2 and "does not move" in output
    assert_same_state(run, quiet)
