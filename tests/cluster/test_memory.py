"""Workers that end for want of memory, and in other ways: each is told apart, and the run goes on. Under real Ray, with
its memory monitor, the kernel's own OOM killer, and real crashes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cluster import fate
from pipeline.run import Run
from tests import small_data
from tests.test_train import RESNET

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = str(Path(__file__).parents[2])
MEMORY = Path("/sys/fs/cgroup/memory")  # cgroup v1


def train(folder: Path, accidents: list[str], enter: Path | None = None, **environment: str) -> str:
    """Run two workers, of which the second meets with these accidents, to the end; what was said.

    enter: a memory cgroup to run in, as a container does.
    """
    pictures = small_data.images(folder / "pictures")
    (folder / "accidents").mkdir()
    for number, what in enumerate(accidents):
        (folder / "accidents" / f"{number}-{what}").touch()
    task = {**RESNET, "name": "tests.dying_task", "accidents": str(folder / "accidents")}
    config = small_data.config(folder / "toy.yaml", task, pictures, steps=30, checkpoint={"every": 2})
    command = [sys.executable, "-m", "pipeline", "train", str(config)]
    if enter:  # and see nothing of the others: Ray's monitor looks at the cgroup that is mounted as the root
        into = f'echo $$ > {enter}/cgroup.procs && mount --bind {enter} {MEMORY} && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", into, "sh", *command]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ROOT, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600", **environment},
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


@pytest.fixture
def narrow() -> Iterator[Path]:
    """A cgroup of little memory, for a whole run."""
    if not (MEMORY / "memory.limit_in_bytes").exists():
        pytest.skip("memory is limited by cgroup v1 here")
    here = next(line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line)
    folder = MEMORY / here.strip("/") / f"millstream-test-{os.getpid()}"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text(str(6 * 2**30))
    yield folder
    folder.rmdir()


@pytest.mark.root
@pytest.mark.parametrize(("who", "monitor"), [("Ray's memory monitor", "100"), ("the kernel", "0")])
def test_who_ended_a_worker_for_want_of_memory_is_told(tmp_path: Path, narrow: Path, who: str, monitor: str) -> None:
    settings = {"RAY_memory_monitor_refresh_ms": monitor, "RAY_memory_usage_threshold": "0.7"}
    said = train(tmp_path, ["grow"], enter=narrow, **settings)
    [failure] = [record for record in Run(tmp_path / "runs" / "toy").records() if record["kind"] == "failure"]
    assert failure["message"].startswith("worker 1 was lost in ")
    assert f"(killed: out of memory, by {who}). {fate.LESS_MEMORY}; going on" in failure["message"]
    assert failure["cause"] == "memory" and failure["message"] in said
