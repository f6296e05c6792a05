"""Ray jobs: the run goes to a cluster that is up already, through the jobs API of its head.

The driver runs on the head, beside Ray's own processes, and its workers where there is room. What is sent is a folder
of code and the configuration (code.py), which Ray unpacks on every node. A job is one start: when it ends with 75, or
its head is lost, `submit resume` starts another, and the run goes on, for its folder follows from its name.

What it gives up: Ray kills a job that is stopped after a while, so a save that takes longer than `stop_seconds` is lost
(the one before is not).
"""

from __future__ import annotations

import json
import re
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.submit import code, head
from pipeline.submit.jobs_lint import REQUEST, lint
from pipeline.submit.submission import CONFIG, State, Submission

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

STOP_SECONDS = 600  # that a job has to save when it is stopped; Ray's own default is 3
PAGE = "/#/jobs/"  # of a job in the dashboard: the id of a job is the address of its page

__all__ = ["lint", "logs", "reach", "render", "status", "stop", "submit"]


def render(config: Config, run: Submission) -> dict[str, str]:
    """`request.json`, what is asked of the jobs API, and the configuration.

    Of `run.options`: python (the interpreter there: `python`), stop_seconds (600).
    """
    python = run.options.get("python", "python")
    request = {
        "entrypoint": f"exec {shlex.quote(python)} -m pipeline train {CONFIG}",
        "entrypoint_num_cpus": 0,
        "runtime_env": {
            "working_dir": ".",
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": run.options.get("stop_seconds", str(STOP_SECONDS))},
        },
        "metadata": {"run": run.name, "folder": str(config.runs / config.name)},
    }
    return {REQUEST: json.dumps(request, indent=2) + "\n", CONFIG: run.text}


def reach(run: Submission) -> list[str]:
    """Raises ConfigError when the head takes jobs from anybody, or not from us; RunError when it does not answer."""
    return head.require_shut(head.address(run.where), insecure="insecure" in run.options)


def submit(rendered: Mapping[str, str], run: Submission) -> str:
    """Send code and request; the id is the address of the job's page."""
    url = head.address(run.where)
    request = json.loads(rendered[REQUEST])
    name = f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with tempfile.TemporaryDirectory(prefix="millstream-job-") as scratch, _client(url) as client:
        folder = Path(scratch) / run.name
        code.stage(run.files, folder)
        for file, text in rendered.items():
            if file != REQUEST:
                (folder / file).write_text(text)
        request["runtime_env"]["working_dir"] = str(folder)
        return url + PAGE + client.submit_job(submission_id=name, **request)


def status(id: str) -> State:
    """What became of a job. Its exit code 75 is a stop that saved."""
    url, name = _apart(id)
    with _client(url) as client:
        facts = client.get_job_info(name)
    said, exit_code = str(facts.status.value), facts.driver_exit_code
    detail = said if exit_code is None else f"{said}, exit code {exit_code}"
    if said in ("PENDING", "RUNNING"):
        return State("waiting" if said == "PENDING" else "running", detail)
    if said == "SUCCEEDED":
        return State("done", detail)
    return State("stopped" if said == "STOPPED" or exit_code == 75 else "failed", detail)


def logs(id: str) -> str:
    url, name = _apart(id)
    with _client(url) as client:
        return client.get_job_logs(name)


def stop(id: str) -> None:
    """Ray sends SIGTERM; the driver finishes its step and saves."""
    url, name = _apart(id)
    with _client(url) as client:
        client.stop_job(name)


def _apart(id: str) -> tuple[str, str]:
    url, page, name = id.partition(PAGE)
    if not page or urlsplit(url).scheme not in ("http", "https") or not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise RunError(f"{id} is no job of a Ray cluster: it should look like http://HOST:8265{PAGE}NAME")
    return url, name


@contextmanager
def _client(url: str) -> Iterator[JobSubmissionClient]:
    """Ray's client with our token; all that it raises becomes a RunError."""
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    headers: dict[str, Any] = {"Authorization": f"Bearer {key}"} if (key := head.token()) else {}
    try:
        yield JobSubmissionClient(url, headers=headers)
    except (OSError, RuntimeError, RayError) as error:
        raise RunError(f"the Ray cluster at {url} refuses: {error}") from error
