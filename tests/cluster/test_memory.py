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

pytestmark = pytest.mark.slow

ROOT = str(Path(__file__).parents[2])
MEMORY = Path("/sys/fs/cgroup/memory")  # cgroup v1


def train(folder: Path, accidents: list[str], enter: str | None = None, **environment: str) -> str:
    """Run two workers, of which the second meets with these accidents, to the end; what was said."""
    pictures = small_data.images(folder / "pictures")
    (folder / "accidents").mkdir()
    for number, what in enumerate(accidents):
        (folder / "accidents" / f"{number}-{what}").touch()
    task = {**RESNET, "name": "tests.dying_task", "accidents": str(folder / "accidents")}
    config = small_data.config(folder / "toy.yaml", task, pictures, steps=30, checkpoint={"every": 2})
    command = [sys.executable, "-m", "pipeline", "train", str(config)]
    if enter:
        command = ["sh", "-c", f'echo $$ > {enter}/cgroup.procs && exec "$@"', "sh", *command]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ROOT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return output


def test_every_end_of_a_worker_is_told_apart_and_the_slow_rank_is_named(tmp_path: Path) -> None:
    total, available = (
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith(("MemTotal", "MemAvailable"))
    )
    threshold = (total - available + 5 * 2**30) / total  # Ray may use so much more before its monitor ends a worker
    monitor = {"RAY_memory_usage_threshold": f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    said = train(tmp_path, ["grow", "allocate", "crash", "SIGTERM", "SIGKILL"], **monitor)
    run = Run(tmp_path / "runs" / "toy")
    failures = [record for record in run.records() if record["kind"] == "failure"]
    messages = [record["message"] for record in failures]
    assert [record["cause"] for record in failures] == ["memory", "memory", "lost", "lost", "lost"], messages
    assert "worker 1 was lost in forward of step" in messages[0]
    assert f"(killed: out of memory, by Ray's memory monitor). {fate.LESS_MEMORY}; going on" in messages[0]
    assert "can't allocate memory" in messages[1] and f"{fate.LESS_MEMORY}; going on" in messages[1]
    assert "(crashed in native code: Segmentation fault, its stack is in attempt-0003-rank-1.log)" in messages[2]
    assert "ended by SIGTERM" in messages[3]
    assert "(killed)" in messages[4]
    assert all(message.split("; going on")[0] in said for message in messages)
    [slow] = [record for record in run.records() if record["kind"] == "slow" and record["attempt"] == 6]
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
    (folder / "memory.limit_in_bytes").write_text(str(5 * 2**30))
    yield folder
    folder.rmdir()


@pytest.mark.root
def test_the_kernel_s_killer_is_told_apart(tmp_path: Path, narrow: Path) -> None:
    said = train(tmp_path, ["grow"], enter=str(narrow), RAY_memory_monitor_refresh_ms="0")
    [failure] = [record for record in Run(tmp_path / "runs" / "toy").records() if record["kind"] == "failure"]
    assert f"(killed: out of memory, by the kernel). {fate.LESS_MEMORY}" in failure["message"]
    assert failure["cause"] == "memory" and failure["message"] in said
