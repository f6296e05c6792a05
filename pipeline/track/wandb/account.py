"""Whose W&B it is and how it is spoken to: key, server, id of the run, settings; and what a server has of a run.

What it gives up: a server that is set in W&B's own settings file, and not by WANDB_BASE_URL, is not looked for.
"""

from __future__ import annotations

import base64
import json
import netrc
import os
import secrets
import sys
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from pipeline.errors import RunError

ASK_SECONDS = 10.0
_QUESTION = """query RunResumeStatus($project: String, $entity: String, $name: String!) {
  model(name: $project, entityName: $entity) { bucket(name: $name, missingOk: true) { historyLineCount historyTail } } }
"""


def mode(asked: str) -> str:
    """ "online", "offline" or "off". "auto": what WANDB_MODE says, else online where a key lies ready, else offline."""
    if asked == "auto":
        asked = os.environ.get("WANDB_MODE") or ("online" if key() else "offline")
    return {"online": "online", "offline": "offline", "dryrun": "offline"}.get(asked, "off")


def server() -> str:
    """URL of the W&B server."""
    return (os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").rstrip("/")


def key() -> str | None:
    """The key, from where `wandb login` puts it; None when there is none."""
    if os.environ.get("WANDB_API_KEY"):
        return os.environ["WANDB_API_KEY"]
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            found = path and netrc.netrc(os.path.expanduser(path)).authenticators(urlsplit(server()).netloc)
            if found:
                return found[2]
        except (OSError, netrc.NetrcParseError):
            continue
    return None


def identity(folder: Path, new: bool = False) -> str:
    """The W&B id of this run, kept in run.json: the same in every attempt, until a `new` one is wanted."""
    path, known = folder / "run.json", _facts(folder)
    if new or "wandb_id" not in known:
        known["wandb_id"] = secrets.token_hex(4)
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(known, indent=2) + "\n")
        draft.replace(path)
    return known["wandb_id"]


def known(folder: Path) -> str | None:
    """The W&B id that the run has; None before its first start with W&B."""
    return _facts(folder).get("wandb_id")


def _facts(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return {}


def last_step(project: str, entity: str | None, run: str) -> int:
    """The last step that the server has of a run; -1 when it has none. Raises RunError when it does not answer."""
    asked = {"query": _QUESTION, "variables": {"project": project, "entity": entity, "name": run}}
    login = base64.b64encode(f"api:{key() or ''}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {login}"}
    request = urllib.request.Request(f"{server()}/graphql", json.dumps(asked).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=ASK_SECONDS) as response:
            told = json.load(response)
    except urllib.error.HTTPError as error:
        mend = "; log in again: `wandb login`" if error.code in (401, 403) else "; try again later"
        raise RunError(f"W&B at {server()} refuses to answer ({error.code} {error.reason}){mend}") from error
    except (OSError, ValueError) as error:
        raise RunError(f"no answer from W&B at {server()}: {error}; try again when it can be reached") from error
    if told.get("errors"):
        raise RunError(f"W&B at {server()} answers: {told['errors'][0].get('message')}")
    found = ((told.get("data") or {}).get("model") or {}).get("bucket")
    if not found or not found["historyLineCount"]:
        return -1
    return max((int(json.loads(line)["_step"]) for line in json.loads(found["historyTail"])), default=-1)


def end_service() -> None:
    """End W&B's own process of this one, and W&B's part in this one; what is written stays."""
    end_cores(os.getpid())
    with suppress(Exception, SystemExit):  # else it would be tried at the exit, with a traceback
        if "wandb" in sys.modules:
            sys.modules["wandb"].teardown()


def end_cores(parent: int) -> None:
    """Kill W&B's own process of another one, which may be gone by now."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name().startswith("wandb-core") and f"--pid {parent} " in f"{' '.join(process.cmdline())} ":
                process.kill()


def settings(kind: Any, init_seconds: float, finish_seconds: float) -> Any:
    """W&B's settings. Those beginning with x_ are half private: the ones that a version does not know are left out."""
    wanted = {
        "x_transaction_log_flush_interval": 1.0,  # 15 s by default: a young run that is killed would be lost whole
        "init_timeout": init_seconds,
        "finish_timeout": finish_seconds,  # also honoured at the exit of the process
        "finish_timeout_raises": True,
        "console": "off",
        "silent": True,
        "reinit": "create_new",  # leaves a run of the caller's own alone
        "x_file_stream_retry_max": 8,
        "x_file_stream_retry_wait_max_seconds": 15,
        "x_graphql_retry_max": 5,
        "x_graphql_retry_wait_max_seconds": 10,
        "x_file_transfer_retry_max": 3,
        "x_stats_sampling_interval": 15,
        "x_stats_track_process_tree": True,
    }
    return kind(**{name: value for name, value in wanted.items() if name in kind.model_fields})
