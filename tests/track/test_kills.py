"""One run, killed at five seeded moments: a worker, the board that writes the journal, W&B's own process, the driver
twice. The journal has every step that a checkpoint relies on, and W&B has every step once after a sync.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.run import Run
from pipeline.track import journal
from pipeline.track.wandb import segments
from tests import small_data
from tests.cluster.test_runs import finish, millstream, wait_for_step, workers
from tests.test_train import RESNET
from tests.track import attempts
from tests.track.wandb_server import Server

STEPS = 50


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.close()


def writer(run: Path) -> int:
    """The process that has the journal open: the board's."""
    path = str((run / "journal.jsonl").resolve())
    holders = [int(fd.parts[2]) for fd in Path("/proc").glob("[0-9]*/fd/*") if _target(fd) == path]
    (holder,) = set(holders)
    return holder


def wandb_core(driver: int) -> int:
    """W&B's own process below the driver."""
    children = Path(f"/proc/{driver}/task/{driver}/children").read_text().split()
    children += [each for task in Path(f"/proc/{driver}/task").glob("*/children") for each in task.read_text().split()]
    (core,) = {pid for pid in children if Path(f"/proc/{pid}/comm").read_text().startswith("wandb-core")}
    return int(core)


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


@pytest.fixture
def short() -> Iterator[Path]:
    """A temporary folder whose name leaves room for Ray's sockets; what a killed W&B leaves goes with it."""
    folder = Path(tempfile.gettempdir()) / f"k{os.getpid()}"
    yield folder
    shutil.rmtree(folder)


def train_and_kill(project: Path, run: Path, draw: random.Random) -> str:
    """Train to the end through five kills; what the commands said."""
    victims = ["worker", "board", "W&B", "driver", "driver"]
    draw.shuffle(victims)
    step, attempt, said, process = 0, 1, "", millstream(project, "train", "toy.yaml")
    try:
        for victim in victims:
            step += draw.randint(3, 8)
            wait_for_step(run, step, attempt, process)
            kill(victim, run, attempt, process.pid, draw)
            attempt += victim in ("worker", "driver")
            relied = max((listed.step for listed in Run(run).checkpoints() if not listed.damage), default=0)
            assert set(Run(run).curve("train/loss")[0]) >= set(range(relied)), (victim, step)
            if victim == "driver":
                said += process.communicate()[0]
                process = millstream(project, "train", "toy.yaml")
        return said + finish(process, 0)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def kill(victim: str, run: Path, attempt: int, driver: int, draw: random.Random) -> None:
    match victim:
        case "worker":
            pid = workers(run, attempt)[draw.randint(0, 1)]
        case "board":
            pid = writer(run)
        case "W&B":
            pid = wandb_core(driver)
        case _:
            pid = driver
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(1500)  # three starts of Ray and a restart
def test_kills_lose_no_step(tmp_path: Path, short: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = attempts.environment(short)
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(short))
    pictures = str(small_data.images(tmp_path / "pictures"))
    task = {**RESNET, "name": "tests.slow_task"}
    data = {"train": pictures, "evaluate": {"test": pictures}}
    small_data.config(
        tmp_path / "toy.yaml", task, tmp_path / "pictures", data=data, steps=STEPS, track={"wandb": "offline"}
    )
    run = tmp_path / "runs" / "toy"
    said = train_and_kill(tmp_path, run, random.Random(11))
    assert said.count("going on from the last checkpoint (restart") == 1, said  # the board's death cost no attempt

    records, problems = journal.read(run / "journal.jsonl")
    assert problems == [] and [record["seq"] for record in records] == list(range(1, len(records) + 1))
    assert Run(run).curve("train/loss")[0] == list(range(STEPS))
    done = [(record["attempt"], record["step"]) for record in records if record["kind"] == "step"]
    assert len(done) == len(set(done))  # nor twice within an attempt

    command = [sys.executable, "-m", "pipeline", "track", "sync", str(run)]
    for expected in ("sent", "W&B has everything already"):
        told = subprocess.run(command, env=environment | server.environment, capture_output=True, text=True)
        assert told.returncode == 0 and expected in told.stdout, told.stdout + told.stderr
    (arrived,) = server.runs.values()
    assert arrived.steps == [row["train/step"] for row in arrived.history] == list(range(STEPS + 1))
    losses = {row["train/step"]: row["train/loss"] for row in arrived.history if "train/loss" in row}
    assert losses == dict(zip(*Run(run).curve("train/loss")))  # done again, a step is the same
    assert len(segments.find(run)) >= 3
