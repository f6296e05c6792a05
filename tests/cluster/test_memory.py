"""Workers that end for want of memory, and in other ways: each is told apart, and the run goes on. Under real Ray, with
real crashes.

What a kill by Ray's memory monitor or by the kernel looks like is in test_fate.py, as Ray and the cgroup report it: a
whole run in a narrow cgroup starves its own second attempt.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cluster import fate
from pipeline.run import Run
from tests import small_data
from tests.test_train import RESNET

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = str(Path(__file__).parents[2])


def train(folder: Path, accidents: list[str]) -> str:
    """Run two workers, of which the second meets with these accidents, to the end; what was said."""
    pictures = small_data.images(folder / "pictures")
    (folder / "accidents").mkdir()
    for number, what in enumerate(accidents):
        (folder / "accidents" / f"{number}-{what}").touch()
    task = {**RESNET, "name": "tests.dying_task", "accidents": str(folder / "accidents")}
    config = small_data.config(folder / "toy.yaml", task, pictures, steps=30, checkpoint={"every": 2})
    command = [sys.executable, "-m", "pipeline", "train", str(config)]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ROOT, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=1500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return output


def test_every_end_of_a_worker_is_told_apart_and_the_slow_rank_is_named(tmp_path: Path) -> None:
    said = train(tmp_path, ["allocate", "crash", "SIGTERM", "SIGKILL"])
    run = Run(tmp_path / "runs" / "toy")
    failures = [record for record in run.records() if record["kind"] == "failure"]
    messages = [record["message"] for record in failures]
    assert [record["cause"] for record in failures] == ["memory", "lost", "lost", "lost"], messages
    assert "can't allocate memory" in messages[0] and f"{fate.LESS_MEMORY}; going on" in messages[0]
    crash = "(crashed in native code: Segmentation fault, its stack is in attempt-0002-rank-1.log)"
    for message, how in zip(messages[1:], (crash, "(ended by SIGTERM)", "(killed)")):
        assert message.startswith("worker 1 was lost in ") and how in message
    assert all(message.split("; going on")[0] in said for message in messages)
    [slow] = [record for record in run.records() if record["kind"] == "slow" and record["attempt"] == 5]
    assert (slow["what"], slow["by"], slow["ranks"]) == ("rank", "compute", [1]) and slow["message"] in said
    assert run.finished
