"""What comes from outside while a run goes on in one process: the storage is away for a while, the time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configs
from pipeline.cluster import driver
from pipeline.run import Run
from tests import small_data
from tests.test_train import RESNET


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A run whose steps take a third of a second (tests/slow_task.py)."""
    pictures = small_data.images(tmp_path / "pictures")
    task = {**RESNET, "name": "tests.slow_task"}
    batch = {"global_batch_size": 8, "micro_batch_size": 8}
    return small_data.config(tmp_path / "toy.yaml", task, pictures, steps=16, checkpoint={"every": 2}, **batch)


@contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """Do something in a thread; what it raises is raised at the end."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    yield
    thread.join()
    if raised:
        raise raised[0]


def wait_for(run: Run, kind: str, step: int = 0) -> dict[str, Any]:
    """The first such record, at this step or later, once it is there."""
    for _ in range(1200):
        found = [r for r in run.records() if r["kind"] == kind and r["step"] >= step] if run.folder.exists() else []
        if found:
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"no {kind}")


@contextmanager
def put_aside(folder: Path) -> Iterator[None]:
    """The folder is gone, and its place is not one in which a folder could be made."""
    aside = folder.with_name("aside")
    folder.rename(aside)
    folder.touch()
    yield
    folder.unlink()
    aside.rename(folder)


@contextmanager
def mounted_over(folder: Path) -> Iterator[None]:
    """An empty file system that cannot be written lies over the folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "nothing", str(folder)], check=True)
    yield
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("away", [put_aside, pytest.param(mounted_over, marks=pytest.mark.root)])
def test_storage_that_is_away_for_a_while_costs_only_the_saves_of_that_while(
    toy: Path, away: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(toy.parent / "runs" / "toy")

    def interrupt() -> None:
        wait_for(run, "save", 2)
        with away(run.folder / "checkpoints"):
            wait_for(run, "save_failed")

    with meanwhile(interrupt):
        assert driver.run(configs.load(toy, ["cluster.workers=0"])) == driver.DONE
    said = capsys.readouterr().out
    assert "checkpoint not written" in said and "Training goes on." in said
    failed = [record["step"] for record in run.records() if record["kind"] == "save_failed"]
    saved = [record["step"] for record in run.records() if record["kind"] == "save"]
    assert failed and saved[0] < failed[0] < saved[-1] == 16 and not set(failed) & set(saved)
    assert run.curve("train/loss")[0] == list(range(16))
    assert [listed.step for listed in run.checkpoints()][-2:] == saved[-2:]


def test_sigusr1_stops_and_saves_however_often_it_comes(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As Slurm sends it before the end of a job's time: to the driver, in its main thread."""
    run = Run(toy.parent / "runs" / "toy")

    def interrupt() -> None:
        wait_for(run, "step", 3)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)

    before = signal.getsignal(signal.SIGUSR1)
    with meanwhile(interrupt):
        assert driver.run(configs.load(toy, ["cluster.workers=0"])) == driver.AGAIN
    said = capsys.readouterr().out
    assert said.count("stopping: finishing the step and saving") == 1 and "leaving at once" not in said
    [end] = [record for record in run.records() if record["kind"] == "end"]
    assert end["reason"] == "stopped" and run.checkpoints()[-1].step == end["step"] < 16
    assert signal.getsignal(signal.SIGUSR1) == before
