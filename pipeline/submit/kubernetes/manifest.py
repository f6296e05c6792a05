"""Kubernetes manifests as rules read them: every key with its line, a RayJob or RayCluster as groups of pods.

Nothing here fails on a manifest that is wrong: what is missing, or of another kind than it should be, reads as empty.
Types and unknown fields are the API server's to refuse (`kubectl --validate=strict`); what the files here serve is to
ask about values that are each right by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import yaml

from pipeline.problems import Problem, upwards
from pipeline.yaml_file import Loader

SCALES = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
SCALES |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}
CONFIGMAP_MOUNT = "/etc/millstream"  # where pods find the run's configuration


class Found(NamedTuple):
    """What a rule found: a dotted key of the manifest, what is wrong there, how to mend it."""

    place: str
    message: str
    mend: str


@dataclass(frozen=True)
class Manifest:
    """One object of a file. lines: of each dotted key, from 1; items of lists are numbered from 0."""

    file: str
    values: dict[str, Any]
    lines: dict[str, int]

    @property
    def kind(self) -> str:
        return str(self.values.get("kind"))

    @property
    def name(self) -> str:
        return text(self.values, "metadata.name")

    def problem(self, found: Found) -> Problem:
        """What was found, with its line or that of the nearest key around it."""
        line = next((self.lines[place] for place in upwards(found.place) if place in self.lines), None)
        return Problem(f"{self.file}: {found.place}", found.message, line, found.mend)


@dataclass(frozen=True)
class Container:
    """place: of the container in its manifest."""

    place: str
    values: dict[str, Any]

    @property
    def env(self) -> dict[str, dict[str, Any]]:
        """name -> {name, value or valueFrom}; of a name that stands twice, the last."""
        return {str(item.get("name")): item for item in items(self.values, "env")}

    @property
    def mounts(self) -> dict[str, dict[str, Any]]:
        """mountPath -> {name, mountPath, ...}."""
        return {str(item.get("mountPath")): item for item in items(self.values, "volumeMounts")}


@dataclass(frozen=True)
class Pods:
    """Pods of one kind. place, group: of the group that they are in; spec: of the pod, at `spec_place`."""

    role: Literal["head", "worker", "submitter"]
    place: str
    group: dict[str, Any]

    @property
    def template_place(self) -> str:
        return self.place if self.role == "submitter" else f"{self.place}.template"

    @property
    def spec_place(self) -> str:
        return f"{self.template_place}.spec"

    @property
    def spec(self) -> dict[str, Any]:
        return section(self.group, "spec" if self.role == "submitter" else "template.spec")

    @property
    def labels(self) -> dict[str, Any]:
        return section(self.group, "metadata.labels" if self.role == "submitter" else "template.metadata.labels")

    @property
    def params(self) -> dict[str, Any]:
        """rayStartParams: options of `ray start`."""
        return section(self.group, "rayStartParams")

    @property
    def replicas(self) -> int:
        asked = self.group.get("replicas", 1)
        return asked if self.role == "worker" and isinstance(asked, int) else 1

    @property
    def containers(self) -> list[Container]:
        """Containers that the manifest names; the first of them runs Ray."""
        return [Container(place, values) for place, values in _containers(self.spec, self.spec_place, "containers")]

    @property
    def all_containers(self) -> list[Container]:
        kinds = ("initContainers", "containers", "ephemeralContainers")
        found = [each for kind in kinds for each in _containers(self.spec, self.spec_place, kind)]
        return [Container(place, values) for place, values in found]

    @property
    def volumes(self) -> dict[str, dict[str, Any]]:
        return {str(item.get("name")): item for item in items(self.spec, "volumes")}


@dataclass(frozen=True)
class Run:
    """A RayJob or a RayCluster, and what stands beside it.

    job: spec of the RayJob, None of a RayCluster.  cluster: spec of the RayCluster, at `at`.  beside: the other
    objects.  config: the run's configuration as it is sent, empty where there is none.
    """

    manifest: Manifest
    beside: tuple[Manifest, ...]
    config: Mapping[str, Any]

    @property
    def job(self) -> dict[str, Any] | None:
        return section(self.manifest.values, "spec") if self.manifest.kind == "RayJob" else None

    @property
    def at(self) -> str:
        return "spec" if self.job is None else "spec.rayClusterSpec"

    @property
    def cluster(self) -> dict[str, Any]:
        return section(self.manifest.values, self.at)

    @property
    def labels(self) -> dict[str, Any]:
        return section(self.manifest.values, "metadata.labels")

    @property
    def annotations(self) -> dict[str, Any]:
        return section(self.manifest.values, "metadata.annotations")

    @property
    def autoscaled(self) -> bool:
        return self.cluster.get("enableInTreeAutoscaling") is True

    @property
    def head(self) -> Pods:
        return Pods("head", f"{self.at}.headGroupSpec", section(self.cluster, "headGroupSpec"))

    @property
    def workers(self) -> list[Pods]:
        groups = items(self.cluster, "workerGroupSpecs")
        return [Pods("worker", f"{self.at}.workerGroupSpecs.{number}", group) for number, group in enumerate(groups)]

    @property
    def ray_pods(self) -> list[Pods]:
        return [self.head, *self.workers]

    @property
    def ray_containers(self) -> list[tuple[Pods, Container]]:
        """The container of each group that runs Ray."""
        return [(pods, container) for pods in self.ray_pods for container in pods.containers[:1]]

    @property
    def all_pods(self) -> list[Pods]:
        template = section(self.job or {}, "submitterPodTemplate")
        return [*self.ray_pods, *([Pods("submitter", "spec.submitterPodTemplate", template)] if template else [])]


def read(files: Mapping[str, str]) -> tuple[list[Manifest], list[Problem]]:
    """The objects of YAML files (name -> text), and what keeps a file from being read."""
    manifests, problems = [], []
    for file, content in files.items():
        try:
            loader = Loader(content)
            while loader.check_node():
                node = loader.get_node()
                assert node is not None  # there is one, for check_node says so
                values = loader.construct_document(node)
                if isinstance(values, dict):
                    manifests.append(Manifest(file, values, dict(_lines(node, ""))))
                elif values is not None:
                    problems.append(Problem(file, "holds something that is no object", node.start_mark.line + 1))
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            message = f"is not YAML: {getattr(error, 'problem', None) or error}"
            problems.append(Problem(file, message, mark.line + 1 if mark else None, "render it again"))
    return manifests, problems


def section(values: Any, place: str) -> dict[str, Any]:
    """The section at a dotted key; empty where there is none."""
    found = value(values, place)
    return found if isinstance(found, dict) else {}


def items(values: Any, place: str) -> list[dict[str, Any]]:
    """The sections in the list at a dotted key; one that is none reads as empty, so that numbers stay right."""
    found = value(values, place)
    return [item if isinstance(item, dict) else {} for item in found] if isinstance(found, list) else []


def text(values: Any, place: str) -> str:
    found = value(values, place)
    return "" if found is None else str(found)


def value(values: Any, place: str) -> Any:
    for part in place.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def quantity(given: Any) -> float | None:
    """A number of Kubernetes, such as 500m, 2 or 16Gi; None for what is none.

    https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(m|[kMGTP]|[KMGTP]i)?", str(given))
    return float(match[1]) * SCALES[match[2] or ""] if match else None


def _containers(spec: Mapping[str, Any], place: str, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, values in enumerate(items(spec, kind)):
        yield f"{place}.{kind}.{number}", values


def _lines(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, inside in node.value:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from _lines(inside, f"{prefix}{key.value}.")
    elif isinstance(node, yaml.SequenceNode):
        for number, inside in enumerate(node.value):
            yield f"{prefix}{number}", inside.start_mark.line + 1
            yield from _lines(inside, f"{prefix}{number}.")
