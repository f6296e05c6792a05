"""What leaves for Kubernetes is what is kept in k8s/, holds every schema, and is found without fault by every rule."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pipeline.errors import ConfigError, RunError
from pipeline.submit import submit
from pipeline.submit.kubernetes import pod_security
from pipeline.submit.kubernetes import target as kubernetes
from pipeline.submit.kubernetes.manifest import Manifest, Run
from pipeline.submit.kubernetes.pods import RAY_VERSION
from pipeline.submit.submission import CONFIG
from tests import small_data
from tests.submit import overlays, schemas
from tests.submit.overlays import K8S, OVERLAYS, ROOT

WITHOUT_CRDS = pytest.mark.skipif(schemas.folder() is None, reason=f"{schemas.CRDS} names no folder of KubeRay's CRDs")
BY_HAND = ["-o volcano=research -o priority=training", "-o redis=redis:6379 -o claim=work -o interface=ib0"]
BY_HAND += ["-o namespace=other -o operator=kuberay -o nodes=1 -o shm=2Gi -o memory=8Gi -o secret=mine -o retries=1"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_builds_what_the_command_renders(overlay: str) -> None:
    rendered = overlays.render(overlay)
    built = overlays.build(K8S / "overlays" / overlay)
    ours = "---\n".join(text for name, text in rendered.items() if name != CONFIG)
    assert overlays.objects(built) == overlays.objects(ours)
    assert (K8S / "rendered" / f"{overlay}.yaml").read_text() == built, "write it anew: python -m tests.submit.overlays"
    assert overlays.objects(ours)["ConfigMap", "digits"]["data"][CONFIG] == rendered[CONFIG]


def test_the_base_is_what_the_command_renders() -> None:
    rendered = overlays.render("cpu")
    files = {path.name: path.read_text() for path in (K8S / "base").glob("*.yaml") if path.name != "kustomization.yaml"}
    assert files == {name: text for name, text in rendered.items() if name != CONFIG}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_rule_complains_of_an_overlay(overlay: str) -> None:
    assert kubernetes.lint(overlays.render(overlay)) == []
    assert kubernetes.lint({"all.yaml": (K8S / "rendered" / f"{overlay}.yaml").read_text()}) == []


def test_it_is_checked_like_every_target_and_says_when_there_is_no_kubectl(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = small_data.config(tmp_path / "toy.yaml", {"name": "tests.poisoned_task"}, Path("/storage/data"))
    image = f"registry.example.com/millstream@sha256:{'a' * 64}"
    asked = {"target": "k8s", "folder": Path("/storage"), "image": image, "own_code": False, "users_code": False}
    plan = submit.prepare(submit.Request(config=path, overrides=("runs=/storage/runs",), **asked))
    assert plan.problems == [] and "rayjob.yaml" in plan.rendered
    assert [note for note in plan.notes if "the target must have tests" in note]  # a task of one's own is in the image
    with pytest.raises(ConfigError, match="0 workers need no cluster"):
        submit.prepare(submit.Request(config=path, overrides=("cluster.workers=0",), **asked))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="no kubectl here"):
        submit.send(plan, print)


@pytest.mark.parametrize("options", BY_HAND)
def test_no_rule_complains_of_other_options(options: str) -> None:
    words = overlays.command("cpu")
    rendered = kubernetes.render(*overlays.submission([*words[:-2], *options.split()]))
    assert kubernetes.lint(rendered) == []
    complaints = [each for document in _all(rendered) for each in _schemas(document)]
    assert complaints == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_and_core_objects_hold_their_schemas(overlay: str) -> None:
    for document in _all(overlays.render(overlay)):
        assert _schemas(document) == [], document["kind"]


@WITHOUT_CRDS
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_objects_hold_their_schemas(overlay: str) -> None:
    found = [each for each in _all(overlays.render(overlay)) if each["apiVersion"] == "ray.io/v1"]
    assert [schemas.of_ray(document) for document in found] == [[]]


@WITHOUT_CRDS
@pytest.mark.parametrize(
    ("line", "instead", "complaint"),
    [
        ("  shutdownAfterJobFinishes: true", "  shutdownAfterJobFinish: true", "shutdownAfterJobFinish"),
        ("        num-cpus: '0'", "        num-cpus: 0", "num-cpus"),
        ("  backoffLimit: 3", "  backoffLimit: three", "backoffLimit"),
        ("            env:", "            envs:", "envs"),
        ("  entrypoint: ", "  managedBy: me\n  entrypoint: ", "managedBy"),
        (
            "  entrypoint: ",
            "  deletionStrategy: {onSuccess: {policy: DeleteCluster}}\n  entrypoint: ",
            "BOTH onSuccess",
        ),
    ],
    ids=["misspelt", "number", "word", "container", "rule", "rules"],
)
def test_schemas_refuse(line: str, instead: str, complaint: str) -> None:
    text = overlays.render("cpu")["rayjob.yaml"]
    assert line in text
    refused = schemas.of_ray(yaml.safe_load(text.replace(line, instead, 1)))
    assert complaint in "\n".join(refused)


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("automountServiceAccountToken: false", "automountServiceAccountTokens: false"),
        ("kind: ServiceAccount", "kind: Servant"),
    ],
)
def test_core_schemas_refuse(line: str, instead: str) -> None:
    text = overlays.render("cpu")["account.yaml"]
    assert line in text
    assert schemas.of_core(yaml.safe_load(text.replace(line, instead)))


def test_what_a_namespace_needs_once_holds_its_schemas() -> None:
    found = list(yaml.safe_load_all(overlays.build(K8S / "once")))
    assert sorted(each["kind"] for each in found) == ["Namespace", "PersistentVolumeClaim", "Role", "RoleBinding"]
    assert [schemas.of_core(document) for document in found] == [[], [], [], []]
    assert found[0]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_pod_to_look_around_with_is_restricted() -> None:
    pod = yaml.safe_load((K8S / "once/hands.yaml").read_text())
    assert schemas.of_core(pod) == []
    job = yaml.safe_load(overlays.render("cpu")["rayjob.yaml"])
    job["spec"]["submitterPodTemplate"] = {"metadata": {}, "spec": pod["spec"]}
    run = Run(Manifest("rayjob.yaml", job, {}), (), {})
    assert [*pod_security.restricted(run), *pod_security.tokens(run), *pod_security.read_only(run)] == []


def test_rendering_depends_on_nothing_but_its_arguments() -> None:
    config, run = overlays.submission(overlays.command("many-nodes"))
    first, second = kubernetes.render(config, run), kubernetes.render(config, replace(run))
    assert first == second
    assert first[CONFIG] == run.text
    assert "digits.yaml" not in "".join(text for name, text in first.items() if name != CONFIG)


def test_what_cannot_be_rendered_is_refused_with_the_reason() -> None:
    config, run = overlays.submission(overlays.command("cpu"))
    wrong = {
        "--image": replace(run, image=None),
        "into it": replace(run, files={"mine/task.py": ROOT / "README.md"}),
        "sweep": replace(run, sweep=("one", "two")),
        "did you mean nodes?": replace(run, options={"node s": "2"}),
        "whole number": replace(run, options={"grace": "5m"}),
        "LABEL=VALUE": replace(run, options={"spot": "yes"}),
    }
    for reason, each in wrong.items():
        with pytest.raises(ConfigError, match=re.escape(reason)):
            kubernetes.render(config, each)


@pytest.mark.parametrize(
    ("answer", "mend"),
    [
        ("no - no RBAC policy matched", "k8s/once/submitters.yaml"),
        ("Warning: the server doesn't have a resource type 'rayjobs' in group 'ray.io'", "KubeRay is not installed"),
        ("Warning: the server doesn't have a resource type 'rayjobs'\nThe connection was refused", "get-contexts"),
    ],
)
def test_what_a_cluster_answers_is_told_with_a_way_to_mend_it(
    answer: str, mend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kubectl is played: no cluster with rights is at hand."""
    played = tmp_path / "kubectl"
    played.write_text(f'#!/bin/sh\necho "{answer}" >&2\nexit 1\n')
    played.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(RunError, match=re.escape(mend)):
        kubernetes.reach(overlays.submission(overlays.command("cpu"))[1])


def test_names_are_those_that_kubernetes_has() -> None:
    config, run = overlays.submission(overlays.command("cpu"))
    rendered = kubernetes.render(config, replace(run, name="Digits_v1.2"))
    assert overlays.objects(rendered["rayjob.yaml"]).keys() == {("RayJob", "digits-v1-2")}
    problems = kubernetes.lint(kubernetes.render(config, replace(run, name="7-digits")))
    assert ["DNS-1035" in str(problem) for problem in problems] == [True]


def test_ray_is_the_one_of_the_image() -> None:
    assert f"ray=={RAY_VERSION}\n" in (ROOT / "constraints.txt").read_text()
    file = (K8S / "Dockerfile").read_text()
    assert "--constraint constraints.txt" in file and "USER 1000:1000" in file
    final = file.rpartition("\nFROM ")[2]
    assert not re.search(r"pip install|apt-get|gcc|build-essential", final)


def _all(rendered: dict[str, str]) -> list[dict]:
    return [yaml.safe_load(text) for name, text in rendered.items() if name != CONFIG]


def _schemas(document: dict) -> list[str]:
    """Complaints of the core API about an object of its own, or about the pods in one of KubeRay's."""
    if document["apiVersion"] == "ray.io/v1":
        return [each for pod in overlays.pods(document) for each in schemas.of_core(pod)]
    return [] if document["kind"] == "PodMonitor" else schemas.of_core(document)
