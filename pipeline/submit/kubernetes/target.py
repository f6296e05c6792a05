"""Kubernetes: a run as a RayJob, which KubeRay's operator turns into a Ray cluster of its own, and retries.

    configuration, options -> render -> lint -> kubectl apply -> RayJob -> pods -> driver -> exit code

Everything goes through kubectl: it knows the contexts, the logins and the certificates of a site. A RayJob that is
stopped is suspended, which sends its pods SIGTERM: they have `grace` seconds to save. A job in a queue of Kueue, which
would resume it, is deleted instead. The id of a job is its place: context/namespace/kind/name.

What it gives up: the log is that of the submitter's pod, which repeats what the driver says; when that pod is gone,
logs/driver.log in the run's folder has it.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pipeline.errors import RunError
from pipeline.submit.kubernetes.lint import lint
from pipeline.submit.kubernetes.manifest import section, text, value
from pipeline.submit.kubernetes.pods import RUN, object_name
from pipeline.submit.kubernetes.render import OPTIONS, render
from pipeline.submit.kubernetes.rules import QUEUE
from pipeline.submit.submission import CONFIG, State, Submission

ANSWER_SECONDS = 60.0
DELETE_SECONDS = 600.0  # for the pods of an old job to save and end
Word = Literal["waiting", "running", "done", "stopped", "failed", "unknown"]
HERE = "-"  # context of an id: the one that kubectl is set to
# status.jobDeploymentStatus of a RayJob (ray-operator/apis/ray/v1/rayjob_types.go)
WORDS: dict[str, Word] = {
    "": "waiting",
    "Initializing": "waiting",
    "Waiting": "waiting",
    "Running": "running",
    "Retrying": "running",
}
WORDS |= {"Suspending": "running", "Suspended": "stopped", "Complete": "done", "Failed": "failed"}
WORDS |= {"ValidationFailed": "failed"}

__all__ = ["OPTIONS", "lint", "logs", "reach", "render", "status", "stop", "submit"]


class Place(NamedTuple):
    """Where a job is. kind: rayjob or raycluster."""

    context: str
    namespace: str
    kind: str
    name: str

    @property
    def kubectl(self) -> list[str]:
        context = [] if self.context == HERE else [f"--context={self.context}"]
        return ["kubectl", *context, f"--namespace={self.namespace}"]

    @property
    def id(self) -> str:
        return "/".join(self)


def reach(run: Submission) -> list[str]:
    """Raises RunError when there is no kubectl, the API server does not answer, or does not let us create jobs."""
    kind = "rayclusters" if "interactive" in run.options else "rayjobs"
    place = Place(run.where or HERE, run.options.get("namespace", "training"), kind, run.name)
    _ask([*place.kubectl, "auth", "can-i", "create", f"{kind}.ray.io"])
    return []


def submit(rendered: Mapping[str, str], run: Submission) -> str:
    """Create or renew all objects, the RayJob last; `run.where` is a context of kubectl.

    An older job of the same run is deleted if it is over. Raises RunError if it is not, or the API server refuses.
    """
    kind = "rayjob" if "rayjob.yaml" in rendered else "raycluster"
    place = Place(run.where or HERE, run.options.get("namespace", "training"), kind, object_name(run.name))
    if before := _find(place):
        state = _state(before, place)
        if not state.over:
            raise RunError(f"{place.id} is {state.word} ({state.detail}): stop it first")
        _ask([*place.kubectl, "delete", kind, place.name, "--wait"], seconds=DELETE_SECONDS)
    last = f"{kind}.yaml"
    others = [content for name, content in rendered.items() if name not in (CONFIG, last)]
    apply = [
        *place.kubectl,
        "apply",
        "--server-side",
        "--field-manager=millstream",
        "--force-conflicts",
        "--validate=strict",
        "-f",
        "-",
    ]
    for content in ("---\n".join(others), rendered[last]):
        if content:
            _ask(apply, given=content)
    return place.id


def status(id: str) -> State:
    """What became of a job, by the operator's last word; one that nobody knows any more was deleted."""
    place = _place(id)
    found = _find(place)
    if not found:
        return State("unknown", "it is not there: it was deleted, or its time to live is over")
    return _state(found, place)


def logs(id: str) -> str:
    """What the driver has said, as the submitter's pod of the newest try repeats it."""
    place = _place(id)
    if place.kind == "rayjob":
        chosen = ["--selector", f"job-name={place.name}", "--container=ray-job-submitter"]
    else:
        chosen = ["--selector", f"{RUN}={place.name},ray.io/node-type=head", "--container=ray-head"]
    return _ask([*place.kubectl, "logs", "--tail=-1", "--ignore-errors", *chosen])


def stop(id: str) -> None:
    """Suspend it: its pods get SIGTERM, save, and end. In a queue of Kueue: delete it, which does the same."""
    place = _place(id)
    found = _find(place)
    if not found or _state(found, place).over:
        return
    if place.kind == "raycluster" or QUEUE in section(found, "metadata.labels"):
        _ask([*place.kubectl, "delete", place.kind, place.name, "--wait=false"])
        return
    patch = json.dumps({"spec": {"suspend": True}})
    _ask([*place.kubectl, "patch", place.kind, place.name, "--type=merge", f"--patch={patch}"])


def _state(found: Mapping[str, Any], place: Place) -> State:
    """In the operator's words. A run that ended by 75 is a failed job to it, to be retried."""
    if place.kind == "raycluster":
        said = text(found, "status.state")
        states: dict[str, Word] = {"ready": "running", "failed": "failed", "suspended": "stopped"}
        return State(states.get(said, "waiting"), said)
    said = text(found, "status.jobDeploymentStatus")
    word: Word = WORDS.get(said, "unknown")
    if not said and value(found, "spec.suspend") is True:
        said = "suspended, waits in its queue" if QUEUE in section(found, "metadata.labels") else "suspended"
    if said == "Suspended" and QUEUE in section(found, "metadata.labels"):
        word = "waiting"
    parts = [said, text(found, "status.jobStatus"), text(found, "status.reason"), text(found, "status.message")]
    return State(word, ", ".join(dict.fromkeys(filter(None, parts))))


def _find(place: Place) -> dict[str, Any]:
    """The object as the API server has it; empty when there is none."""
    said = _ask([*place.kubectl, "get", place.kind, place.name, "--ignore-not-found", "--output=json"])
    return json.loads(said) if said.strip() else {}


def _place(id: str) -> Place:
    parts = id.rsplit("/", 3)  # names of contexts may have slashes
    if len(parts) != 4 or parts[2] not in ("rayjob", "raycluster"):
        raise RunError(f"{id} is no job on Kubernetes: it should look like CONTEXT/NAMESPACE/rayjob/NAME")
    return Place(*parts)


def _ask(command: list[str], *, given: str = "", seconds: float = ANSWER_SECONDS) -> str:
    """What kubectl prints. Raises RunError with what it complains of, and a way to mend it."""
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=seconds)
    except FileNotFoundError:
        raise RunError("there is no kubectl here: install it, and log in to the cluster") from None
    except subprocess.TimeoutExpired:
        raise RunError(f"`{shlex.join(command)}` did not answer within {seconds:.0f} s: is the cluster up?") from None
    if done.returncode:
        said = re.sub(r"^[EWI]\d{4} .*\n", "", done.stderr, flags=re.MULTILINE).strip() or done.stdout.strip()
        raise RunError(f"`{shlex.join(command)}` failed: {said}{_mend(said)}")
    return done.stdout


def _mend(said: str) -> str:
    if re.match(r"no\b(?! matches)", said):  # the answer of `auth can-i`
        return "\n   -> you may not create it there: ask for the Role of k8s/once/submitters.yaml"
    known = {
        "was refused": "is kubectl set to the right cluster? kubectl config get-contexts",
        'no matches for kind "Ray': "KubeRay is not installed there: k8s/README.md, Before the first run",
        "the server doesn't have a resource type 'ray": "KubeRay is not installed there: k8s/README.md",
        "the server doesn't have a resource type \"ray": "KubeRay is not installed there: k8s/README.md",
        'no matches for kind "PodMonitor"': "Prometheus' operator is not installed there: leave out -o monitor",
        "namespaces": "make the namespace once: kubectl apply -k k8s/once",
    }
    return next((f"\n   -> {mend}" for sign, mend in known.items() if sign in said), "")
