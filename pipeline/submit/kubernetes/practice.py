"""What a RayJob or RayCluster regrets while it runs, though API server and operator take it without a word.

Each function is one rule, and says what would happen and where that is known from. `pod.go` is
ray-operator/controllers/ray/common/pod.go of KubeRay 1.7.0. What it gives up: what only one site knows (names of its
nodes, storage and resources) is not asked.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from pipeline.submit.kubernetes.manifest import (
    CONFIGMAP_MOUNT,
    Found,
    Run,
    items,
    quantity,
    section,
    text,
    value,
)
from pipeline.submit.kubernetes.rules import Rule

DRAIN, STOP_WAIT = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "RAY_JOB_STOP_WAIT_TIME_S"
SHORTEST_DRAIN, LEAST_AFTER = 60, 10  # seconds to finish a step and save; and to end after that
SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL)S?(_ID)?$", re.IGNORECASE)
SAID = re.compile(r"(?i)(token|secret|password|passwd|api_?key|access_?key)\w*[\"']?\s*[:=]\s*[\"']?[^\s\"'$]")
GPU = "nvidia.com/gpu"
# A reference as registries have it (github.com/distribution/reference, regexp.go): registry, path, tag, digest.
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
REFERENCE = re.compile(
    rf"(?:(?:localhost|[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+|[A-Za-z0-9.-]+:\d+)/)?{_PART}(?:/{_PART})*"
    r"(?::\w[\w.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)


def version(run: Run) -> Iterator[Found]:
    """pod.go: without it, or before 2.53, the probes are `wget`, which a slim image has not: never ready."""
    if not run.cluster.get("rayVersion"):
        yield Found(f"{run.at}.rayVersion", "is not set: an image without wget is never ready", "set it")


def token(run: Run) -> Iterator[Found]:
    """CVE-2023-48022: whoever reaches the head of a cluster without authentication runs what he likes on it."""
    if value(run.cluster, "authOptions.mode") != "token":
        yield Found(f"{run.at}.authOptions.mode", "is not token: whoever reaches the head runs code", "set mode: token")
    for container in (each for _, each in run.ray_containers):
        for key in sorted({"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & set(container.env)):
            yield Found(f"{container.place}.env", f"{key} is the operator's to set", "leave it out")


def exposure(run: Run) -> Iterator[Found]:
    """The dashboard speaks plain HTTP, so its token is read on the way to whoever is let in from outside."""
    head = run.head
    if head.group.get("serviceType", "ClusterIP") != "ClusterIP":
        message = f"{head.group['serviceType']} shows the dashboard outside, in plain HTTP"
        yield Found(f"{head.place}.serviceType", message, "ClusterIP, and `kubectl port-forward`")
    if head.group.get("enableIngress"):
        yield Found(f"{head.place}.enableIngress", "shows the dashboard outside", "leave it out")


def shared_memory(run: Run) -> Iterator[Found]:
    """Ray's objects, gloo and NCCL live in /dev/shm; a container's own is 64 MiB, a memory volume counts as memory."""
    for pods, container in run.ray_containers:
        mount = container.mounts.get("/dev/shm")
        volume = section(pods.volumes.get(text(mount, "name")), "emptyDir")
        if not mount or volume.get("medium") != "Memory":
            message = "/dev/shm is not a volume of medium Memory"
            yield Found(f"{container.place}.volumeMounts", message, "emptyDir: {medium: Memory, sizeLimit: 1Gi}")
            continue
        size, place = quantity(volume.get("sizeLimit")), f"{pods.spec_place}.volumes"
        limit = quantity(value(container.values, "resources.limits.memory"))
        store = quantity(pods.params.get("object-store-memory"))
        if size is None:
            yield Found(place, "/dev/shm has no sizeLimit: it may take all memory of the node", "set sizeLimit")
        elif limit is not None and size >= limit:
            yield Found(place, "/dev/shm counts as memory, and may be as large as the limit", "a smaller sizeLimit")
        elif store is not None and store > size:
            message = "is larger than /dev/shm, which must hold it"
            yield Found(f"{pods.place}.rayStartParams.object-store-memory", message, "a larger sizeLimit")


def graceful_end(run: Run) -> Iterator[Found]:
    """`ray start` drains its node at SIGTERM, which makes the run save; the kubelet kills when the grace is over.

    Both are 30 s unless set: the pod is killed just as the drain ends.
    """
    for pods, container in run.ray_containers:
        drain = quantity(text(container.env.get(DRAIN), "value"))
        grace, place = pods.spec.get("terminationGracePeriodSeconds", 30), f"{container.place}.env"
        if drain is None:
            yield Found(place, f"{DRAIN} is not set", f"{SHORTEST_DRAIN} or more, less than the grace period")
        elif drain < SHORTEST_DRAIN:
            yield Found(
                place, f"{DRAIN} is {drain:.0f} s, too short for a step and a save", f"{SHORTEST_DRAIN} or more"
            )
        if isinstance(grace, int) and grace < (drain or 0) + LEAST_AFTER:
            message = f"{grace} s are over before the drain of {drain or 0:.0f} s has ended"
            where = f"{pods.spec_place}.terminationGracePeriodSeconds"
            yield Found(where, message, f"{(drain or SHORTEST_DRAIN) + LEAST_AFTER:.0f} or more")
    container = next(iter(run.head.containers), None)
    wait = quantity(text(container.env.get(STOP_WAIT), "value")) if container else None
    if container and run.job is not None and (wait or 0) < SHORTEST_DRAIN:
        message = (
            f"{STOP_WAIT} is {'not set' if wait is None else f'{wait:.0f} s'}: a job that is stopped is killed unsaved"
        )
        yield Found(f"{container.place}.env", message, f"{SHORTEST_DRAIN} or more (Ray's default is 3)")


def images(run: Run) -> Iterator[Found]:
    """A tag that moves gives a retry other code; Ray refuses to join nodes of two versions; a kubelet waits for ever
    for what is no name (InvalidImageName).
    """
    seen: dict[str, str] = {}
    for pods in run.all_pods:
        for container in pods.containers[:1]:
            image, place = text(container.values, "image"), f"{container.place}.image"
            tag = image.rpartition("/")[2].partition(":")[2]
            if not image:
                yield Found(place, "is not set", "--image registry/name@sha256:...")
            elif not REFERENCE.fullmatch(image):
                message = f"{image} is no name that an image can have"
                yield Found(place, message, "such as registry.example.com/lab/millstream@sha256:DIGEST")
            elif "@sha256:" not in image and tag in ("", "latest"):
                message = f"{image} is another image tomorrow"
                yield Found(place, message, "name it by digest, registry/name@sha256:..., or by a version")
            seen.setdefault(image, container.place)
    if len(seen) > 1:
        message = f"{len(seen)} images in one cluster: {', '.join(seen)}"
        yield Found(list(seen.values())[-1] + ".image", message, "one image for all")


def secrets(run: Run) -> Iterator[Found]:
    """Manifests, runtime environments and entrypoints are stored in the open and shown by the dashboard."""
    for container in (each for pods in run.all_pods for each in pods.all_containers):
        for name, item in container.env.items():
            if SECRET.search(name) and item.get("value"):
                message = f"{name} holds a secret in the open"
                yield Found(f"{container.place}.env", message, "valueFrom: {secretKeyRef: ...}, or -o secret=NAME")
    for key in ("runtimeEnvYAML", "entrypoint"):
        if SAID.search(text(run.job, key)):
            yield Found(f"spec.{key}", "holds a secret in the open", "keep it in a Secret, -o secret=NAME")
    for manifest in run.beside:
        if manifest.kind == "Secret" and (manifest.values.get("data") or manifest.values.get("stringData")):
            yield Found("spec", f"the Secret {manifest.name} goes along in the open", "make it with kubectl, once")


def variables(run: Run) -> Iterator[Found]:
    """Of a name that stands twice the last counts, whoever set it."""
    for container in (each for pods in run.all_pods for each in pods.all_containers):
        names = [text(item, "name") for item in items(container.values, "env")]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield Found(f"{container.place}.env", f"{name} is set twice", "keep one")


def entrypoint(run: Run) -> Iterator[Found]:
    """It goes unquoted into a shell of the submitter's, and then through one of Ray's."""
    if run.job is None:
        return
    place, said = "spec.entrypoint", text(run.job, "entrypoint")
    if not said:
        yield Found(place, "is missing", f"exec python -m pipeline train {CONFIGMAP_MOUNT}/config.yaml")
        return
    words = said.split()
    if shlex.join(words) != said:
        yield Found(place, "holds what a shell would run or expand", "one command in plain words")
        return
    if words[0] != "exec":
        message = "leaves a shell between Ray and the driver, which dies of the signal that should make it save"
        yield Found(place, message, "begin it with exec")
    for word, why in (("--fresh", "every retry would begin anew"), ("--address", "the job knows its own cluster")):
        if word in words:
            yield Found(place, f"{word}: {why}", "leave it out")


def head_rests(run: Run) -> Iterator[Found]:
    """config/samples of KubeRay: training on the head takes driver and GCS down when it runs out of memory."""
    for key in ("num-cpus", "num-gpus"):
        if str(run.head.params.get(key)) != "0":
            message = f"{key} is {run.head.params.get(key, 'not set')}: workers would land on the head"
            yield Found(f"{run.head.place}.rayStartParams", message, f'{key}: "0"')


def limits(run: Run) -> Iterator[Found]:
    """Ray takes the limits for what it has; extended resources must be requested as they are limited (core docs)."""
    for container in (each for _, each in run.ray_containers):
        limit, request = (section(container.values, f"resources.{key}") for key in ("limits", "requests"))
        for key in ("cpu", "memory"):
            if key not in limit:
                yield Found(f"{container.place}.resources", f"{key} has no limit: Ray takes the node's", "set one")
        for key in sorted({key for key in {*limit, *request} if "/" in str(key) or key == "memory"}):
            if quantity(limit.get(key)) != quantity(request.get(key)):
                message = f"{key}: requested {request.get(key)}, limit {limit.get(key)}"
                yield Found(f"{container.place}.resources", message, "make them equal")


def lasting(run: Run) -> Iterator[Found]:
    """A lost head ends its cluster, and only a retry goes on; a cluster that is done must not be paid for."""
    if run.job is not None:
        if not run.job.get("backoffLimit") and run.job.get("submissionMode") != "InteractiveMode":
            yield Found("spec.backoffLimit", "is 0: a lost head ends the run", "3, as by default here")
        if not run.job.get("shutdownAfterJobFinishes") and not run.job.get("deletionStrategy"):
            message = "is not true: the cluster stays, with its GPUs, when the run is done"
            yield Found("spec.shutdownAfterJobFinishes", message, "set it to true")


RULES: tuple[Rule, ...] = (
    version,
    token,
    exposure,
    shared_memory,
    graceful_end,
    images,
    secrets,
    variables,
    entrypoint,
)
RULES += (head_rests, limits, lasting)
