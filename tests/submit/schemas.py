"""Manifests against the schemas of what will read them, as strictly as an API server that is asked to be strict.

Core kinds by kubernetes-validate, which carries the schemas of Kubernetes' own releases. KubeRay's kinds by its
CustomResourceDefinitions: types, enums, patterns, unknown fields, and the rules in CEL. No package ships those, and
they are not committed: MILLSTREAM_KUBERAY_CRDS names a folder of them (helm-chart/kuberay-operator/crds of
ray-project/kuberay), or they lie in ~/.cache/millstream-tests/kuberay-crds.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import yaml

CRDS = "MILLSTREAM_KUBERAY_CRDS"
CACHE = Path.home() / ".cache/millstream-tests/kuberay-crds"
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 253},
        "namespace": {"type": "string"},
        "labels": TEXTS,
        "annotations": TEXTS,
    },
}


class Definition(NamedTuple):
    """schema: as published, with defaults and rules.  strict: refuses what it does not name."""

    schema: dict[str, Any]
    strict: jsonschema.Draft202012Validator


def folder() -> Path | None:
    """Where the definitions are; None where they are not."""
    found = Path(os.environ.get(CRDS, CACHE))
    return found if list(found.glob("*ray*.yaml")) else None


@cache
def definitions() -> dict[tuple[str, str], Definition]:
    """(apiVersion, kind) -> its definition."""
    found = {}
    for path in sorted((folder() or Path()).glob("*ray*.yaml")):
        crd = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
        for version in crd["spec"]["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            strict = _strict(schema)
            strict["properties"] = {**strict["properties"], "metadata": METADATA}
            key = f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]
            found[key] = Definition(schema, jsonschema.Draft202012Validator(strict))
    return found


def of_ray(document: dict[str, Any]) -> list[str]:
    """What KubeRay's definitions refuse in an object of theirs."""
    definition = definitions()[document["apiVersion"], document["kind"]]
    document = copy.deepcopy(document)
    _fill_in(definition.schema, document)  # as an API server does first: what has a default may be left out
    errors = [f"{error.json_path}: {error.message[:200]}" for error in definition.strict.iter_errors(document)]
    return errors or list(_rules(definition.schema, document, "$"))


def of_core(document: dict[str, Any]) -> list[str]:
    """What Kubernetes' own schemas refuse in an object of theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import kubernetes_validate
    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{error.path}: {error.message[:200]}"]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"there is no {document['kind']} in {document['apiVersion']}"]
    return []


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema of OpenAPI v3 as a JSON Schema that refuses fields that it does not name."""
    schema = {key: value for key, value in schema.items() if key != "default"}
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
        return {**schema, "anyOf": [{"type": "integer"}, {"type": "string"}]}
    if schema.pop("nullable", False) and "type" in schema:
        schema["type"] = [schema["type"], "null"]
    keep = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
    if "properties" in schema:
        schema["properties"] = {key: _strict(value) for key, value in schema["properties"].items()}
    if schema.get("type") == "object" and "additionalProperties" not in schema and not keep:
        schema["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = _strict(schema[key])
    return schema


def _fill_in(schema: dict[str, Any], value: Any) -> None:
    if isinstance(value, dict):
        for key, inside in schema.get("properties", {}).items():
            if key not in value and "default" in inside:
                value[key] = copy.deepcopy(inside["default"])
            if key in value:
                _fill_in(inside, value[key])
        if isinstance(schema.get("additionalProperties"), dict):
            for inside in value.values():
                _fill_in(schema["additionalProperties"], inside)
    elif isinstance(value, list):
        for inside in value:
            _fill_in(schema.get("items", {}), inside)


def _rules(schema: dict[str, Any], value: Any, place: str) -> Iterator[str]:
    """What the rules in CEL refuse; those that compare with an older object do not apply to a new one."""
    import cel

    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" not in rule["rule"] and cel.evaluate(rule["rule"], {"self": value}) is not True:
            yield f"{place}: {rule.get('message') or rule['rule']}"
    if isinstance(value, dict):
        for key, inside in schema.get("properties", {}).items():
            if key in value:
                yield from _rules(inside, value[key], f"{place}.{key}")
    elif isinstance(value, list):
        for number, inside in enumerate(value):
            yield from _rules(schema.get("items", {}), inside, f"{place}[{number}]")
