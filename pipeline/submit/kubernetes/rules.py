"""What KubeRay's operator and Kueue refuse in a RayJob or RayCluster although its CRD allows it.

Such a manifest is taken by the API server, and then nothing happens but an event that nobody reads. Each function is
one rule, and names its source: `validation.go` is ray-operator/controllers/ray/utils/validation.go of KubeRay 1.7.0
(ray-project/kuberay, Apache-2.0). What it gives up: gates that a site has switched on (alpha features) are unknown
here; what needs one is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import yaml

from pipeline.submit.kubernetes.manifest import Found, Run, items, section, value
from pipeline.yaml_file import Loader

Rule = Callable[[Run], Iterator[Found]]

LONGEST_JOB, LONGEST_CLUSTER = 47, 53  # characters; pods and services get longer names from these
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
TOKENS_SINCE, KUBERNETES_TOKENS_SINCE = (2, 52, 0), (2, 55, 0)
QUEUE = "kueue.x-k8s.io/queue-name"
MOST_GROUPS = 7  # Kueue's Workload has 8 pod sets, and the head is one
DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
GATED = {"networkPolicy": "RayClusterNetworkPolicy", "tlsOptions": "RayClusterMTLS"}
GATED |= {"historyServerOptions": "RayClusterHistoryServer"}


def name(run: Run) -> Iterator[Found]:
    """validation.go: ValidateRayJobMetadata, ValidateRayClusterMetadata."""
    limit = LONGEST_CLUSTER if run.job is None else LONGEST_JOB
    if len(run.manifest.name) > limit:
        message = f"has {len(run.manifest.name)} characters, a {run.manifest.kind} may have {limit}"
        yield Found("metadata.name", message, "choose a shorter name")
    if not DNS_1035.fullmatch(run.manifest.name):
        message = f"{run.manifest.name!r} is no DNS-1035 label"
        yield Found("metadata.name", message, "small letters, digits and -, the first a letter")


def suspension(run: Run) -> Iterator[Found]:
    """validation.go: ValidateRayJobSpec."""
    job = run.job or {}
    if job.get("suspend") is True:
        if job.get("shutdownAfterJobFinishes") is not True:
            message = "is refused without shutdownAfterJobFinishes"
            yield Found("spec.suspend", message, "set shutdownAfterJobFinishes: true")
        if job.get("clusterSelector"):
            yield Found("spec.suspend", "is refused with a clusterSelector", "give it a cluster of its own")


def one_cluster(run: Run) -> Iterator[Found]:
    """validation.go: ValidateRayJobSpec, ValidateRayClusterSpec."""
    if run.job is not None and not run.job.get("rayClusterSpec"):
        selector = run.job.get("clusterSelector")
        if not selector:
            yield Found("spec", "has neither rayClusterSpec nor clusterSelector", "add rayClusterSpec")
        elif not section(run.job, "clusterSelector").get("ray.io/cluster"):
            yield Found("spec.clusterSelector", "names no cluster", "set ray.io/cluster")
        return
    for pods in run.ray_pods:
        if not pods.containers:
            yield Found(pods.spec_place, "has no container", "add one that runs Ray")


def time_to_live(run: Run) -> Iterator[Found]:
    """validation.go: validateDeletionConfiguration."""
    job = run.job or {}
    seconds, place = job.get("ttlSecondsAfterFinished", 0), "spec.ttlSecondsAfterFinished"
    if isinstance(seconds, int) and seconds < 0:
        yield Found(place, f"{seconds} seconds are less than none", "0 or more")
    if isinstance(seconds, int) and seconds > 0 and job.get("shutdownAfterJobFinishes") is not True:
        yield Found(place, "is refused without shutdownAfterJobFinishes", "set shutdownAfterJobFinishes: true")


def deletion(run: Run) -> Iterator[Found]:
    """validation.go: validateDeletionConfiguration, validateLegacyDeletionPolicies."""
    job, place = run.job or {}, "spec.deletionStrategy"
    if "deletionStrategy" not in job:
        return
    strategy, shut = section(job, "deletionStrategy"), job.get("shutdownAfterJobFinishes") is True
    rules = items(strategy, "deletionRules")
    old = [which for which in ("onSuccess", "onFailure") if which in strategy]
    if rules and shut:
        message = "is refused with shutdownAfterJobFinishes"
        yield Found(f"{place}.deletionRules", message, "keep one of the two")
    if rules and old:
        yield Found(place, f"deletionRules is refused with {' and '.join(old)}", "keep deletionRules")
    if not rules and len(old) < 2:
        yield Found(place, "has neither deletionRules nor both onSuccess and onFailure", "leave it out")
    policies = [(f"{place}.deletionRules.{number}", rule.get("policy")) for number, rule in enumerate(rules)]
    policies += [(f"{place}.{which}", section(strategy, which).get("policy")) for which in old]
    for where, policy in policies:
        if policy is None:
            yield Found(where, "has no policy", "DeleteCluster")
        if policy == "DeleteWorkers" and run.autoscaled:
            yield Found(where, "DeleteWorkers is refused with autoscaling", "DeleteCluster")
        if policy in ("DeleteWorkers", "DeleteCluster") and job.get("clusterSelector"):
            yield Found(where, f"{policy} is refused with a clusterSelector", "DeleteSelf or DeleteNone")
        if policy == "DeleteNone" and shut and old:
            yield Found(where, "DeleteNone is refused with shutdownAfterJobFinishes", "DeleteCluster")


def deletion_times(run: Run) -> Iterator[Found]:
    """validation.go: validateDeletionRules, validateTTLConsistency: workers go first, the job last."""
    place = "spec.deletionStrategy.deletionRules"
    seconds: dict[tuple[str, str], int] = {}
    for number, rule in enumerate(items(run.job, "deletionStrategy.deletionRules")):
        after = value(rule, "condition.ttlSeconds") or 0
        key = str(value(rule, "condition.jobStatus")), str(rule.get("policy"))
        if key in seconds:
            yield Found(f"{place}.{number}", f"{key[1]} for {key[0]} stands there twice", "keep one of the two")
        if isinstance(after, int) and after < 0:
            yield Found(f"{place}.{number}", f"{after} seconds are less than none", "0 or more")
        seconds[key] = after if isinstance(after, int) else 0
    for status in sorted({status for status, _ in seconds}):
        order = [seconds[status, policy] for policy in DELETION_ORDER if (status, policy) in seconds]
        if order != sorted(order):
            message = f"for {status} what is inside would outlive what holds it"
            yield Found(place, message, "times that grow: " + ", ".join(DELETION_ORDER))


def retries(run: Run) -> Iterator[Found]:
    """validation.go: ValidateRayJobSpec; rayjob_controller.go: a retry needs a new cluster."""
    job, place = run.job or {}, "spec.backoffLimit"
    limit = job.get("backoffLimit", 0)
    if not isinstance(limit, int) or limit < 0:
        yield Found(place, f"{limit} retries are less than none", "0 or more")
    elif limit and job.get("clusterSelector"):
        yield Found(place, "a retry is a new cluster, and clusterSelector names an old one", "leave one of them out")
    elif limit and job.get("submissionMode") == "InteractiveMode":
        yield Found(place, "is refused in InteractiveMode", "leave it out")


def sidecar(run: Run) -> Iterator[Found]:
    """validation.go: ValidateRayJobSpec."""
    job = run.job or {}
    if job.get("submissionMode") != "SidecarMode":
        return
    for key in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
        if job.get(key):
            yield Found(f"spec.{key}", "is refused in SidecarMode", "leave it out, or use K8sJobMode")
    if run.head.spec.get("restartPolicy", "Never") != "Never":
        yield Found(f"{run.head.spec_place}.restartPolicy", "must be Never in SidecarMode", "leave it out")


def deadlines(run: Run) -> Iterator[Found]:
    """validation.go: ValidateRayJobSpec."""
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        seconds = (run.job or {}).get(key)
        if isinstance(seconds, int) and seconds <= 0:
            yield Found(f"spec.{key}", f"{seconds} seconds end the job before it begins", "1 or more, or leave it out")


def replicas(run: Run) -> Iterator[Found]:
    """ray-operator/controllers/ray/utils/util.go: the operator clamps replicas to the bounds, in silence."""
    for pods in run.workers:
        least, most = pods.group.get("minReplicas", 0), pods.group.get("maxReplicas", 2**31 - 1)
        numbers = [least, pods.group.get("replicas", least), most]
        if all(isinstance(number, int) for number in numbers) and numbers != sorted(numbers):
            message = f"minReplicas {numbers[0]}, replicas {numbers[1]}, maxReplicas {numbers[2]} are out of order"
            yield Found(pods.place, message, "minReplicas <= replicas <= maxReplicas")


def authentication(run: Run) -> Iterator[Found]:
    """validation.go: ValidateRayClusterSpec; enableK8sTokenAuth as validated for RayJobs in 1.7.0."""
    options, place = section(run.cluster, "authOptions"), f"{run.at}.authOptions"
    said = str(run.cluster.get("rayVersion", ""))
    version = _version(said)
    if options.get("mode") == "token" and (version is None or version < TOKENS_SINCE):
        message = f"mode token needs rayVersion 2.52.0 or later, it is {said or 'not set'}"
        yield Found(f"{place}.mode", message, "set rayVersion to that of the image")
    if options.get("enableK8sTokenAuth") is True:
        where = f"{place}.enableK8sTokenAuth"
        if run.job is not None:
            yield Found(where, "is refused in a RayJob", "leave it out: mode: token is enough")
        elif version is None or version < KUBERNETES_TOKENS_SINCE:
            yield Found(where, f"needs rayVersion 2.55.0 or later, it is {said or 'not set'}", "leave it out")


def resources_once(run: Run) -> Iterator[Found]:
    """validation.go: validateRayGroupResources, validateRayGroupLabels."""
    for pods in run.ray_pods:
        twice = [key for key in ("num-cpus", "num-gpus", "memory", "resources") if pods.params.get(key)]
        if twice and pods.group.get("resources"):
            message = f"is refused beside {', '.join(twice)} in rayStartParams"
            yield Found(f"{pods.place}.resources", message, "keep one of the two")
        if "labels" in pods.params:
            yield Found(f"{pods.place}.rayStartParams.labels", "is refused", "use labels of the group")
        for key, text in section(pods.group, "labels").items():
            if not LABEL_KEY.fullmatch(str(key)) or not LABEL_VALUE.fullmatch(str(text)):
                yield Found(f"{pods.place}.labels.{key}", f"{key}={text} is no label", "letters, digits, - _ .")


def fault_tolerance(run: Run) -> Iterator[Found]:
    """validation.go: ValidateRayClusterSpec; features.go: GCSFaultToleranceEmbeddedStorage is alpha."""
    options = section(run.cluster, "gcsFaultToleranceOptions")
    place, annotations = f"{run.at}.gcsFaultToleranceOptions", run.annotations
    env = {name: each for each in run.head.containers[:1] for name in each.env}
    container = next(iter(run.head.containers), None)
    where = f"{container.place}.env" if container else run.head.place
    if options:
        for key in ("ray.io/ft-enabled", "ray.io/external-storage-namespace"):
            if annotations.get(key):
                yield Found(f"metadata.annotations.{key}", "is refused beside gcsFaultToleranceOptions", "leave it out")
        for key in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD"):
            if key in env:
                yield Found(where, f"{key} is refused beside gcsFaultToleranceOptions", f"say it in {place}")
        if run.head.params.get("redis-password"):
            message = "redis-password is refused beside gcsFaultToleranceOptions"
            yield Found(f"{run.head.place}.rayStartParams", message, "use redisPassword with a secretKeyRef")
        if options.get("backend") == "rocksdb":
            yield Found(f"{place}.backend", "needs the alpha gate GCSFaultToleranceEmbeddedStorage", "redisAddress")
    elif "RAY_REDIS_ADDRESS" in env and str(annotations.get("ray.io/ft-enabled")).lower() != "true":
        yield Found(where, "RAY_REDIS_ADDRESS is refused without gcsFaultToleranceOptions", f"say it in {place}")
    if "REDIS_USERNAME" in env or run.head.params.get("redis-username"):
        yield Found(where, "a Redis user here is refused", f"use {place}.redisUsername")


def autoscaler(run: Run) -> Iterator[Found]:
    """validation.go: ValidateRayClusterSpec."""
    switch, options = "RAY_enable_autoscaler_v2", section(run.cluster, "autoscalerOptions")
    container = next(iter(run.head.containers), None)
    item = container.env.get(switch, {}) if container else {}
    on, where = item.get("value") in ("1", "true"), f"{container.place}.env" if container else run.head.place
    if not run.autoscaled:
        if on:
            yield Found(where, f"{switch} is refused without enableInTreeAutoscaling", "leave it out")
        return
    if options.get("version") and item:
        yield Found(where, f"{switch} is refused beside autoscalerOptions.version", "leave it out")
    for pods in run.ray_pods:
        if (options.get("version") == "v2" or on) and pods.spec.get("restartPolicy", "Never") != "Never":
            yield Found(f"{pods.spec_place}.restartPolicy", "must be Never with autoscaler v2", "leave it out")
        if pods.group.get("suspend") is True:
            yield Found(f"{pods.place}.suspend", "a group is not suspended under autoscaling", "leave it out")


def gates(run: Run) -> Iterator[Found]:
    """features.go of KubeRay 1.7.0, alpha and off by default; tlsOptions refuses what it sets itself."""
    for key, gate in GATED.items():
        if run.cluster.get(key):
            message = f"needs the operator's feature gate {gate}, alpha and off by default"
            mend = "write a NetworkPolicy" if key == "networkPolicy" else "leave it out"
            yield Found(f"{run.at}.{key}", message, mend)
    if run.cluster.get("tlsOptions"):
        for container in (each for pods in run.ray_pods for each in pods.all_containers):
            for key in container.env:
                if key == "RAY_USE_TLS" or key.startswith("RAY_TLS_"):
                    yield Found(f"{container.place}.env", f"{key} is refused beside tlsOptions", "leave it out")


def runtime_environment(run: Run) -> Iterator[Found]:
    """validation.go: ValidateRayJobSpec (UnmarshalRuntimeEnvYAML)."""
    given = (run.job or {}).get("runtimeEnvYAML")
    try:
        if given and not isinstance(Loader(str(given)).get_single_data(), dict):
            yield Found("spec.runtimeEnvYAML", "holds no section", "env_vars: {...}, or leave it out")
    except yaml.YAMLError:
        yield Found("spec.runtimeEnvYAML", "is not YAML", "env_vars: {...}, or leave it out")


def kueue(run: Run) -> Iterator[Found]:
    """kubernetes-sigs/kueue: pkg/controller/jobs/rayjob/rayjob_webhook.go and raycluster's, which it calls."""
    if QUEUE not in run.labels:
        return
    job = run.job
    if job is not None and job.get("clusterSelector"):
        yield Found("spec.clusterSelector", "is refused in a queue of Kueue", "give it a cluster of its own")
    if job is not None and job.get("shutdownAfterJobFinishes") is not True:
        message = "must be true in a queue of Kueue"
        yield Found("spec.shutdownAfterJobFinishes", message, "set shutdownAfterJobFinishes: true")
    if run.autoscaled:
        message = "is refused in a queue of Kueue, which reserves a fixed size"
        yield Found(f"{run.at}.enableInTreeAutoscaling", message, "leave one of the two out")
    if len(run.workers) > MOST_GROUPS:
        message = f"has {len(run.workers)} groups, Kueue takes {MOST_GROUPS}"
        yield Found(f"{run.at}.workerGroupSpecs", message, "join groups of the same kind")


def _version(said: str) -> tuple[int, int, int] | None:
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", said)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


RULES: tuple[Rule, ...] = (name, suspension, one_cluster, time_to_live, deletion, deletion_times, retries, sidecar)
RULES += (deadlines, replicas, authentication, resources_once, fault_tolerance, autoscaler, gates, runtime_environment)
RULES += (kueue,)
