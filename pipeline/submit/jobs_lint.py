"""What a Ray head would refuse, ignore or regret in a job request, found before it is sent.

A request runs in a shell on the head, and is shown by its dashboard to everybody with the token: so it runs one
command that is known, and holds no secret. The keys are those of Ray's `JobSubmitRequest`
(ray/dashboard/modules/job/common.py).
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from pipeline.problems import Problem, nearest
from pipeline.submit import config_lint, secrecy
from pipeline.submit.submission import CONFIG

REQUEST = "request.json"
KEYS = ("entrypoint", "entrypoint_num_cpus", "entrypoint_num_gpus", "entrypoint_memory", "entrypoint_resources")
KEYS += ("entrypoint_label_selector", "runtime_env", "metadata")
OTHERS_KEYS = {
    "submission_id": "each start has one of its own, or the second is refused; the run is known by its name",
    "job_id": "it is Ray's to give",
}
ENVIRONMENT = ("working_dir", "env_vars", "config")
OURS = re.compile(r"RAY_(?!JOB_STOP_WAIT_TIME_S$|DATA_|TRAIN_).*|PATH|PYTHONPATH|PYTHONHOME|LD_.*|CUDA_VISIBLE_DEVICES")
WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
SHORTEST_STOP = 30  # seconds for the step in hand and a save
RENDER = "render it again with `millstream submit ray CONFIG --render`"


def lint(rendered: Mapping[str, str]) -> list[Problem]:
    """Problems of a rendered `request.json` and of the configuration beside it."""
    configs, problems = config_lint.read(rendered)
    request: Any = None
    try:
        request = json.loads(rendered[REQUEST])
    except KeyError:
        problems.append(Problem(REQUEST, "is not among what is sent", suggestion=RENDER))
    except json.JSONDecodeError as error:
        problems.append(Problem(REQUEST, f"is not JSON: {error.msg}", error.lineno, RENDER))
    if isinstance(request, Mapping):
        problems += [*_keys(request), *_entrypoint(request, rendered), *_environment(request), *_resources(request)]
        problems += _metadata(request, configs)
    elif request is not None:
        problems.append(Problem(REQUEST, "is no request: it should be { ... }", suggestion=RENDER))
    return [*problems, *config_lint.problems(configs), *secrecy.problems(rendered)]


def _say(place: str, message: str, mend: str = RENDER) -> Problem:
    return Problem(f"{REQUEST}: {place}", message, suggestion=mend)


def _keys(request: Mapping[str, Any]) -> list[Problem]:
    found = [_say(key, f"cannot be: {why}", "leave it out") for key, why in OTHERS_KEYS.items() if key in request]
    for key in request:
        if key not in (*KEYS, *OTHERS_KEYS):
            found.append(_say(key, "is no key of a job request", nearest(key, KEYS) or ", ".join(KEYS)))
    return found


def _entrypoint(request: Mapping[str, Any], rendered: Mapping[str, str]) -> list[Problem]:
    """`exec PYTHON -m pipeline train config.yaml`, word by word."""
    place, text = "entrypoint", request.get("entrypoint")
    if not isinstance(text, str) or not text.strip():
        return [_say(place, "is missing")]
    try:
        words = shlex.split(text)
    except ValueError:
        return [_say(place, "has a quote that is left open")]
    if shlex.join(words) != text:
        return [_say(place, "holds what the head's shell would run or expand", "one command, in plain words")]
    found = []
    if words[0] != "exec":
        message = "leaves a shell between Ray and the driver, which dies of the signal that should make it save"
        found.append(_say(place, message, "begin it with exec"))
    else:
        words = words[1:]
    if words[1:4] != ["-m", "pipeline", "train"]:
        found.append(_say(place, "does not train", f"exec python -m pipeline train {CONFIG}"))
        return found
    file, flags = [word for word in words[4:] if not word.startswith("-")], [w for w in words[4:] if w.startswith("-")]
    if not file or file[0] not in rendered:
        found.append(_say(place, f"names {file[0] if file else 'no configuration'}, which is not sent", CONFIG))
    if file[1:]:
        found.append(_say(place, f"{' '.join(file[1:])} belongs into the configuration", "give it to submit"))
    for flag in flags:
        why = {"--fresh": "every start would begin a new run", "--address": "the job stands on its own cluster"}
        found.append(_say(place, f"{flag}: {why.get(flag, 'is nothing that a job may have')}", "leave it out"))
    return found


def _environment(request: Mapping[str, Any]) -> list[Problem]:
    environment = request.get("runtime_env")
    if not isinstance(environment, Mapping):
        return [_say("runtime_env", "is missing, or no section")]
    found = []
    for key in environment:
        if key not in ENVIRONMENT:
            mend = nearest(key, ENVIRONMENT) or "install packages where Ray is, or put them into its image"
            found.append(_say(f"runtime_env.{key}", "would be built on every node at every start", mend))
    folder = environment.get("working_dir")
    if folder != ".":
        message = f"is {folder!r}, not what was chosen to be sent"
        found.append(_say("runtime_env.working_dir", message, 'write "."; --installed sends no code'))
    variables = environment.get("env_vars", {})
    if not isinstance(variables, Mapping):
        return [*found, _say("runtime_env.env_vars", "is no section")]
    for name, value in variables.items():
        place = f"runtime_env.env_vars.{name}"
        if not isinstance(value, str):
            found.append(_say(place, f"{value!r} is no text, and Ray takes nothing else", f'write "{value}"'))
        if secrecy.CALLED.search(name):
            found.append(_say(place, "is called a secret, and requests are shown by the dashboard", secrecy.MEND))
        elif OURS.fullmatch(name):
            found.append(_say(place, "is set by the cluster, and another value breaks it", "leave it out"))
    wait = variables.get(WAIT)
    if not isinstance(wait, str) or not wait.isdigit() or int(wait) < SHORTEST_STOP:
        message = f"{wait or 'is missing'}: a job that is stopped would be killed before it has saved"
        found.append(_say(f"runtime_env.env_vars.{WAIT}", message, "-o stop_seconds=600"))
    return found


def _resources(request: Mapping[str, Any]) -> list[Problem]:
    found = []
    for key in ("entrypoint_num_cpus", "entrypoint_num_gpus", "entrypoint_memory"):
        amount = request.get(key)
        if amount is None:
            continue
        if isinstance(amount, bool) or not isinstance(amount, int | float) or amount < 0:
            found.append(_say(key, f"{amount!r} is no amount", "leave it out"))
        elif key == "entrypoint_num_gpus" and amount:
            found.append(_say(key, "the driver uses no GPU, and its workers would have one less", "leave it out"))
    resources = request.get("entrypoint_resources")
    if resources is not None and not (
        isinstance(resources, Mapping) and all(isinstance(amount, int | float) for amount in resources.values())
    ):
        found.append(_say("entrypoint_resources", "is no section of amounts", "leave it out"))
    return found


def _metadata(request: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    metadata = request.get("metadata", {})
    if not isinstance(metadata, Mapping) or not all(isinstance(value, str) for value in metadata.values()):
        return [_say("metadata", "holds what is no text, and Ray takes nothing else")]
    found, values = [], configs.get(CONFIG)
    if values is not None:
        told = {"run": str(values.get("name")), "folder": f"{values.get('runs')}/{values.get('name')}"}
        for key, want in told.items():
            if metadata.get(key) != want:
                found.append(_say(f"metadata.{key}", f"is {metadata.get(key)!r}, the configuration says {want!r}"))
    return found
