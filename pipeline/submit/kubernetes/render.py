"""A run as objects of Kubernetes: a RayJob that KubeRay turns into pods, and what guards and feeds it.

    head      driver, Ray's own processes, no training
    workers   `nodes` pods, each with its share of the workers
    submitter asks the head to start the driver, and says what it says

Code is in the image, configuration in a ConfigMap, runs and data on a claim that all pods mount at the run's `folder`,
secrets in a Secret that is only named here. What it gives up: a manifest that is changed by hand is another run's; keys
that are not an option are patched over it (k8s/README.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from pipeline import yaml_file
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.problems import nearest
from pipeline.submit.kubernetes import pods
from pipeline.submit.kubernetes.manifest import CONFIGMAP_MOUNT
from pipeline.submit.kubernetes.rules import QUEUE
from pipeline.submit.submission import CONFIG, Submission

ENTRYPOINT = f"exec python -m pipeline train {CONFIGMAP_MOUNT}/{CONFIG}"
OPTIONS = {
    "namespace": "of all objects; training",
    "nodes": "worker pods; 1",
    "claim": "PersistentVolumeClaim that is mounted at --folder; millstream",
    "memory": "of a worker pod; 4Gi a worker, 64Gi with a GPU",
    "shm": "part of it that is /dev/shm; 1Gi, 8Gi a GPU",
    "grace": "seconds that a pod has to save and end; 300",
    "retries": "new clusters after the first is lost; 3",
    "secret": "a Secret whose keys become environment variables, such as WANDB_API_KEY",
    "node": "LABEL=VALUE of the nodes that workers run on",
    "spot": "LABEL=VALUE of nodes that may be taken away; their taint is tolerated",
    "rdma": "resource of RDMA devices, such as rdma/ib; one a pod",
    "interface": "network card of the pods; eth0",
    "priority": "PriorityClass of the pods",
    "queue": "LocalQueue of Kueue: starts suspended",
    "topology": "level of Kueue's topology that holds all workers",
    "volcano": "queue of Volcano, where the operator schedules with it",
    "autoscale": "flag: pods that nothing uses are given back, down to cluster.min_workers",
    "redis": "HOST:PORT where the state of Ray's head outlives it",
    "monitor": "namespace of Prometheus: adds a PodMonitor",
    "operator": "namespace of KubeRay; kuberay-system",
    "interactive": "flag: a RayCluster to work on by hand, no job",
}


class Dumper(yaml_file.Dumper):
    """Every value written out where it stands, text of several lines as it reads."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def render(config: Config, run: Submission) -> dict[str, str]:
    """rayjob.yaml or raycluster.yaml, and configmap, account, network, disruption and, if asked for, monitor.yaml.

    `OPTIONS` says what `run.options` may hold. Raises ConfigError for what cannot be said in a manifest.
    """
    _refuse(run)
    kind = "RayCluster" if "interactive" in run.options else "RayJob"
    objects = {
        kind.lower(): _run(config, run, kind),
        "configmap": _object(run, "v1", "ConfigMap", data={CONFIG: run.text}),
        "account": _object(run, "v1", "ServiceAccount", automountServiceAccountToken=False),
        "network": _object(run, "networking.k8s.io/v1", "NetworkPolicy", spec=_network(run)),
        "disruption": _object(run, "policy/v1", "PodDisruptionBudget", spec=_disruption(run)),
    }
    if run.options.get("monitor"):
        objects["monitor"] = _object(run, "monitoring.coreos.com/v1", "PodMonitor", spec=_monitor(run))
    return {f"{name}.yaml": dump(values) for name, values in objects.items()} | {CONFIG: run.text}


def dump(values: Mapping[str, Any]) -> str:
    return yaml.dump(dict(values), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def _refuse(run: Submission) -> None:
    for name in run.options:
        if name not in OPTIONS:
            raise ConfigError(f"-o {name}: there is no such option; {nearest(name, OPTIONS) or ', '.join(OPTIONS)}")
    if run.image is None:
        raise ConfigError("pods need an image with Millstream in it: --image registry/millstream@sha256:...")
    if run.workers < 1:
        raise ConfigError("cluster.workers: 0 workers need no cluster: set it to at least 1; 0 is for debugging, here")
    if run.files:
        raise ConfigError(f"pods take their code from the image: put {', '.join(sorted(run.files)[:3])} into it")
    if run.sweep:
        raise ConfigError("a sweep is one job per run on Kubernetes: submit each with a name of its own")
    for name in ("nodes", "grace", "retries"):
        if not re.fullmatch(r"\d+", run.options.get(name, "0")):
            raise ConfigError(f"-o {name}={run.options[name]} is no whole number")
    for name in ("node", "spot"):
        if name in run.options and not re.fullmatch(r"[^=\s]+=[^=\s]*", run.options[name]):
            raise ConfigError(f"-o {name}={run.options[name]} is no LABEL=VALUE of nodes")


def _object(
    run: Submission, api: str, kind: str, labels: Mapping[str, str] | None = None, **rest: Any
) -> dict[str, Any]:
    metadata = {
        "name": pods.object_name(run.name),
        "namespace": run.options.get("namespace", "training"),
        "labels": {pods.RUN: pods.object_name(run.name), **pods.PART_OF, **(labels or {})},
    }
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **rest}


def _run(config: Config, run: Submission, kind: str) -> dict[str, Any]:
    queue, volcano, priority = (run.options.get(name) for name in ("queue", "volcano", "priority"))
    labels = {QUEUE: queue} if queue else {}
    labels |= {"volcano.sh/queue-name": volcano} if volcano else {}
    labels |= {"ray.io/priority-class-name": priority} if volcano and priority else {}
    suspended = {"suspend": True} if queue else {}
    if kind == "RayCluster":
        return _object(run, "ray.io/v1", kind, labels, spec={**suspended, **pods.cluster(config, run)})
    spec = {
        **suspended,
        "entrypoint": ENTRYPOINT,
        "submissionMode": "K8sJobMode",
        "submitterConfig": {"backoffLimit": 2},  # tries to reach the head, not of the run
        "backoffLimit": int(run.options.get("retries", 3)),  # each a new cluster, where the run goes on
        "preRunningDeadlineSeconds": 86400 if queue or volcano else 3600,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "submitterPodTemplate": pods.submitter(run),
        "rayClusterSpec": pods.cluster(config, run),
    }
    return _object(run, "ray.io/v1", kind, labels, spec=spec)


def _network(run: Submission) -> dict[str, Any]:
    """Who may knock: the run's own pods, the operator at the dashboard, Prometheus at the metrics."""
    own = {"matchLabels": {pods.RUN: pods.object_name(run.name)}}
    guests = [(run.options.get("operator", "kuberay-system"), 8265), (run.options.get("monitor"), 8080)]
    ingress: list[dict[str, Any]] = [{"from": [{"podSelector": own}]}]
    for namespace, port in guests:
        if namespace:
            peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
            ingress.append({"from": [peer], "ports": [{"protocol": "TCP", "port": port}]})
    return {"podSelector": own, "policyTypes": ["Ingress"], "ingress": ingress}


def _disruption(run: Submission) -> dict[str, Any]:
    """A drain of its node may not take the head: with it go the driver and Ray's state."""
    labels = {pods.RUN: pods.object_name(run.name), "ray.io/node-type": "head"}
    return {"maxUnavailable": 0, "selector": {"matchLabels": labels}}


def _monitor(run: Submission) -> dict[str, Any]:
    endpoint = {"port": "metrics", "relabelings": [{"sourceLabels": ["__meta_kubernetes_pod_label_ray_io_node_type"]}]}
    endpoint["relabelings"][0]["targetLabel"] = "ray_node_type"
    return {"selector": {"matchLabels": {pods.RUN: pods.object_name(run.name)}}, "podMetricsEndpoints": [endpoint]}
