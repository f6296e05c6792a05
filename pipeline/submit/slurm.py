"""Slurm: one batch script per run, which brings a Ray cluster of its own up inside its allocation.

The script is a head of `#SBATCH` lines and assignments, rendered here, and a body that is the same for every run
(slurm.sh). Before the time limit, and on preemption, Slurm warns the script; the driver commits, ends with 75, and the
script puts the job back into the queue under its own number, where it goes on as often as it takes. A sweep is a job
array, each member a run of its own.

What it gives up: every node gets the same number of workers, and the folder of the job must be shared by the nodes.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from pipeline.config import Config
from pipeline.errors import ConfigError, RunError
from pipeline.submit import code
from pipeline.submit.slurm_lint import lint
from pipeline.submit.slurm_script import BODY, SCRIPT
from pipeline.submit.submission import CONFIG, SENT, State, Submission

WARNING_SECONDS = 120  # before the time limit; Slurm itself may be up to a minute early
OWN = ("nodes", "python", "warning", "secrets", "container")  # options that are not sbatch's, or are more than that
ANSWER_SECONDS = 60.0

__all__ = ["lint", "logs", "reach", "render", "status", "stop", "submit"]


def render(config: Config, run: Submission) -> dict[str, str]:
    """`job.sbatch` and the configuration, or one configuration per member of the array.

    Of `run.options`: nodes (1), python (the one of FOLDER/.venv), warning (120: seconds before the time limit),
    secrets (a file at the target that exports them), container (pyxis or apptainer, for `run.image`); any other is a
    long option of sbatch, such as partition, time, account, mem.
    """
    own = {name: run.options[name] for name in OWN if name in run.options}
    given = {name: value for name, value in run.options.items() if name not in OWN}
    configs = {f"config-{member}.yaml": text for member, text in enumerate(run.sweep)} or {CONFIG: run.text}
    head = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}" for name, value in _sbatch(run, given).items()),
        f"# Rendered by `millstream submit slurm` from {run.source.name!r}; change that, not this.",
        *(f"{name}={value}" for name, value in _variables(run, own).items()),
        "",
    ]
    return {SCRIPT: "\n".join(head) + BODY.read_text(), **configs}


def reach(run: Submission) -> list[str]:
    """Raises RunError where there is no Slurm, and where the job's folder is not that of the nodes."""
    _ask(["sbatch", "--version"])
    if not Path(run.folder).is_dir():
        raise RunError(f"there is no {run.folder} here: submit from a machine that shares --folder with the nodes")
    return []


def submit(rendered: Mapping[str, str], run: Submission) -> str:
    """Queue the job; its id is the path of its log without the ending: the folder of what was sent, and its number."""
    folder = Path(home(run))
    code.stage(run.files, folder / "code")
    command = ["sbatch", "--parsable", str(folder / SCRIPT)]
    number = _ask(command).strip().partition(";")[0]
    return str(folder / number)


def nodes(options: Mapping[str, str]) -> int:
    """The fixed number of nodes that was asked for. Raises ConfigError when it is none."""
    asked = options.get("nodes", "1")
    if not re.fullmatch(r"[1-9]\d*", asked):
        raise ConfigError(f"nodes={asked} is not one number of nodes; the world size follows from it: -o nodes=2")
    return int(asked)


def home(run: Submission) -> PurePosixPath:
    """The folder of what is sent and of what the job says, on storage that all nodes share."""
    return run.folder / SENT / run.name


def status(id: str) -> State:
    """What became of a job; of an array, what is most alive in it."""
    number = _number(id)
    try:
        shown = _ask(["scontrol", "--oneliner", "show", "job", number])
    except RunError as error:
        if "Invalid job id" not in str(error):
            raise
        return _accounted(number)
    found = [_state(line) for line in shown.splitlines() if "JobState=" in line]
    order = ["running", "waiting", "failed", "stopped", "done", "unknown"]
    return min(found, key=lambda state: order.index(state.word), default=State("unknown", shown.strip()))


def logs(id: str) -> str:
    """All that a job has said, each start after the one before; of an array, member after member."""
    folder, number = Path(id).parent, Path(id).name
    files = [folder / f"{number}.log", *sorted(folder.glob(f"{number}_*.log"))]
    return "".join(path.read_text(errors="replace") for path in files if path.is_file())


def stop(id: str) -> None:
    """A running job saves and ends and is not queued again; one that waits is taken out of the queue."""
    number, state = _number(id), status(id)
    if state.over:
        return
    _ask(["scancel", "--state=PENDING", number])
    if state.word == "running":
        _ask(["scontrol", "update", f"JobId={number}", "Requeue=0"])
        _ask(["scancel", "--batch", "--signal=USR1", number])


def _sbatch(run: Submission, given: Mapping[str, str]) -> dict[str, str]:
    """Options of sbatch: ours, and those that were given, which come last and win where they may."""
    per_node = -(-run.workers // nodes(run.options))
    log = home(run) / ("%A_%a.log" if run.sweep else "%j.log")
    warning = run.options.get("warning", str(WARNING_SECONDS))
    elastic = {"no-kill": ""} if run.elastic else {}
    return {
        "job-name": run.name,
        "nodes": str(nodes(run.options)),
        "ntasks-per-node": "1",
        "cpus-per-task": str(per_node * run.threads + 1),  # one for the driver and Ray's own processes
        **({"gpus-per-node": str(per_node * run.gpus)} if run.gpus else {}),
        **({"array": f"0-{len(run.sweep) - 1}"} if run.sweep else {}),
        "signal": f"B:USR1@{warning}",
        "requeue": "",
        **elastic,
        "open-mode": "append",
        "export": "HOME,PATH,USER,LANG",  # of the environment here no more goes along: secrets are in it
        "output": str(log),
        **given,
    }


def _variables(run: Submission, own: Mapping[str, str]) -> dict[str, str]:
    """The assignments above the body, their values in bash's words."""
    folder, quote = run.folder, shlex.quote
    per_node = -(-run.workers // nodes(own))
    python = own.get("python") or ("python" if run.image else str(folder / ".venv/bin/python"))
    step: list[str] = []
    inside: list[str] = []
    if run.image and _container(run.image, own) == "apptainer":
        inside = ["apptainer", "exec", *(["--nv"] if run.gpus else []), "--bind", str(folder), run.image]
    elif run.image:
        step = [f"--container-image={run.image}", f"--container-mounts={folder}:{folder}"]
    config = "config-$SLURM_ARRAY_TASK_ID.yaml" if run.sweep else CONFIG
    return {
        "FOLDER": quote(str(folder)),
        "JOB": quote(str(home(run))),
        "CONFIG": f"$JOB/{config}",
        "CODE": "$JOB/code:$FOLDER" if run.files else "$FOLDER",
        "PYTHON": quote(python),
        "SLOTS": str(per_node * run.threads),
        "GPUS": str(per_node * run.gpus),
        "GRACE": quote(own.get("warning", str(WARNING_SECONDS))),
        "SECRETS": quote(own.get("secrets", "")),
        "STEP": f"({shlex.join(step)})",
        "INSIDE": f"({shlex.join(inside)})",
    }


def _container(image: str, own: Mapping[str, str]) -> str:
    return own.get("container") or ("apptainer" if image.endswith(".sif") else "pyxis")


def _state(line: str) -> State:
    """One line of `scontrol show job`."""
    facts = dict(re.findall(r"(\w+)=(\S*)", line))
    return _word(facts.get("JobState", ""), facts.get("ExitCode", ""), facts.get("Reason", ""))


def _accounted(number: str) -> State:
    """What accounting remembers of a job that the controller has forgotten, where there is accounting."""
    try:
        told = _ask(
            ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={number}", "--format=State,ExitCode"]
        )
    except RunError:
        told = ""
    first = next(iter(told.splitlines()), "")
    if not first:
        return State("unknown", "Slurm remembers it no more; the log and the run folder say what became of it")
    state, _, exit_code = first.partition("|")
    return _word(state.split()[0], exit_code, "")


def _word(state: str, exit_code: str, reason: str) -> State:
    detail = f"{state}, exit code {exit_code}" if exit_code not in ("", "0:0") else state
    detail += f", {reason}" if reason not in ("", "None") else ""
    if state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "CONFIGURING", "SUSPENDED"):
        return State("waiting", detail)
    if state in ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING"):
        return State("running", detail)
    if state == "COMPLETED":
        return State("done", detail)
    return State("stopped" if state == "CANCELLED" or exit_code == "75:0" else "failed", detail)


def _number(id: str) -> str:
    number = Path(id).name
    if not re.fullmatch(r"\d+", number):
        raise RunError(f"{id} is no job of Slurm: it should end with the job's number")
    return number


def _ask(command: list[str]) -> str:
    """What a command of Slurm prints. Raises RunError with what it complains of."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise RunError(f"there is no {command[0]} here: run this on a login node of the Slurm cluster") from None
    except subprocess.TimeoutExpired:
        raise RunError(f"Slurm did not answer `{shlex.join(command)}` within {ANSWER_SECONDS:.0f} s") from None
    if done.returncode:
        raise RunError(f"`{shlex.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
