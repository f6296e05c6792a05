"""Reads rendered manifests over before they leave: four books of rules, each found with its file and line.

    rules.py      what KubeRay's operator and Kueue refuse
    pod_security.py          what a namespace that enforces "restricted" refuses
    practice.py   what a run regrets
    parts.py      what does not fit together

What it gives up: unknown keys and wrong types. The API server knows its own schemas, and `kubectl --validate=strict`
asks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.problems import Problem
from pipeline.submit import config_lint, secrecy
from pipeline.submit.kubernetes import parts, pod_security, practice, rules
from pipeline.submit.kubernetes.manifest import Manifest, Run, read, section
from pipeline.submit.submission import CONFIG
from pipeline.yaml_file import Loader

RULES = (*rules.RULES, pod_security.restricted, pod_security.tokens, pod_security.read_only)
RULES += (*practice.RULES, *parts.RULES)


def lint(rendered: Mapping[str, str]) -> list[Problem]:
    """Everything that API server, operator or queue would refuse or a run regret. Sends nothing."""
    manifests, problems = read({name: text for name, text in rendered.items() if name != CONFIG})
    config = rendered.get(CONFIG)
    runs = [manifest for manifest in manifests if manifest.kind in ("RayJob", "RayCluster")]
    if not runs and not problems:
        problems.append(Problem("rayjob.yaml", "is not among what is sent", suggestion="render it again"))
    for manifest in runs:
        beside = tuple(other for other in manifests if other is not manifest)
        run = Run(manifest, beside, _configuration(config, beside))
        problems += [manifest.problem(found) for rule in RULES for found in rule(run)]
        problems += _same_configuration(config, run)
    if config is not None:
        configs, wrong = config_lint.read({CONFIG: config})
        problems += [*wrong, *config_lint.problems(configs), *secrecy.problems({CONFIG: config})]
    return [*problems, *_twice(manifests)]


def _configuration(config: str | None, beside: tuple[Manifest, ...]) -> dict[str, Any]:
    """The run's configuration, as the file that is sent or as the ConfigMap has it."""
    held = next((section(each.values, "data").get(CONFIG) for each in beside if each.kind == "ConfigMap"), None)
    values = Loader(str(config or held or "")).get_single_data()
    return values if isinstance(values, dict) else {}


def _same_configuration(config: str | None, run: Run) -> list[Problem]:
    for each in run.beside:
        held = section(each.values, "data").get(CONFIG)
        if each.kind == "ConfigMap" and config is not None and held is not None and held != config:
            message = f"is another configuration than {CONFIG}, which was checked"
            return [Problem(f"{each.file}: data.{CONFIG}", message, suggestion="render it again")]
    return []


def _twice(manifests: list[Manifest]) -> list[Problem]:
    """Of two objects of one kind and name the second would replace the first."""
    seen: set[tuple[str, str, str]] = set()
    problems = []
    for each in manifests:
        key = each.kind, str(section(each.values, "metadata").get("namespace")), each.name
        if key in seen:
            problems.append(Problem(f"{each.file}: metadata.name", f"a second {each.kind} {each.name}"))
        seen.add(key)
    return problems
