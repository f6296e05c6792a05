"""What a configuration must be, beyond what `train` asks, to be trained on by somebody else's machines.

Reads the rendered text as the job will read it. Its numbers and folders were checked before it was rendered; here is
what only the way to another machine can break.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from pipeline.problems import Problem
from pipeline.yaml_file import Loader

PATHS = ("runs", "data.train.*.folder", "data.evaluate.*", "task.pretrained", "task.vocabulary", "task.tokenizer")


def read(rendered: Mapping[str, str]) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """The configurations among rendered files by name (config.yaml, config-0.yaml, ...), and those that are none."""
    found, problems = {}, []
    for name, text in rendered.items():
        if name.startswith("config") and name.endswith(".yaml"):
            try:
                values = Loader(text).get_single_data()
            except yaml.YAMLError as error:
                problems.append(Problem(name, f"is not YAML: {error}", suggestion="render it again"))
                continue
            if isinstance(values, dict):
                found[name] = values
            else:
                problems.append(Problem(name, "holds no configuration", suggestion="render it again"))
    if not found and not problems:
        problems.append(Problem("config.yaml", "is not among what is sent", suggestion="render it again"))
    return found, problems


def problems(configs: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    """Relative paths, no workers to start, an address of another cluster, two members with one run folder."""
    found: list[Problem] = []
    folders: dict[tuple[str, str], str] = {}
    for name, values in configs.items():
        for pattern in PATHS:
            for place, path in _at(values, pattern.split("."), ""):
                if path is not None and "://" not in str(path) and not PurePosixPath(str(path)).is_absolute():
                    mend = "write it from / on, or render it again: relative ones begin in --folder"
                    found.append(Problem(f"{name}: {place}", f"{path} means another place elsewhere", suggestion=mend))
        if (address := value(values, "cluster.address")) is not None:
            mend = "leave cluster.address out"
            found.append(
                Problem(f"{name}: cluster.address", f"{address} is not the cluster it is sent to", suggestion=mend)
            )
        if workers(values) < 1:
            mend = "set cluster.workers to at least 1; 0 is for debugging, in one process here"
            found.append(Problem(f"{name}: cluster.workers", "0 workers need no cluster", suggestion=mend))
        folder = str(values.get("runs")), str(values.get("name"))
        if folder in folders:
            mend = "give each member a name of its own"
            found.append(Problem(f"{name}: name", f"is that of {folders[folder]}: one run folder", suggestion=mend))
        folders[folder] = name
    return found


def value(values: Mapping[str, Any], place: str) -> Any:
    """The value at a dotted key, None where there is none."""
    inside: Any = values
    for part in place.split("."):
        inside = inside.get(part) if isinstance(inside, Mapping) else None
    return inside


def workers(values: Mapping[str, Any]) -> int:
    """cluster.workers as it is read: 2 where it is left out."""
    said = value(values, "cluster.workers")
    return said if isinstance(said, int) else 2


def _at(values: Any, pattern: Sequence[str], place: str) -> list[tuple[str, Any]]:
    """(dotted key, value) of everything in `values` that a pattern of keys and * matches."""
    if not pattern:
        return [(place.removeprefix("."), values)]
    if not isinstance(values, Mapping):
        return []
    keys = list(values) if pattern[0] == "*" else [key for key in values if key == pattern[0]]
    return [each for key in keys for each in _at(values[key], pattern[1:], f"{place}.{key}")]
