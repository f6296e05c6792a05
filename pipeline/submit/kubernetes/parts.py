"""Whether the parts of a manifest, and of the configuration in it, fit each other.

Each function is one rule. What it gives up: objects that are on the cluster already (claims, Secrets, queues) are taken
to be what they are called.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from pipeline.submit.kubernetes.manifest import Found, Pods, Run, items, quantity, section, text, value
from pipeline.submit.kubernetes.practice import GPU
from pipeline.submit.kubernetes.rules import Rule


def volumes(run: Run) -> Iterator[Found]:
    """Core validation: every mount has its volume, and no two are at one path."""
    for pods in run.all_pods:
        for container in pods.all_containers:
            paths = [text(mount, "mountPath") for mount in items(container.values, "volumeMounts")]
            for path in sorted({path for path in paths if paths.count(path) > 1}):
                yield Found(f"{container.place}.volumeMounts", f"two volumes at {path}", "keep one")
            for path, mount in container.mounts.items():
                if text(mount, "name") not in pods.volumes:
                    message = f"{path} is on volume {text(mount, 'name')!r}, which there is not"
                    yield Found(f"{container.place}.volumeMounts", message, "add it to volumes")


def configuration(run: Run) -> Iterator[Found]:
    """The file that the entrypoint names is one that a mounted ConfigMap holds, and it is mounted on the head."""
    paths = [word for word in text(run.job, "entrypoint").split() if word.endswith((".yaml", ".yml"))]
    held = {manifest.name: section(manifest.values, "data") for manifest in run.beside if manifest.kind == "ConfigMap"}
    for container in run.head.containers[:1]:
        for path in map(PurePosixPath, paths):
            mount = container.mounts.get(str(path.parent))
            name = text(run.head.volumes.get(text(mount, "name")), "configMap.name")
            if not mount:
                yield Found("spec.entrypoint", f"{path} is on no volume of the head", f"mount it at {path.parent}")
            elif name and path.name not in held.get(name, {}):
                yield Found("spec.entrypoint", f"ConfigMap {name!r} holds no {path.name}", "render it again")


def storage(run: Run) -> Iterator[Found]:
    """The run's folder is on a claim that head and workers share: all else is gone with its pod."""
    folder = run.config.get("runs")
    if not isinstance(folder, str):
        return
    claims: set[str] = set()
    for pods, container in run.ray_containers:
        claim = ""
        for path, mount in container.mounts.items():
            if PurePosixPath(folder).is_relative_to(path):
                claim = text(pods.volumes.get(text(mount, "name")), "persistentVolumeClaim.claimName") or claim
        if not claim:
            message = f"runs: {folder} is on no claim, and a retry would find nothing to go on with"
            yield Found(f"{container.place}.volumeMounts", message, "--folder at the claim's mountPath")
        claims.add(claim)
    if len(claims - {""}) > 1:
        yield Found(run.at, f"runs: {folder} is on {len(claims)} claims", "one claim that all pods mount")


def room(run: Run) -> Iterator[Found]:
    """All workers of the configuration find a place in the pods that are asked for."""
    cluster = section(run.config, "cluster")
    least = cluster.get("min_workers") or cluster.get("workers", 2)
    threads = cluster.get("threads_per_worker", 1)
    if not run.config or not isinstance(least, int) or not isinstance(threads, int):
        return
    slots = sum(_slots(pods, threads, bool(cluster.get("gpu"))) for pods in run.workers)
    if slots < least:
        kind = "with a GPU" if cluster.get("gpu") else f"of {threads} thread(s)"
        message = f"pods hold {slots} workers {kind}, the run needs {least}"
        yield Found(f"{run.at}.workerGroupSpecs", message, "more replicas, or larger pods")


def protection(run: Run) -> Iterator[Found]:
    """A drain of a node must not take the head; a policy that selects the pods must let them talk to each other."""
    labels = run.head.labels
    policies = [each for each in run.beside if each.kind == "NetworkPolicy" and _selects(each, "podSelector", labels)]
    budgets = [each for each in run.beside if each.kind == "PodDisruptionBudget" and _selects(each, "selector", labels)]
    if not policies:
        yield Found(run.head.template_place, "no NetworkPolicy selects the pods", "render it again")
    inside = [
        rule
        for policy in policies
        for rule in items(policy.values, "spec.ingress")
        for peer in items(rule, "from")
        if not rule.get("ports") and _matches(section(peer, "podSelector"), labels) and "podSelector" in peer
    ]
    if policies and not inside:
        yield Found(run.head.template_place, "the NetworkPolicy keeps the pods from each other", "render it again")
    if not any(value(each.values, "spec.maxUnavailable") == 0 for each in budgets):
        message = "no PodDisruptionBudget with maxUnavailable 0 holds the head"
        yield Found(run.head.template_place, message, "render it again")


def _slots(pods: Pods, threads: int, gpu: bool) -> int:
    limit = section(pods.containers[0].values, "resources.limits") if pods.containers else {}
    cpus = quantity(pods.params.get("num-cpus", limit.get("cpu"))) or 0
    slots = int(cpus // max(1, threads))
    return pods.replicas * (min(slots, int(quantity(limit.get(GPU, 0)) or 0)) if gpu else slots)


def _selects(manifest: object, key: str, labels: dict[str, object]) -> bool:
    return _matches(section(getattr(manifest, "values", {}), f"spec.{key}"), {**labels, "ray.io/node-type": "head"})


def _matches(selector: dict[str, object], labels: dict[str, object]) -> bool:
    return all(labels.get(key) == want for key, want in section(selector, "matchLabels").items())


RULES: tuple[Rule, ...] = (volumes, configuration, storage, room, protection)
