"""Runs over real hosts: each with an address, processes and a /tmp of its own, under one Ray (lab.py).

The driver runs on h0, Ray's head, which offers no slot; h1, h2 and h3 offer one each. A host is killed, cut off,
preempted, and the head dies. Each run ends with the weights of one that was left in peace: the same bits at the same
number of workers, as a spare host takes over, and at another one as near as is promised.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.run import Run, newest_attempt
from tests import small_data
from tests.cluster.lab import Lab
from tests.cluster.test_runs import STEPS, assert_same_state, state, wait_for_step
from tests.test_train import RESNET

SECONDS = 400  # that a run may take; the test fails then
SOON = {"RAY_gcs_rpc_server_reconnect_timeout_s": "15"}  # a worker's Ray looks that long for its head, by itself 60 s

pytestmark = [pytest.mark.root, pytest.mark.timeout(1800)]  # many starts of workers


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Hosts that share a folder with a small data set and toy.yaml."""
    folder = tmp_path_factory.mktemp("hosts")
    pictures = str(small_data.images(folder / "pictures"))
    data = {"train": pictures, "evaluate": {"test": pictures}}
    task = {**RESNET, "name": "tests.zombie_task"}
    small_data.config(folder / "toy.yaml", task, folder / "pictures", data=data, steps=STEPS, zero={"stage": 2})
    with Lab(folder, 4, dashboard=False) as made:
        yield made


@pytest.fixture(scope="module")
def impatient(lab: Lab) -> None:
    """Where Ray is not up yet, a worker's soon ends without its head. Not where a host is cut off, which must live on
    until the others have begun again; so what needs it comes first in this file, and later Rays are others.
    """
    lab.mend(**SOON)


@pytest.fixture
def hosts(lab: Lab) -> Lab:
    """The lab with Ray on every host, whatever the test before has done to them."""
    lab.mend()
    return lab


def train(lab: Lab, name: str, *overrides: str) -> tuple[subprocess.Popen[str], Path]:
    """Start a run on h0; its process and its folder."""
    command = ["python", "-m", "pipeline", "train", "toy.yaml", f"name={name}", *overrides]
    return lab.start("h0", [*command, "--address", lab.ray_address]), lab.shared / "runs" / name


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a run's end, which must be good; its output."""
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output
    assert "Traceback" not in output and "raylet" not in output
    return output


def until(there: Path, process: subprocess.Popen[str]) -> None:
    """Wait for a file while a run goes on."""
    while not there.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def losses(folder: Path) -> tuple[list[int], list[float]]:
    return Run(folder).curve("train/loss")


def assert_one_line_of_history(folder: Path) -> None:
    """Every attempt goes on from a checkpoint of those before it, each step is in the journal, no line is damaged, and
    every checkpoint is of the attempt that was the newest when it was made.
    """
    records, saved, done = Run(folder).records(), {0: 0}, 0
    assert [record["seq"] for record in records] == list(range(1, len(records) + 1))
    for record in records:
        if record["kind"] in ("start", "restore"):
            assert record["step"] in saved
            done = record["step"]
        elif record["kind"] == "step":
            assert record["step"] == done
            done += 1
        elif record["kind"] == "save":
            saved[record["step"]] = record["attempt"]
    assert done == STEPS
    there = {each.step: each.manifest.attempt for each in Run(folder).checkpoints() if each.manifest}
    assert STEPS in there and there == {step: saved[step] for step in there}


@pytest.fixture(scope="module")
def quiet(lab: Lab) -> Path:
    """The run that is left in peace, with two workers."""
    lab.mend()
    process, folder = train(lab, "quiet")
    finish(process)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_the_same_command_goes_on_after_the_head_was_killed(hosts: Lab, quiet: Path) -> None:
    """The driver and Ray's head die with their host; on a new one the same command goes on."""
    process, folder = train(hosts, "head")
    wait_for_step(folder, 6, 1, process)
    hosts.kill("h0")
    assert process.wait(timeout=10) == -signal.SIGKILL
    owner = json.loads((folder / "lease.json").read_text())
    for ray in hosts.ray.values():
        ray.wait(timeout=120)  # without a head it ends on the others too
    hosts.mend()
    process, _ = train(hosts, "head")
    output = finish(process)
    assert f"process {owner['pid']} on host h0 owned this run; waiting up to 30 s for a sign of life" in output
    assert "going on from step 5" in output
    assert_one_line_of_history(folder)
    assert_same_state(folder, quiet)
    assert losses(folder) == losses(quiet)


@pytest.mark.slow
def test_a_killed_host_leaves_the_run_to_the_others(hosts: Lab, quiet: Path) -> None:
    """Of three workers two go on: the same samples and, to rounding, the same losses and weights."""
    process, folder = train(hosts, "killed", "cluster.workers=3", "cluster.min_workers=2")
    wait_for_step(folder, 6, 1, process)
    hosts.kill("h3")
    output = finish(process)
    assert "was lost in" in output and "going on from the last checkpoint (restart 1 of 8)" in output
    assert "going on from step 5; not bitwise: workers 3 -> 2" in output
    records = Run(folder).records()
    assert [record["workers"] for record in records if record["kind"] == "attempt"] == [3, 2]
    samples = {r["step"]: r["samples"] for r in records if r["kind"] == "step"}
    assert samples == {r["step"]: r["samples"] for r in Run(quiet).records() if r["kind"] == "step"}
    assert_one_line_of_history(folder)
    assert losses(folder)[1] == pytest.approx(losses(quiet)[1], rel=1e-6)
    left, right = state(folder), state(quiet)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_host_that_was_cut_off_commits_too_late(hosts: Lab, quiet: Path) -> None:
    """Its worker is in the middle of a commit when the others go on without it: it is refused, and changes nothing."""
    process, folder = train(hosts, "cut")
    wait_for_step(folder, 6, 1, process)
    (folder / "hold").touch()
    until(folder / "held", process)
    zombie = (folder / "held").read_text()
    hosts.cut(zombie)
    until(folder / "late", process)
    assert newest_attempt(folder) == 2 and hosts.workers(folder, 1)[0].host == zombie
    refused = (folder / "late").read_text()
    assert "not committed: attempt 1 has been superseded by attempt 2" in refused
    assert "Nothing was changed; this process should end." in refused
    wait_for_step(folder, 6, 2, process)
    hosts.heal(zombie)
    output = finish(process)
    assert "was lost in" in output and "going on from the last checkpoint (restart 1 of 8)" in output
    assert "going on from step 5" in output
    hosts.ray[zombie].wait(timeout=60)  # Ray on the host that was given up ends by itself, and then the worker
    while hosts.workers(folder, 1):
        time.sleep(0.2)
    assert_one_line_of_history(folder)
    assert_same_state(folder, quiet)
    assert losses(folder) == losses(quiet)


@pytest.mark.slow
def test_a_host_that_is_preempted_is_left_in_time(hosts: Lab, quiet: Path) -> None:
    """SIGTERM to its `ray start --block`: the step is finished and saved, and the spare host takes over. No step is
    done twice.
    """
    process, folder = train(hosts, "preempted")
    wait_for_step(folder, 6, 1, process)
    leaving = hosts.workers(folder, 1)[1].host
    hosts.preempt(leaving)
    output = finish(process)
    assert f"{leaving} is about to leave: finishing the step and saving" in output
    records = Run(folder).records()
    assert [record["restarts"] for record in records if record["kind"] == "attempt"] == [0, 0]
    assert [record["step"] for record in records if record["kind"] == "step"] == list(range(STEPS))
    assert_one_line_of_history(folder)
    assert_same_state(folder, quiet)
    assert losses(folder) == losses(quiet)
    hosts.ray[leaving].wait(timeout=120)


def test_nothing_is_left_of_a_lab_whose_test_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tests.cluster.lab import Lab\n"
        "lab = Lab(Path(sys.argv[1]), 2); lab.start('h1', ['sleep', '600'])\n"
        "print(*(host.first for host in lab.hosts.values()), flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    firsts = [Path(f"/proc/{pid}") for pid in process.stdout.readline().split()]
    assert len(firsts) == 2 and all(first.exists() for first in firsts)
    process.kill()
    process.communicate()
    give_up = time.monotonic() + 30
    while any(path.exists() for path in firsts):
        assert time.monotonic() < give_up, "a host outlived its test"
        time.sleep(0.05)
    assert "/lab" not in "".join(
        line for line in Path("/proc/mounts").read_text().splitlines() if str(tmp_path) in line
    )
