"""Mistakes to plant in manifests: every rule has its own, and most have several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.submit.kubernetes import parts, pod_security, practice, rules

HEAD, WORKER = "spec.rayClusterSpec.headGroupSpec", "spec.rayClusterSpec.workerGroupSpecs.0"
HEAD_POD, POD, SUBMITTER = f"{HEAD}.template.spec", f"{WORKER}.template.spec", "spec.submitterPodTemplate.spec"
CONTAINER, CLUSTER = f"{POD}.containers.0", "spec.rayClusterSpec"
GONE = object()


class Plant:
    """A mistake: keys of the RayJob (or of `file`) set to other values, GONE takes one out; who finds it, and where."""

    def __init__(
        self, rule: Callable[..., Any], place: str, *keys: Any, file: str = "rayjob.yaml", overlay: str = "cpu"
    ):
        self.rule, self.place, self.file, self.overlay = rule, place, file, overlay
        self.keys = dict(zip(keys[::2], keys[1::2], strict=True))

    def __repr__(self) -> str:
        return f"{self.rule.__name__}-{next(iter(self.keys)).rpartition('spec.')[2]}"


def env(name: str, value: Any) -> tuple[str, Any]:
    """One more variable of the head's container."""
    return f"{HEAD_POD}.containers.0.env.+", {"name": name, **({"value": value} if isinstance(value, str) else value)}


K, P, S, J = rules, practice, pod_security, parts
RULES_OF = (*K.RULES, *P.RULES, *J.RULES, S.restricted, S.tokens, S.read_only)
STRATEGY, RULES = "spec.deletionStrategy", "spec.deletionStrategy.deletionRules"


def rule(policy: str, seconds: int, status: str = "SUCCEEDED") -> dict[str, Any]:
    return {"policy": policy, "condition": {"jobStatus": status, "ttlSeconds": seconds}}


OPERATOR = [
    Plant(K.name, "metadata.name", "metadata.name", "d" * 48),
    Plant(K.name, "metadata.name", "metadata.name", "7digits"),
    Plant(K.suspension, "spec.suspend", "spec.suspend", True, "spec.shutdownAfterJobFinishes", False),
    Plant(K.suspension, "spec.suspend", "spec.suspend", True, "spec.clusterSelector", {"ray.io/cluster": "mine"}),
    Plant(K.one_cluster, "spec", "spec.rayClusterSpec", GONE),
    Plant(K.one_cluster, f"{POD}", f"{POD}.containers", []),
    Plant(K.time_to_live, "spec.ttlSecondsAfterFinished", "spec.shutdownAfterJobFinishes", False),
    Plant(K.time_to_live, "spec.ttlSecondsAfterFinished", "spec.ttlSecondsAfterFinished", -1),
    Plant(K.deletion, RULES, RULES, [rule("DeleteCluster", 60)]),
    Plant(K.deletion, STRATEGY, STRATEGY, {}),
    Plant(K.deletion, STRATEGY, STRATEGY, {"onSuccess": {"policy": "DeleteCluster"}}),
    Plant(
        K.deletion,
        STRATEGY,
        STRATEGY,
        {"onSuccess": {"policy": "DeleteSelf"}, "deletionRules": [rule("DeleteSelf", 1)]},
    ),
    Plant(
        K.deletion,
        f"{STRATEGY}.onFailure",
        STRATEGY,
        {"onSuccess": {"policy": "DeleteCluster"}, "onFailure": {"policy": "DeleteWorkers"}},
        overlay="autoscaled",
    ),
    Plant(
        K.deletion,
        f"{STRATEGY}.onFailure",
        STRATEGY,
        {"onSuccess": {"policy": "DeleteCluster"}, "onFailure": {"policy": "DeleteNone"}},
    ),
    Plant(K.deletion_times, RULES, RULES, [rule("DeleteWorkers", 90), rule("DeleteCluster", 60)]),
    Plant(K.deletion_times, f"{RULES}.1", RULES, [rule("DeleteSelf", 60), rule("DeleteSelf", 90)]),
    Plant(K.retries, "spec.backoffLimit", "spec.backoffLimit", -1),
    Plant(K.retries, "spec.backoffLimit", "spec.submissionMode", "InteractiveMode"),
    Plant(K.retries, "spec.backoffLimit", "spec.clusterSelector", {"ray.io/cluster": "mine"}),
    Plant(K.sidecar, "spec.submitterPodTemplate", "spec.submissionMode", "SidecarMode"),
    Plant(
        K.sidecar,
        f"{HEAD_POD}.restartPolicy",
        "spec.submissionMode",
        "SidecarMode",
        f"{HEAD_POD}.restartPolicy",
        "Always",
    ),
    Plant(K.deadlines, "spec.activeDeadlineSeconds", "spec.activeDeadlineSeconds", 0),
    Plant(K.deadlines, "spec.preRunningDeadlineSeconds", "spec.preRunningDeadlineSeconds", -5),
    Plant(K.replicas, WORKER, f"{WORKER}.minReplicas", 3),
    Plant(K.replicas, WORKER, f"{WORKER}.maxReplicas", 1),
    Plant(K.authentication, f"{CLUSTER}.authOptions.mode", f"{CLUSTER}.rayVersion", "2.51.0"),
    Plant(K.authentication, f"{CLUSTER}.authOptions.mode", f"{CLUSTER}.rayVersion", "newest"),
    Plant(
        K.authentication,
        f"{CLUSTER}.authOptions.enableK8sTokenAuth",
        f"{CLUSTER}.authOptions.enableK8sTokenAuth",
        True,
    ),
    Plant(K.resources_once, f"{WORKER}.resources", f"{WORKER}.resources", {"CPU": "2"}),
    Plant(K.resources_once, f"{WORKER}.rayStartParams.labels", f"{WORKER}.rayStartParams.labels", "a=b"),
    Plant(K.resources_once, f"{WORKER}.labels.zone", f"{WORKER}.labels", {"zone": "not a label"}),
    Plant(
        K.fault_tolerance,
        "metadata.annotations.ray.io/ft-enabled",
        "metadata.annotations",
        {"ray.io/ft-enabled": "true"},
        f"{CLUSTER}.gcsFaultToleranceOptions",
        {"redisAddress": "redis:6379"},
    ),
    Plant(K.fault_tolerance, f"{HEAD_POD}.containers.0.env", *env("RAY_REDIS_ADDRESS", "redis:6379")),
    Plant(
        K.fault_tolerance,
        f"{HEAD_POD}.containers.0.env",
        f"{CLUSTER}.gcsFaultToleranceOptions",
        {"redisAddress": "redis:6379"},
        *env("REDIS_PASSWORD", {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}}),
    ),
    Plant(
        K.fault_tolerance,
        f"{CLUSTER}.gcsFaultToleranceOptions.backend",
        f"{CLUSTER}.gcsFaultToleranceOptions",
        {"backend": "rocksdb"},
    ),
    Plant(K.fault_tolerance, f"{HEAD_POD}.containers.0.env", *env("REDIS_USERNAME", "me")),
    Plant(K.autoscaler, f"{HEAD_POD}.containers.0.env", *env("RAY_enable_autoscaler_v2", "1")),
    Plant(K.autoscaler, f"{HEAD_POD}.containers.0.env", *env("RAY_enable_autoscaler_v2", "1"), overlay="autoscaled"),
    Plant(K.autoscaler, f"{POD}.restartPolicy", f"{POD}.restartPolicy", "Always", overlay="autoscaled"),
    Plant(K.autoscaler, f"{WORKER}.suspend", f"{WORKER}.suspend", True, overlay="autoscaled"),
    Plant(K.gates, f"{CLUSTER}.networkPolicy", f"{CLUSTER}.networkPolicy", {"mode": "DenyAll"}),
    Plant(K.gates, f"{CLUSTER}.tlsOptions", f"{CLUSTER}.tlsOptions", {"enabled": True}),
    Plant(
        K.gates,
        f"{HEAD_POD}.containers.0.env",
        f"{CLUSTER}.tlsOptions",
        {"enabled": True},
        *env("RAY_USE_TLS", "1"),
    ),
    Plant(K.runtime_environment, "spec.runtimeEnvYAML", "spec.runtimeEnvYAML", "env_vars: [unclosed"),
    Plant(K.runtime_environment, "spec.runtimeEnvYAML", "spec.runtimeEnvYAML", "pip"),
    Plant(K.kueue, "spec.shutdownAfterJobFinishes", "spec.shutdownAfterJobFinishes", False, overlay="kueue"),
    Plant(
        K.kueue,
        f"{CLUSTER}.enableInTreeAutoscaling",
        f"{CLUSTER}.enableInTreeAutoscaling",
        True,
        overlay="kueue",
    ),
    Plant(K.kueue, "spec.clusterSelector", "spec.clusterSelector", {"ray.io/cluster": "mine"}, overlay="kueue"),
    Plant(K.kueue, f"{CLUSTER}.workerGroupSpecs", *[f"{CLUSTER}.workerGroupSpecs.*", 8], overlay="kueue"),
]
DRAIN, DRAIN_OF = f"{CONTAINER}.env.2.value", f"{CONTAINER}.env"
PRACTICE = [
    Plant(P.version, f"{CLUSTER}.rayVersion", f"{CLUSTER}.rayVersion", GONE),
    Plant(P.token, f"{CLUSTER}.authOptions.mode", f"{CLUSTER}.authOptions", GONE),
    Plant(P.token, f"{CLUSTER}.authOptions.mode", f"{CLUSTER}.authOptions.mode", "disabled"),
    Plant(P.token, f"{HEAD_POD}.containers.0.env", *env("RAY_AUTH_MODE", "disabled")),
    Plant(P.exposure, f"{HEAD}.serviceType", f"{HEAD}.serviceType", "LoadBalancer"),
    Plant(P.exposure, f"{HEAD}.enableIngress", f"{HEAD}.enableIngress", True),
    Plant(P.shared_memory, f"{CONTAINER}.volumeMounts", f"{CONTAINER}.volumeMounts.1", GONE),
    Plant(P.shared_memory, f"{CONTAINER}.volumeMounts", f"{POD}.volumes.1.emptyDir.medium", GONE),
    Plant(P.shared_memory, f"{POD}.volumes", f"{POD}.volumes.1.emptyDir.sizeLimit", GONE),
    Plant(P.shared_memory, f"{POD}.volumes", f"{POD}.volumes.1.emptyDir.sizeLimit", "4Gi"),
    Plant(
        P.shared_memory,
        f"{WORKER}.rayStartParams.object-store-memory",
        f"{WORKER}.rayStartParams.object-store-memory",
        "2000000000",
    ),
    Plant(P.graceful_end, f"{POD}.terminationGracePeriodSeconds", f"{POD}.terminationGracePeriodSeconds", 270),
    Plant(P.graceful_end, f"{POD}.terminationGracePeriodSeconds", f"{POD}.terminationGracePeriodSeconds", GONE),
    Plant(P.graceful_end, DRAIN_OF, f"{CONTAINER}.env.2", GONE),
    Plant(P.graceful_end, DRAIN_OF, DRAIN, "10"),
    Plant(P.graceful_end, f"{HEAD_POD}.containers.0.env", f"{HEAD_POD}.containers.0.env.3", GONE),
    Plant(P.images, f"{CONTAINER}.image", f"{CONTAINER}.image", "registry.example.com/millstream:latest"),
    Plant(P.images, f"{CONTAINER}.image", f"{CONTAINER}.image", "registry.example.com:5000/millstream"),
    Plant(P.images, f"{CONTAINER}.image", f"{CONTAINER}.image", "REGISTRY/millstream:0.1.0"),
    Plant(P.images, f"{CONTAINER}.image", f"{CONTAINER}.image", "registry.example.com/millstream@sha256:12ab"),
    Plant(P.images, f"{CONTAINER}.image", f"{CONTAINER}.image", GONE),
    Plant(P.images, f"{CONTAINER}.image", f"{CONTAINER}.image", "registry.example.com/millstream:0.2.0"),
    Plant(P.secrets, f"{HEAD_POD}.containers.0.env", *env("WANDB_API_KEY", "a" * 40)),
    Plant(P.secrets, "spec.runtimeEnvYAML", "spec.runtimeEnvYAML", "env_vars: {WANDB_API_KEY: abcdefgh}"),
    Plant(P.secrets, "spec.entrypoint", "spec.entrypoint", "exec python train.py --token=abcdef"),
    Plant(P.variables, DRAIN_OF, f"{CONTAINER}.env.+", {"name": "HOME", "value": "/root"}),
    Plant(P.entrypoint, "spec.entrypoint", "spec.entrypoint", GONE),
    Plant(P.entrypoint, "spec.entrypoint", "spec.entrypoint", "exec python -m pipeline train $CONFIG; true"),
    Plant(P.entrypoint, "spec.entrypoint", "spec.entrypoint", "python -m pipeline train /etc/millstream/config.yaml"),
    Plant(
        P.entrypoint,
        "spec.entrypoint",
        "spec.entrypoint",
        "exec python -m pipeline train /etc/millstream/config.yaml --fresh",
    ),
    Plant(P.head_rests, f"{HEAD}.rayStartParams", f"{HEAD}.rayStartParams.num-cpus", GONE),
    Plant(P.head_rests, f"{HEAD}.rayStartParams", f"{HEAD}.rayStartParams.num-gpus", "8"),
    Plant(P.limits, f"{CONTAINER}.resources", f"{CONTAINER}.resources.limits.memory", GONE),
    Plant(
        P.limits,
        f"{CONTAINER}.resources",
        f"{CONTAINER}.resources.requests.nvidia.com/gpu",
        "4",
        overlay="one-node",
    ),
    Plant(P.lasting, "spec.backoffLimit", "spec.backoffLimit", GONE),
    Plant(P.lasting, "spec.shutdownAfterJobFinishes", "spec.shutdownAfterJobFinishes", GONE),
    Plant(J.volumes, f"{CONTAINER}.volumeMounts", f"{CONTAINER}.volumeMounts.0.name", "scratches"),
    Plant(J.volumes, f"{CONTAINER}.volumeMounts", f"{CONTAINER}.volumeMounts.3.mountPath", "/tmp"),
    Plant(
        J.configuration, "spec.entrypoint", "spec.entrypoint", "exec python -m pipeline train /etc/millstream/run.yaml"
    ),
    Plant(J.configuration, "spec.entrypoint", "spec.entrypoint", "exec python -m pipeline train /config/config.yaml"),
    Plant(J.storage, f"{CONTAINER}.volumeMounts", f"{POD}.volumes.3", {"name": "storage", "emptyDir": {}}),
    Plant(J.storage, CLUSTER, f"{POD}.volumes.3.persistentVolumeClaim.claimName", "another"),
    Plant(J.room, f"{CLUSTER}.workerGroupSpecs", f"{WORKER}.replicas", 1, f"{WORKER}.minReplicas", 1),
    Plant(
        J.room,
        f"{CLUSTER}.workerGroupSpecs",
        f"{CONTAINER}.resources.limits.nvidia.com/gpu",
        "4",
        f"{CONTAINER}.resources.requests.nvidia.com/gpu",
        "4",
        overlay="many-nodes",
    ),
    Plant(J.protection, f"{HEAD}.template", "spec.maxUnavailable", 1, file="disruption.yaml"),
    Plant(J.protection, f"{HEAD}.template", "spec.podSelector.matchLabels.millstream/run", "b", file="network.yaml"),
    Plant(J.protection, f"{HEAD}.template", "spec.ingress.0", GONE, file="network.yaml"),
]
CONTEXT = f"{CONTAINER}.securityContext"
RESTRICTED = [
    Plant(S.restricted, f"{POD}.hostNetwork", f"{POD}.hostNetwork", True),
    Plant(S.restricted, f"{POD}.hostPID", f"{POD}.hostPID", True),
    Plant(S.restricted, f"{POD}.hostIPC", f"{POD}.hostIPC", True),
    Plant(S.restricted, f"{CONTEXT}.privileged", f"{CONTEXT}.privileged", True),
    Plant(S.restricted, f"{CONTEXT}.allowPrivilegeEscalation", f"{CONTEXT}.allowPrivilegeEscalation", GONE),
    Plant(S.restricted, f"{CONTEXT}.capabilities.drop", f"{CONTEXT}.capabilities", GONE),
    Plant(S.restricted, f"{CONTEXT}.capabilities.add", f"{CONTEXT}.capabilities.add", ["IPC_LOCK"]),
    Plant(S.restricted, f"{CONTEXT}.runAsNonRoot", f"{POD}.securityContext.runAsNonRoot", GONE),
    Plant(S.restricted, f"{CONTEXT}.runAsNonRoot", f"{CONTEXT}.runAsNonRoot", False),
    Plant(S.restricted, f"{POD}.securityContext.runAsUser", f"{POD}.securityContext.runAsUser", 0),
    Plant(S.restricted, f"{CONTEXT}.runAsUser", f"{CONTEXT}.runAsUser", 0),
    Plant(S.restricted, f"{CONTEXT}.seccompProfile", f"{POD}.securityContext.seccompProfile", GONE),
    Plant(S.restricted, f"{CONTEXT}.seccompProfile", f"{CONTEXT}.seccompProfile", {"type": "Unconfined"}),
    Plant(S.restricted, f"{CONTEXT}.procMount", f"{CONTEXT}.procMount", "Unmasked"),
    Plant(S.restricted, f"{CONTEXT}.seLinuxOptions", f"{CONTEXT}.seLinuxOptions", {"type": "spc_t"}),
    Plant(
        S.restricted, f"{POD}.securityContext.sysctls", f"{POD}.securityContext.sysctls", [{"name": "a", "value": "1"}]
    ),
    Plant(S.restricted, f"{CONTAINER}.ports", f"{CONTAINER}.ports", [{"containerPort": 80, "hostPort": 80}]),
    Plant(S.restricted, f"{POD}.volumes.0", f"{POD}.volumes.0", {"name": "scratch", "hostPath": {"path": "/"}}),
    Plant(
        S.restricted,
        f"{POD}.initContainers.0.securityContext.allowPrivilegeEscalation",
        f"{POD}.initContainers",
        [{"name": "first", "image": "x:1"}],
    ),
    Plant(
        S.restricted,
        f"{SUBMITTER}.containers.0.securityContext.privileged",
        f"{SUBMITTER}.containers.0.securityContext.privileged",
        True,
    ),
    Plant(S.restricted, "spec.submitterPodTemplate", "spec.submitterPodTemplate", GONE),
    Plant(
        S.restricted,
        f"{CLUSTER}.autoscalerOptions.securityContext.allowPrivilegeEscalation",
        f"{CLUSTER}.autoscalerOptions",
        GONE,
        overlay="autoscaled",
    ),
    Plant(S.tokens, f"{POD}.automountServiceAccountToken", f"{POD}.automountServiceAccountToken", GONE),
    Plant(
        S.tokens,
        f"{HEAD_POD}.automountServiceAccountToken",
        f"{HEAD_POD}.automountServiceAccountToken",
        False,
        overlay="autoscaled",
    ),
    Plant(S.read_only, f"{CONTEXT}.readOnlyRootFilesystem", f"{CONTEXT}.readOnlyRootFilesystem", GONE),
    Plant(S.read_only, f"{CONTAINER}.volumeMounts", f"{CONTAINER}.volumeMounts.0", GONE),
]
PLANTS = [*OPERATOR, *PRACTICE, *RESTRICTED]
