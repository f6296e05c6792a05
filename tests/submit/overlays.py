"""The overlays of k8s/ beside what the code renders: each says at its head which command renders the same.

python -m tests.submit.overlays      writes the base, each overlay's config.yaml, and k8s/rendered/ anew
"""

from __future__ import annotations

import re
import shlex
import subprocess
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from pipeline import config as configs
from pipeline import yaml_file
from pipeline.config import Config
from pipeline.submit.kubernetes import target as kubernetes
from pipeline.submit.kubernetes.manifest import items, section, text
from pipeline.submit.submission import Submission

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent.name for path in (K8S / "overlays").glob("*/kustomization.yaml"))


def command(overlay: str) -> list[str]:
    """Words of the command at the head of an overlay, after `millstream submit k8s`."""
    head = (K8S / "overlays" / overlay / "kustomization.yaml").read_text()
    joined = re.sub(r"\\\n#\s*", "", head)
    match = re.search(r"^# +millstream submit k8s (.*)$", joined, re.MULTILINE)
    assert match, f"overlay {overlay} names no command"
    return shlex.split(match[1])


def submission(words: list[str]) -> tuple[Config, Submission]:
    """What `millstream submit k8s` makes of such words."""
    path, overrides, options, named = ROOT / words[0], [], {}, {}
    rest = iter(words[1:])
    for word in rest:
        if word == "-o":
            name, _, value = next(rest).partition("=")
            options[name] = value
        elif word.startswith("--"):
            named[word[2:]] = next(rest)
        else:
            overrides.append(word)
    source = yaml_file.read(path)
    yaml_file.lay_over(source, overrides)
    assert not source.problems
    config = Config.model_validate(source.values)
    run = Submission(
        name=config.name,
        source=path,
        overrides=tuple(overrides),
        text=configs.dump(config),
        workers=config.cluster.workers,
        threads=config.cluster.threads_per_worker,
        gpus=int(bool(config.cluster.gpu)),
        folder=PurePosixPath(named["folder"]),
        image=named["image"],
        elastic=(config.cluster.min_workers or config.cluster.workers) < config.cluster.workers,
        options=options,
    )
    return config, run


@cache
def render(overlay: str) -> dict[str, str]:
    return kubernetes.render(*submission(command(overlay)))


def build(folder: Path) -> str:
    """What kustomize, as it is in kubectl, makes of a folder."""
    return subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True).stdout


def objects(content: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(kind, name) -> object of each in YAML text."""
    found = [each for each in yaml.safe_load_all(content) if each]
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods of a RayJob or RayCluster as objects of the core API, which has schemas for them."""
    spec = document["spec"]
    cluster = section(spec, "rayClusterSpec") or spec
    templates = [
        section(group, "template") for group in [cluster["headGroupSpec"], *items(cluster, "workerGroupSpecs")]
    ]
    templates += [spec["submitterPodTemplate"]] if "submitterPodTemplate" in spec else []
    name = text(document, "metadata.name")
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, **section(each, "metadata")},
            "spec": each["spec"],
        }
        for each in templates
    ]


def write() -> None:
    for overlay in OVERLAYS:
        folder = K8S / "base" if overlay == "cpu" else K8S / "overlays" / overlay
        wanted = (folder / "kustomization.yaml").read_text()
        for name, content in render(overlay).items():
            if re.search(rf"[\[ ]{re.escape(name)}[\],]", wanted):
                (folder / name).write_text(content)
    for overlay in OVERLAYS:
        (K8S / "rendered" / f"{overlay}.yaml").write_text(build(K8S / "overlays" / overlay))


if __name__ == "__main__":
    write()
