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

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without slots; the test adds nodes of one slot each."""
    from ray.cluster_utils import Cluster

    before = os.environ.pop("RAY_AUTH_MODE", None)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield made
    made.shutdown()
    if before is not None:
        os.environ["RAY_AUTH_MODE"] = before


def attempts(folder: Path) -> list[dict[str, Any]]:
    return [record for record in Run(folder).records() if record["kind"] == "attempt"]


def wait_for(folder: Path, attempt: int, step: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        if any(r["kind"] == "step" and (r["attempt"], r["step"]) >= (attempt, step) for r in Run(folder).records()):
            return
        time.sleep(0.1)
    raise AssertionError(process.communicate()[0])


def test_nodes_are_lost_come_back_and_are_drained(tmp_path: Path, cluster: Any) -> None:
    pictures = str(small_data.images(tmp_path / "pictures"))
    data = {"train": pictures, "evaluate": {"test": pictures}}
    task = {**RESNET, "name": "tests.slow_task"}
    config = small_data.config(tmp_path / "toy.yaml", task, tmp_path / "pictures", data=data, steps=STEPS)
    elastic = ["cluster.workers=2", "cluster.min_workers=1", "cluster.grow_seconds=3", "checkpoint.every=4"]
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "train", str(config), *elastic, "--address", cluster.address],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    folder = tmp_path / "runs" / "toy"
    wait_for(folder, 1, 5, process)
    cluster.remove_node(nodes[1], allow_graceful=False)
    wait_for(folder, 2, 9, process)
    back = cluster.add_node(num_cpus=1)
    wait_for(folder, 3, 14, process)
    drain = ["drain-node", "--address", cluster.address, "--node-id", back.node_id, "--reason"]
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
    subprocess.run(alone, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, check=True, capture_output=True)
    expected = {r["step"]: r for r in Run(tmp_path / "runs" / "alone").records() if r["kind"] == "step"}
    steps = {r["step"]: r for r in Run(folder).records() if r["kind"] == "step"}  # the last time each was done
    assert {k: r["samples"] for k, r in steps.items()} == {k: r["samples"] for k, r in expected.items()}
    for k, record in steps.items():
        loss = expected[k]["metrics"]["train/loss"]
        assert record["metrics"]["train/loss"] == pytest.approx(loss, rel=1e-5)
