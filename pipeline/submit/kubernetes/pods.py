"""The pods of a run: what the spec of its RayCluster says, and the pod that submits its job.

They hold the "restricted" profile: uid 1000, no capability, a root filesystem that cannot be written, /tmp on
the node's disk. Numbers follow from the configuration: `num-cpus` is what workers compute with, the pod's limit has
their decoder threads too. What it gives up: pods of one size; a second kind of node is another run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.config import Config
from pipeline.submit.kubernetes.manifest import CONFIGMAP_MOUNT
from pipeline.submit.kubernetes.practice import DRAIN, GPU, STOP_WAIT
from pipeline.submit.submission import Submission

RAY_VERSION = "2.60.0"  # of the image, which is built by constraints.txt
RUN, PART_OF = "millstream/run", {"app.kubernetes.io/part-of": "millstream"}
GROUP = {"ray.io/group": "workers"}
STORE_BYTES = 200_000_000  # of Ray's object store: samples do not pass through it
GRACE_LEFT = 30  # seconds between the end of the drain and the kubelet's SIGKILL
RESTRICTED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


class Size(NamedTuple):
    """Of the workers' part. slots: workers in a pod.  least: pods without which the run does not start."""

    pods: int
    least: int
    slots: int
    cpus: int
    memory: str
    shm: str


def cluster(config: Config, run: Submission) -> dict[str, Any]:
    size = _size(config, run)
    autoscaled = "autoscale" in run.options
    cluster: dict[str, Any] = {"rayVersion": RAY_VERSION, "authOptions": {"mode": "token"}}
    if redis := run.options.get("redis"):
        password = {"secretKeyRef": {"name": run.options.get("secret", "redis"), "key": "REDIS_PASSWORD"}}
        cluster["gcsFaultToleranceOptions"] = {"redisAddress": redis, "redisPassword": {"valueFrom": password}}
    cluster["enableInTreeAutoscaling"] = autoscaled
    if autoscaled:
        resources = {"cpu": "500m", "memory": "512Mi"}
        options = {"version": "v2", "idleTimeoutSeconds": 300, "securityContext": RESTRICTED}
        cluster["autoscalerOptions"] = {**options, "resources": {"requests": resources, "limits": resources}}
    return cluster | {"headGroupSpec": _head(run, autoscaled), "workerGroupSpecs": [_workers(run, size)]}


def _head(run: Submission, autoscaled: bool) -> dict[str, Any]:
    container = _container(run, "ray-head", {"cpu": "2", "memory": "8Gi"})
    container["env"].append({"name": STOP_WAIT, "value": str(_drain(run))})
    pod = _pod(run, container, _volumes(run, "1Gi"))
    if autoscaled:  # it asks the API server for pods, by a Role that KubeRay makes for this account
        pod["automountServiceAccountToken"] = True
    params = {"num-cpus": "0", "num-gpus": "0", "object-store-memory": str(STORE_BYTES), "dashboard-host": "0.0.0.0"}
    return {
        "serviceType": "ClusterIP",
        "rayStartParams": params,
        "template": {"metadata": {"labels": labels(run)}, "spec": pod},
    }


def _workers(run: Submission, size: Size) -> dict[str, Any]:
    options = run.options
    devices = {GPU: str(size.slots)} if run.gpus else {}
    devices |= {options["rdma"]: "1"} if "rdma" in options else {}
    container = _container(run, "ray-worker", {"cpu": str(size.cpus), "memory": size.memory, **devices})
    interface = options.get("interface", "eth0")
    container["env"] += [{"name": f"{library}_SOCKET_IFNAME", "value": interface} for library in ("GLOO", "NCCL")]
    pod = _pod(run, container, _volumes(run, size.shm))
    selector = dict(options[name].split("=") for name in ("node", "spot") if name in options)
    if selector:
        pod["nodeSelector"] = selector
    taints = [options["spot"].partition("=")[0]] if "spot" in options else []
    taints += [GPU] if run.gpus else []
    if taints:
        pod["tolerations"] = [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in taints]
    if size.pods > 1 and run.gpus:  # collectives want whole hosts
        apart = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {**labels(run), **GROUP}}}
        pod["affinity"] = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}}
    annotations = {}
    if "topology" in options:
        annotations = {"annotations": {"kueue.x-k8s.io/podset-required-topology": options["topology"]}}
    return {
        "groupName": GROUP["ray.io/group"],
        "replicas": size.pods,
        "minReplicas": size.least if "autoscale" in options else size.pods,
        "maxReplicas": size.pods,
        "rayStartParams": {
            "num-cpus": str(size.slots * run.threads),
            **({"num-gpus": str(size.slots)} if run.gpus else {}),
            "object-store-memory": str(STORE_BYTES),
        },
        "template": {"metadata": {"labels": labels(run), **annotations}, "spec": pod},
    }


def _size(config: Config, run: Submission) -> Size:
    pods = int(run.options.get("nodes", 1)) or 1
    slots = -(-run.workers // pods)
    least = config.cluster.min_workers or run.workers
    return Size(
        pods=-(-run.workers // slots),
        least=-(-least // slots),
        slots=slots,
        cpus=slots * (run.threads + max(config.data.threads, config.data.processes)),
        memory=run.options.get("memory", f"{(64 if run.gpus else 4) * slots}Gi"),
        shm=run.options.get("shm", f"{8 * slots}Gi" if run.gpus else "1Gi"),
    )


def _pod(
    run: Submission, container: dict[str, Any], volumes: list[dict[str, Any]], restart: str | None = None
) -> dict[str, Any]:
    grace = {} if restart else {"terminationGracePeriodSeconds": int(run.options.get("grace", 300))}
    priority = {"priorityClassName": run.options["priority"]} if "priority" in run.options else {}
    user = {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000, "fsGroupChangePolicy": "OnRootMismatch"}
    return {
        "serviceAccountName": object_name(run.name),
        "automountServiceAccountToken": False,
        **({"restartPolicy": restart} if restart else {}),
        **grace,
        **priority,
        "securityContext": {"runAsNonRoot": True, **user, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": volumes,
    }


def _container(run: Submission, name: str, resources: Mapping[str, str]) -> dict[str, Any]:
    secret = run.options.get("secret")
    mounts = {"scratch": "/tmp", "shm": "/dev/shm", "config": CONFIGMAP_MOUNT, "storage": str(run.folder)}
    return {
        "name": name,
        "image": run.image,
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": RESTRICTED,
        "env": [
            {"name": "HOME", "value": "/tmp"},
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
            {"name": DRAIN, "value": str(_drain(run))},
        ],
        **({"envFrom": [{"secretRef": {"name": secret}}]} if secret else {}),
        "volumeMounts": [
            {"name": volume, "mountPath": path, **({"readOnly": True} if volume == "config" else {})}
            for volume, path in mounts.items()
        ],
    }


def submitter(run: Submission) -> dict[str, Any]:
    """The pod that asks the head to start the driver, and says what it says."""
    return {"metadata": {"labels": labels(run)}, "spec": _pod(run, _submitter(run), [_scratch("1Gi")], "Never")}


def _submitter(run: Submission) -> dict[str, Any]:
    resources = {"cpu": "500m", "memory": "1Gi"}
    return {
        "name": "ray-job-submitter",
        "image": run.image,
        "resources": {"requests": resources, "limits": resources},
        "securityContext": RESTRICTED,
        "env": [{"name": "HOME", "value": "/tmp"}],
        "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}],
    }


def _volumes(run: Submission, shm: str) -> list[dict[str, Any]]:
    return [
        _scratch("20Gi"),
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shm}},
        {"name": "config", "configMap": {"name": object_name(run.name)}},
        {"name": "storage", "persistentVolumeClaim": {"claimName": run.options.get("claim", "millstream")}},
    ]


def _scratch(size: str) -> dict[str, Any]:
    return {"name": "scratch", "emptyDir": {"sizeLimit": size}}


def _drain(run: Submission) -> int:
    return int(run.options.get("grace", 300)) - GRACE_LEFT


def labels(run: Submission) -> dict[str, str]:
    return {RUN: object_name(run.name), **PART_OF}


def object_name(run: str) -> str:
    """Name of a run's objects: the run's, in the letters that Kubernetes has."""
    return re.sub(r"[._]+", "-", run.lower())
