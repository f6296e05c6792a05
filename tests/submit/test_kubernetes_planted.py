"""Mistakes planted in manifests, one at a time: each is found, by its own rule, at its own place."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import yaml

from pipeline.submit.kubernetes import lint, rules
from pipeline.submit.kubernetes.manifest import Manifest, Run
from pipeline.submit.submission import CONFIG
from tests.submit import overlays
from tests.submit.mistakes import CLUSTER, GONE, HEAD_POD, PLANTS, POD, RULES, RULES_OF, STRATEGY, WORKER, Plant, rule


@pytest.mark.parametrize("plant", PLANTS, ids=repr)
def test_it_is_found(plant: Plant) -> None:
    changed = copy.deepcopy(rendered(plant.overlay))
    for place, value in plant.keys.items():
        put(changed[plant.file], place, value)
    found = list(plant.rule(run(changed)))
    assert plant.place in [each.place for each in found], found
    assert all(each.message and each.mend for each in found)
    texts = {**overlays.render(plant.overlay), plant.file: yaml.safe_dump(changed[plant.file], sort_keys=False)}
    told = [problem for problem in lint.lint(texts) if problem.place == f"rayjob.yaml: {plant.place}"]
    assert told and all(problem.line for problem in told)


# What KubeRay's own samples do, and its operator takes: its rules must not take it for a mistake.
GOOD: dict[str, dict[str, Any]] = {
    "rules of deletion": {
        "spec.shutdownAfterJobFinishes": GONE,
        "spec.ttlSecondsAfterFinished": GONE,
        RULES: [
            rule("DeleteWorkers", 30),
            rule("DeleteCluster", 60),
            rule("DeleteSelf", 60),
            rule("DeleteSelf", 9, "FAILED"),
        ],
    },
    "policies of deletion": {
        STRATEGY: {"onSuccess": {"policy": "DeleteCluster"}, "onFailure": {"policy": "DeleteWorkers"}},
    },
    "a cluster that is there": {
        "spec.clusterSelector": {"ray.io/cluster": "mine"},
        "spec.rayClusterSpec": GONE,
        "spec.backoffLimit": 0,
    },
    "a sidecar": {
        "spec.submissionMode": "SidecarMode",
        "spec.submitterPodTemplate": GONE,
        "spec.submitterConfig": GONE,
        f"{HEAD_POD}.restartPolicy": "Never",
    },
    "by hand": {"spec.submissionMode": "InteractiveMode", "spec.backoffLimit": 0},
    "suspended": {"spec.suspend": True},
    "resources of a group": {f"{WORKER}.rayStartParams": {}, f"{WORKER}.resources": {"CPU": "4"}},
    "labels of a group": {f"{WORKER}.labels": {"ray.io/region": "us-central1", "team": ""}},
    "state in Redis": {
        f"{CLUSTER}.gcsFaultToleranceOptions": {
            "redisAddress": "redis:6379",
            "redisUsername": {"value": "default"},
            "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}},
        },
    },
    "state in Redis, the old way": {
        "metadata.annotations": {"ray.io/ft-enabled": "true"},
        f"{HEAD_POD}.containers.0.env.+": {"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"},
    },
    "the second autoscaler": {
        f"{CLUSTER}.enableInTreeAutoscaling": True,
        f"{CLUSTER}.autoscalerOptions": {"version": "v2"},
        f"{WORKER}.minReplicas": 0,
        f"{POD}.restartPolicy": "Never",
    },
    "a group without workers": {f"{WORKER}.replicas": 0, f"{WORKER}.minReplicas": 0, f"{WORKER}.maxReplicas": 10},
    "no token": {f"{CLUSTER}.authOptions": GONE, f"{CLUSTER}.rayVersion": "2.9.0"},
    "an environment": {"spec.runtimeEnvYAML": "pip: [requests==2.26.0]\nenv_vars: {counter_name: test_counter}\n"},
    "seven groups": {f"{CLUSTER}.workerGroupSpecs.*": 7, "metadata.labels": {"kueue.x-k8s.io/queue-name": "q"}},
    "deadlines": {"spec.activeDeadlineSeconds": 120, "spec.preRunningDeadlineSeconds": 60},
}


@pytest.mark.parametrize("name", GOOD)
def test_what_the_operator_takes_is_no_mistake(name: str) -> None:
    changed = copy.deepcopy(rendered("cpu"))
    for place, value in GOOD[name].items():
        put(changed["rayjob.yaml"], place, value)
    found = [each for rule_of in rules.RULES for each in rule_of(run(changed))]
    assert found == []


def test_every_rule_has_a_mistake_of_its_own() -> None:
    assert {each.__name__ for each in RULES_OF} == {plant.rule.__name__ for plant in PLANTS}
    assert set(lint.RULES) == set(RULES_OF)


def test_what_is_no_manifest_is_said_with_its_line() -> None:
    rendered = overlays.render("cpu")  # text of each file
    broken = lint.lint({**rendered, "rayjob.yaml": rendered["rayjob.yaml"].replace("spec:", "spec: [", 1)})
    assert [problem.place for problem in broken] == ["rayjob.yaml"] and broken[0].line
    without = lint.lint({name: text for name, text in rendered.items() if name != "rayjob.yaml"})
    assert ["not among" in str(problem) for problem in without] == [True]
    secret = yaml.safe_dump({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"a": "b"}})
    assert ["in the open" in str(problem) for problem in lint.lint({**rendered, "s.yaml": secret})] == [True]
    other = lint.lint({**rendered, CONFIG: rendered[CONFIG].replace("steps: 700", "steps: 7000")})
    assert ["another configuration" in str(problem) for problem in other] == [True]
    twice = lint.lint({**rendered, "again.yaml": rendered["account.yaml"]})
    assert ["a second ServiceAccount" in str(problem) for problem in twice] == [True]


@pytest.mark.parametrize("empty", [None, 0, "text", [], {}, [None], {"a": None}])
def test_no_shape_of_a_manifest_makes_it_fail(empty: Any) -> None:
    """Each section of a RayJob in turn becomes something that it should not be; rules may complain, not fail."""
    files = rendered("autoscaled")
    for path in list(sections(files["rayjob.yaml"])):
        changed = copy.deepcopy(files["rayjob.yaml"])
        inside = changed
        for part in path[:-1]:
            inside = inside[part]
        inside[path[-1]] = empty
        for each in lint.RULES:
            list(each(run({**files, "rayjob.yaml": changed})))


def sections(values: Any, path: tuple[Any, ...] = ()) -> Any:
    """Paths of all sections and lists, those outside first."""
    keys = values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()
    for key in keys:
        if isinstance(values[key], dict | list):
            yield (*path, key)
            yield from sections(values[key], (*path, key))


@cache
def rendered(overlay: str) -> dict[str, Any]:
    """File -> its object."""
    return {name: yaml.safe_load(text) for name, text in overlays.render(overlay).items()}


def run(files: dict[str, Any]) -> Run:
    """What rules read, without the way through YAML."""
    beside = [Manifest(name, values, {}) for name, values in files.items() if name not in ("rayjob.yaml", CONFIG)]
    return Run(Manifest("rayjob.yaml", files["rayjob.yaml"], {}), tuple(beside), files[CONFIG])


def put(values: Any, place: str, value: Any) -> None:
    """Set a dotted key; + appends to a list, * repeats its first item; names with dots are those of resources."""
    for name in ("nvidia.com/gpu", "millstream/run"):
        place = place.replace(name, name.replace(".", "\0"))
    path = [part.replace("\0", ".") for part in place.split(".")]
    for part in path[:-1]:
        values = values[int(part)] if isinstance(values, list) else values.setdefault(part, {})
    last = path[-1]
    if last == "+":
        values.append(value)
    elif last == "*":
        values.extend(copy.deepcopy(values[0]) for _ in range(value - 1))
    elif value is GONE:
        del values[int(last) if isinstance(values, list) else last]
    elif isinstance(values, list):
        values[int(last)] = value
    else:
        values[last] = value
