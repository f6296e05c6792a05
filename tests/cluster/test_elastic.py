"""A run on a Ray cluster of three nodes (raylets of this machine) that loses nodes and gets others: it goes on with
what is there, and trains on the same samples in the same order as if nothing had happened.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.run import Run
from tests import small_data
from tests.test_train import RESNET

STEPS = 30
ROOT = str(Path(__file__).parents[2])

pytestmark = pytest.mark.slow


# In a process of its own: what Ray remembers of one cluster, such as its token, would spoil the next in this one.
HOLDER = """
import sys
from ray.cluster_utils import Cluster
cluster, nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0}), {}
print(cluster.address, flush=True)
for line in sys.stdin:
    what, name = line.split()
    if what == "add":
        nodes[name] = cluster.add_node(num_cpus=1)
        print(nodes[name].node_id, flush=True)
    else:
        cluster.remove_node(nodes.pop(name), allow_graceful=False)
        print("gone", flush=True)
cluster.shutdown()
"""


class Nodes:
    """A head without slots, and nodes of one slot each that are added and lost."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", HOLDER],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": ROOT},  # workers inherit it from their node
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.address = self._answer()

    def add(self, name: str) -> str:
        """Its id, once it is there."""
        return self._ask(f"add {name}")

    def lose(self, name: str) -> None:
        self._ask(f"lose {name}")

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _ask(self, text: str) -> str:
        assert self._process.stdin is not None
        print(text, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        assert answer, "the cluster has ended"
        return answer


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    yield made
    made.close()


def attempts(folder: Path) -> list[dict[str, Any]]:
    return [record for record in Run(folder).records() if record["kind"] == "attempt"]


def wait_for(folder: Path, attempt: int, step: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        if any(r["kind"] == "step" and (r["attempt"], r["step"]) >= (attempt, step) for r in Run(folder).records()):
            return
        time.sleep(0.1)
    raise AssertionError(process.communicate()[0])


def test_nodes_are_lost_come_back_and_are_drained(tmp_path: Path, nodes: Nodes) -> None:
    pictures = str(small_data.images(tmp_path / "pictures"))
    data = {"train": pictures, "evaluate": {"test": pictures}}
    task = {**RESNET, "name": "tests.slow_task"}
    config = small_data.config(tmp_path / "toy.yaml", task, tmp_path / "pictures", data=data, steps=STEPS)
    elastic = ["cluster.workers=2", "cluster.min_workers=1", "cluster.grow_seconds=3", "checkpoint.every=4"]
    for name in ("stays", "goes"):
        nodes.add(name)
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "train", str(config), *elastic, "--address", nodes.address],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ROOT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    folder = tmp_path / "runs" / "toy"
    wait_for(folder, 1, 5, process)
    nodes.lose("goes")
    wait_for(folder, 2, 9, process)
    back = nodes.add("back")
    wait_for(folder, 3, 14, process)
    drain = ["drain-node", "--address", nodes.address, "--node-id", back, "--reason"]
    drain += ["DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "120"]
    done = subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *drain], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output

    assert [(a["workers"], a["relaunch"]) for a in attempts(folder)] == [(2, False), (1, True), (2, True), (1, True)]
    assert "was lost in" in output and "there is room for 2 workers" in output and "is about to leave" in output
    starts = [r["step"] for r in Run(folder).records() if r["kind"] in ("start", "restore")]
    assert starts[0] == 0 and starts[1] in (0, 4) and starts[3] > starts[2] > starts[1]

    alone = [sys.executable, "-m", "pipeline", "train", str(config), "cluster.workers=0", "name=alone"]
    alone += [f"task.name={RESNET['name']}"]  # the same without the sleep
    subprocess.run(alone, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ROOT}, check=True, capture_output=True)
    expected = {r["step"]: r for r in Run(tmp_path / "runs" / "alone").records() if r["kind"] == "step"}
    steps = {r["step"]: r for r in Run(folder).records() if r["kind"] == "step"}  # the last time each was done
    assert {k: r["samples"] for k, r in steps.items()} == {k: r["samples"] for k, r in expected.items()}
    for k, record in steps.items():
        loss = expected[k]["metrics"]["train/loss"]
        assert record["metrics"]["train/loss"] == pytest.approx(loss, rel=1e-5)
