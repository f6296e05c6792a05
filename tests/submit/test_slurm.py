"""A run under a real Slurm of two nodes: preempted and queued again by itself, stopped and gone on with, cancelled, and
a sweep. It ends with the weights of a run that nothing happened to.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.run import Run
from tests.cluster.lab import PATIENCE_SECONDS, Lab
from tests.submit import sent_run, slurm_lab
from tests.submit.sent_run import CANARIES, CANARY, command, same, state, steps, undisturbed, wait_for
from tests.submit.slurm_lab import Slurm

pytestmark = [pytest.mark.slow, pytest.mark.root, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    slurm_lab.require()
    folder = tmp_path_factory.mktemp("s")
    sent_run.project(folder)
    with Lab(folder, 3) as lab, Slurm(lab) as slurm:
        lab.environment |= CANARIES
        yield slurm


@pytest.fixture(scope="module")
def quiet(slurm: Slurm) -> dict[str, Any]:
    """The weights of the run that nothing happens to."""
    return state(undisturbed(slurm.lab.shared))


def submit(slurm: Slurm, *words: str, code: int = 0) -> str:
    """`millstream submit` on the login node."""
    process = slurm.lab.start("h0", command("submit", *words))
    said, _ = process.communicate(timeout=5 * PATIENCE_SECONDS)
    assert process.returncode == code and "Traceback" not in said, said
    return said


def send(slurm: Slurm, name: str, *words: str) -> str:
    """Sends toy.yaml under a name, over two nodes; the job's number."""
    options = ["-o", "nodes=2", "-o", "partition=low", "-o", "time=20", "-o", "warning=60"]
    said = submit(slurm, "slurm", "toy.yaml", f"name={name}", *options, "-o", f"python={sys.executable}", *words)
    return next(line for line in said.splitlines() if line.startswith("job ")).rpartition("/")[2]


def test_preempted_queued_again_and_the_same_weights(slurm: Slurm, quiet: dict[str, Any]) -> None:
    folder, run = slurm.lab.shared, slurm.lab.shared / "runs/taken"
    slow = folder / "slow"
    slow.touch()
    number = send(slurm, "taken")
    wait_for(lambda: len(steps(run)) >= 2, lambda: submit(slurm, "logs", "taken"))
    assert "running: RUNNING" in submit(slurm, "status", "taken") and slurm.facts(number)["NumNodes"] == "2"
    assert "of this run is running" in submit(slurm, "resume", "taken", code=78)
    token = (folder / f"submitted/taken/{number}.token").read_text()
    assert len(token) == 64 and (folder / f"submitted/taken/{number}.token").stat().st_mode & 0o777 == 0o600

    urgent = slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    wait_for(lambda: slurm.facts(number)["Restarts"] == "1", lambda: submit(slurm, "logs", "taken"))
    slow.unlink()
    stopped = [record for record in Run(run).records() if record["kind"] == "end"]
    assert [record["reason"] for record in stopped] == ["stopped"]
    assert any(listed.step == stopped[0]["step"] for listed in Run(run).checkpoints())
    assert "done: COMPLETED" in submit(slurm, "logs", "taken", "--watch")
    assert slurm.facts(urgent)["JobState"] == "COMPLETED" and slurm.facts(number)["Restarts"] == "1"

    log = submit(slurm, "logs", "taken")
    for words in ("start 1: asked to leave", "start 1: queued again", "start 2: nodes h[1-2]", "done: step 40 of 40"):
        assert words in log, log
    assert sorted(steps(run)) == list(range(sent_run.STEPS))
    assert [record["workers"] for record in Run(run).records() if record["kind"] == "attempt"] == [2, 2]
    assert same(state(run), quiet)
    places = (run, folder / "submitted")
    assert sent_run.where_it_stands(CANARY, token, folders=places) == []
    assert not list((folder / "submitted/taken").glob("*.token"))


def test_stopped_gone_on_with_and_cancelled(slurm: Slurm, quiet: dict[str, Any]) -> None:
    run = slurm.lab.shared / "runs/held"
    slow = slurm.lab.shared / "slow"
    slow.touch()
    number = send(slurm, "held")
    wait_for(lambda: len(steps(run)) >= 2, lambda: submit(slurm, "logs", "held"))
    submit(slurm, "stop", "held", "--watch", code=75)
    assert slurm.facts(number)["Restarts"] == "0" and "exit code 75:0" in submit(slurm, "status", "held")
    before = len(steps(run))

    submit(slurm, "resume", "held")
    wait_for(lambda: len(steps(run)) > before, lambda: submit(slurm, "logs", "held"))
    job = slurm.lab.run("h0", ["squeue", "--noheader", "--format=%i"]).strip()
    slurm.lab.run("h0", ["scancel", job])  # by a person, past us: it may not come back
    wait_for(lambda: slurm.facts(job)["JobState"] == "CANCELLED", lambda: submit(slurm, "logs", "held"))
    wait_for(lambda: slurm._idle() == 2, slurm._why)
    assert slurm.facts(job)["Restarts"] == "0" and "stopped: CANCELLED" in submit(slurm, "status", "held")

    slow.unlink()
    assert "done: COMPLETED" in submit(slurm, "resume", "held", "--watch")
    assert same(state(run), quiet)


def test_a_sweep_is_an_array(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = slurm.lab.shared
    monkeypatch.syspath_prepend(str(folder))  # its configurations name the task in it
    words = [
        "cluster.workers=1",
        "steps=4",
        "seed=0,1",
        "--sweep",
        "-o",
        "nodes=1",
        "-o",
        f"python={sys.executable}",
    ]
    submit(slurm, "slurm", "toy.yaml", "name=wide", "-o", "partition=low", *words)
    assert "done: COMPLETED" in submit(slurm, "logs", "wide", "--watch")
    runs = [Run(folder / f"runs/wide.{number}") for number in range(2)]
    assert [run.config.seed for run in runs] == [0, 1] and all(run.finished for run in runs)
    assert "done: step 4 of 4" in submit(slurm, "logs", "wide")
