"""How a run leaves: its paths, its state, sweeps; and by what a job that has left is found again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from pipeline.cli import submit as cli_submit
from pipeline.cluster import lease
from pipeline.config import Config
from pipeline.errors import ConfigError, RunError
from pipeline.problems import InvalidConfig, Problem
from pipeline.submit import slurm, submit
from pipeline.submit.submission import State, Submission
from pipeline.submit.submit import Plan, Request, Sent, combinations, find, prepare, send, sweep
from pipeline.yaml_file import Loader
from tests.checkpoint import small_checkpoint
from tests.small_project import project

__all__ = ["project"]  # a fixture for every test here


def plan(**changes: object) -> Plan:
    return prepare(Request(**{"target": "ray", "config": Path("good.yaml"), **changes}))  # type: ignore[arg-type]


def said(plan: Plan) -> str:
    return "\n".join(map(str, plan.problems))


# ---------------------------------------------------------------- paths
def test_paths_begin_in_the_folder_at_the_target(tmp_path: Path) -> None:
    here = Loader(plan().rendered["config.yaml"]).get_single_data()
    assert here["runs"] == str(tmp_path / "runs") and here["data"]["evaluate"]["test"] == str(tmp_path / "data/test")
    there = plan(folder=Path("/shared/team"))
    values = Loader(there.rendered["config.yaml"]).get_single_data()
    assert values["runs"] == "/shared/team/runs" and values["data"]["train"]["train"]["folder"].startswith("/shared/")
    assert there.problems == [] and any("cannot be seen from here" in note for note in there.notes)
    assert there.home == tmp_path / "submitted/small"


def test_data_is_looked_for_where_it_can_be_seen(tmp_path: Path) -> None:
    assert "there is no data/trian" in said(plan(overrides=("data.train=data/trian",)))
    (tmp_path / "other").mkdir()
    assert f"there is no {tmp_path}/other/data/train" in said(plan(folder=tmp_path / "other"))


def test_a_configuration_that_is_wrong_in_itself_is_never_rendered() -> None:
    with pytest.raises(InvalidConfig, match="steps"):
        plan(overrides=("steps=none",))
    with pytest.raises(InvalidConfig, match="each needs one"):  # the split at the target's world size
        plan(folder=Path("/shared"), overrides=("cluster.workers=5",))


def test_the_same_request_renders_the_same_text() -> None:
    assert plan().rendered == plan().rendered
    assert (
        plan(target="slurm", options={"nodes": "2"}).rendered == plan(target="slurm", options={"nodes": "2"}).rendered
    )


# ---------------------------------------------------------------- the run
def test_a_run_that_is_being_trained_is_not_sent(tmp_path: Path) -> None:
    with lease.take(tmp_path / "runs/small", beat_seconds=0.1):
        assert "is being trained" in said(plan())
    assert plan().problems == []


def test_a_lease_that_a_killed_host_has_left_does_not_hold_a_run_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs/small").mkdir(parents=True)
    (tmp_path / "runs/small/lease.json").write_text('{"host": "elsewhere", "pid": 7, "token": "a", "beat": "1"}')
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    assert lease.owner(tmp_path / "runs/small") == "process 7 on host elsewhere, if it lives"
    assert plan().problems == []


def test_a_run_that_is_done_or_has_lost_its_checkpoints_is_not_sent(tmp_path: Path) -> None:
    folder = tmp_path / "runs/small"
    saved = small_checkpoint.save(folder / "checkpoints", 100)
    assert "is done: step 100 is committed" in said(plan())
    assert plan(overrides=("steps=200",)).problems == []
    from pipeline.track.journal import Journal

    with_save = Journal(folder / "journal.jsonl", attempt=1)
    with_save.write({"kind": "save", "step": 100})
    with_save.close()
    saved.rename(tmp_path / "away")
    assert "step 100 was saved there" in said(plan())


# ---------------------------------------------------------------- sweeps
def test_each_member_of_a_sweep_is_a_run_of_its_own(tmp_path: Path) -> None:
    found = plan(target="slurm", sweep={"optim.lr": ["1e-3", "3e-4"], "seed": ["0", "1", "2"]})
    members = [Loader(found.rendered[f"config-{number}.yaml"]).get_single_data() for number in range(6)]
    assert [(each["optim"]["lr"], each["seed"]) for each in members] == [
        (lr, seed) for lr in (1e-3, 3e-4) for seed in range(3)
    ]
    assert [each["name"] for each in members] == [f"small.{number}" for number in range(6)]
    script = found.rendered["job.sbatch"]
    assert "#SBATCH --array=0-5\n" in script and "%A_%a.log" in script and "config.yaml" not in found.rendered
    assert "CONFIG=$JOB/config-$SLURM_ARRAY_TASK_ID.yaml\n" in script


def test_a_sweep_is_said_as_to_the_command_of_that_name() -> None:
    words = ["steps=200", "optim.lr=1e-3, 3e-4", "seed=0,1,2", "optim.betas=[0.9, 0.99],[0.9, 0.999]"]
    fixed, grid = sweep(words)
    assert fixed == ("steps=200",)
    assert grid["optim.lr"] == ["1e-3", "3e-4"] and grid["optim.betas"] == ["[0.9, 0.99]", "[0.9, 0.999]"]
    assert len(combinations("small", grid)) == 2 * 3 * 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to sweep over"),
        (["seed=1"], "nothing to sweep over"),
        (["seed=[0, 1]"], "nothing to sweep over"),  # one value, a list
        (["seed=[0, 1"], "nothing to sweep over"),
        (["optim.lr=log(1e-4,1e-2)", "seed=0,1"], "`millstream sweep` draws"),
        (["name=a,b"], "sets that itself"),
    ],
)
def test_what_is_nothing_to_sweep_over_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sweep(words)


# ---------------------------------------------------------------- what has left
class Played:
    """A target that a test plays: the border to a cluster. What it is asked is noted."""

    def __init__(self, *states: State) -> None:
        self.states, self.asked = list(states), []

    def render(self, config: Config, run: Submission) -> dict[str, str]:
        return {"config.yaml": run.text}

    def lint(self, rendered: Mapping[str, str]) -> list[Problem]:
        return []

    def reach(self, run: Submission) -> list[str]:
        return ["it is there"]

    def submit(self, rendered: Mapping[str, str], run: Submission) -> str:
        self.asked.append(run.name)
        return f"job-{len(self.asked)}"

    def status(self, id: str) -> State:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def logs(self, id: str) -> str:
        return "".join(f"line {number}\n" for number in range(5 - len(self.states)))

    def stop(self, id: str) -> None:
        self.asked.append(f"stop {id}")


def test_a_job_is_found_again_by_the_name_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(State("running", "R"))
    monkeypatch.setitem(submit.TARGETS, "played", played)
    heard: list[str] = []
    sent = send(plan(target="played", overrides=("seed=3",), options={"a": "b"}), heard.append)
    assert heard == ["it is there"] and played.asked == ["small"] and find("small")[2:] == sent[2:]
    record = json.loads((tmp_path / "submitted/small/job.json").read_text())
    assert record["id"] == "job-1" and record["request"]["overrides"] == ["seed=3"]
    assert "job job-1 of this run is running" in said(plan(target="played"))
    played.states = [State("stopped")]
    again = prepare(submit.again(find("small"), ["steps=150"]))
    values = Loader(again.rendered["config.yaml"]).get_single_data()
    assert again.problems == [] and (values["seed"], values["steps"]) == (3, 150) and again.home == sent.home
    assert send(again, heard.append).id == "job-2" and find("small").id == "job-2"
    with pytest.raises(RunError, match="sent were: small"):
        find("smal")


def test_a_sweep_goes_on_as_the_sweep_that_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(submit.TARGETS, "played", Played(State("stopped")))
    grid = {"optim.lr": ["1e-3", "3e-4"], "seed": ["0", "1"]}
    sent = send(plan(target="played", sweep=grid), lambda line: None)
    assert find("small").request.sweep == grid == sent.request.sweep
    assert len(prepare(submit.again(find("small"))).run.sweep) == 4


def test_a_job_that_has_ended_is_not_asked_to_stop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    played = Played(State("done", "COMPLETED"))
    monkeypatch.setitem(submit.TARGETS, "played", played)
    send(plan(target="played"), lambda line: None)
    cli_submit.stop("small")
    assert "small has ended already, done: COMPLETED" in capsys.readouterr().out and played.asked == ["small"]
    played.states = [State("running", "R")]
    cli_submit.stop("small")
    assert "is asked to stop" in capsys.readouterr().out and played.asked == ["small", "stop job-1"]


def test_watching_tells_every_change_and_every_line_once() -> None:
    states = [State("waiting", "PENDING"), State("waiting", "PENDING"), State("running", "RUNNING")]
    played = Played(*states, State("running", "RUNNING"), State("done", "COMPLETED"))
    lines: list[str] = []
    sent = Sent(Path("submitted/small"), played, "job-1", Request("ray", Path("good.yaml")))
    assert submit.watch(sent, lines.append, wait=lambda seconds: None) == State("done", "COMPLETED")
    told = "\n".join(lines).splitlines()
    assert [line for line in told if not line.startswith("line")] == [
        "waiting: PENDING",
        "running: RUNNING",
        "done: COMPLETED",
    ]
    assert [line for line in told if line.startswith("line")] == [f"line {number}" for number in range(4)]


@pytest.mark.parametrize(
    "line, word",
    [
        ("JobState=PENDING Reason=Resources ExitCode=0:0", "waiting"),
        ("JobState=PENDING Reason=BeginTime ExitCode=0:0 Restarts=1", "waiting"),
        ("JobState=RUNNING Reason=None ExitCode=0:0", "running"),
        ("JobState=COMPLETING Reason=None ExitCode=0:0", "running"),
        ("JobState=COMPLETED Reason=None ExitCode=0:0", "done"),
        ("JobState=CANCELLED Reason=None ExitCode=0:15", "stopped"),
        ("JobState=FAILED Reason=NonZeroExitCode ExitCode=75:0", "stopped"),
        ("JobState=FAILED Reason=NonZeroExitCode ExitCode=1:0", "failed"),
        ("JobState=TIMEOUT Reason=TimeLimit ExitCode=0:1", "failed"),
        ("JobState=NODE_FAIL Reason=NodeDown ExitCode=0:0", "failed"),
        ("JobState=OUT_OF_MEMORY Reason=None ExitCode=0:125", "failed"),
    ],
)
def test_the_states_of_slurm(line: str, word: str) -> None:
    assert slurm._state(f"JobId=7 JobName=small {line}").word == word


STOPPING = """
import os, signal, sys, time
from pipeline.cluster.driver import stop_signals
class Console:
    def say(self, text, style=""): print(text.split(":")[0], flush=True)
with stop_signals(Console()) as stop:
    print("ready", flush=True)
    stop.wait()
    print("saving", flush=True)
    for number in range(int(sys.argv[1])):
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    print("saved", flush=True)
"""


@pytest.mark.parametrize("again, times, saved", [("SIGTERM", 3, True), ("SIGINT", 1, False)])
def test_a_cluster_may_say_twice_that_it_takes_its_machine_back(again: str, times: int, saved: bool) -> None:
    """Slurm and Kubernetes repeat their SIGTERM; only a person at the terminal means it when pressing Ctrl-C again."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", STOPPING, str(times), again]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        out = process.stdout.read()
    assert ("saved" in out, process.returncode) == ((True, 0) if saved else (False, 75)), out


def test_the_example_is_what_the_command_renders() -> None:
    """launch/digits.sbatch; its first comment says how it was made."""
    root = Path(__file__).parents[2]
    request = Request(
        "slurm",
        root / "configs/digits.yaml",
        folder=Path("/shared/millstream"),
        own_code=False,
        options={"nodes": "2", "time": "4:00:00"},
    )
    example = root / "launch/digits.sbatch"
    again = (
        "millstream submit slurm configs/digits.yaml --folder /shared/millstream --installed -o nodes=2 "
        "-o time=4:00:00 --render --to OUT; cp OUT/job.sbatch launch/digits.sbatch"
    )
    assert prepare(request).rendered["job.sbatch"] == example.read_text(), f"render it again: {again}"
