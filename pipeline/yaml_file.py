"""Reads a YAML file into plain values without forgetting where each key stood, and lays overrides over it.

PyYAML follows YAML 1.1, where `3e-4` is text, `off` is false and `2024-05-01` is a date. Here, as in YAML 1.2, they are
a number, text and text. What it gives up: comments, and the line of a key inside a second use of an alias.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.problems import InvalidConfig, Problem, nearest, upwards


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the plain values of YAML 1.2."""


class Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which also puts text in quotes that only `Loader` would take for a number."""


TRUTH, DATE = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"
EXPONENT = re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in (TRUTH, DATE)]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(TRUTH, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
for kind in (Loader, Dumper):
    kind.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


@dataclass
class Source:
    """A YAML file as plain values, the line of each dotted key, and the keys that the command line gave instead."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    given: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def locate(self, problem: Problem) -> Problem:
        """The problem with the line of its key, or of the nearest section around it; or as the command line's."""
        around = list(upwards(problem.place))
        if problem.line or problem.place.startswith("command line"):
            return problem
        if any(place in self.given for place in around) or any(
            key.startswith(problem.place + ".") for key in self.given
        ):
            return replace(problem, place=f"command line: {problem.place}")
        return replace(problem, line=next((self.lines[place] for place in around if place in self.lines), None))


def read(path: Path) -> Source:
    """Parses a YAML file. What keeps it from being parsed at all is raised as `InvalidConfig` with that one problem."""
    try:
        loader = Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        source = Source()
        _note_lines(node, "", source, set())
        values = loader.construct_document(node) if node else None
    except OSError as error:
        there = [item.name for item in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        mend = nearest(path.name, there) or "configs/ holds complete examples"
        if "=" in path.name and not path.exists():
            mend = "the YAML file comes first, what is KEY=VALUE behind it"
        raise InvalidConfig(str(path), [Problem("", f"cannot be read: {error.strerror}", suggestion=mend)]) from None
    except UnicodeDecodeError as error:
        raise InvalidConfig(str(path), [Problem("", f"is not UTF-8 text: {error.reason}")]) from None
    except yaml.YAMLError as error:
        raise InvalidConfig(str(path), [_syntax(error)]) from None
    if not isinstance(values, dict):
        message = "is empty" if values is None else "holds no `key: value` lines"
        raise InvalidConfig(str(path), [Problem("", message, suggestion="configs/ holds complete examples")])
    source.values = values
    return source


def text(values: dict[str, Any]) -> str:
    """Plain values as a YAML file that `read` gives back as they are."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def scalar(value: object) -> str:
    """A path or name as text within YAML, in quotes where it would be read as something else."""
    dumped = yaml.dump([str(value)], Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=math.inf)
    return dumped.strip()[1:-1]


def lay_over(source: Source, overrides: Iterable[str]) -> None:
    """Sets each `key.path=value` in `source`, the value read as YAML; list items are numbered from 0."""
    for override in overrides:
        place, equals, given = override.partition("=")
        place = place.strip()
        if not equals or not place:
            mend = "write key.path=value, such as optim.lr=1e-3"
            source.problems.append(Problem("command line", f"{override!r} is not an override", suggestion=mend))
            continue
        try:
            value = Loader(given).get_single_data()
            _set(source.values, place.split("."), value)
        except yaml.YAMLError:
            mend = "put the value in quotes, for the shell and for YAML: 'key=\"value\"'"
            source.problems.append(Problem(f"command line: {place}", f"{given!r} is not YAML", suggestion=mend))
        except (KeyError, IndexError, ValueError, TypeError):
            message = "goes through something that is not a section"
            source.problems.append(Problem(f"command line: {place}", message))
        else:
            source.given.add(place)


def _syntax(error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None)
    said = [part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part]
    message = "is not YAML: " + (", ".join(said) or str(error))
    line = mark.line + 1 if mark else None
    if "'\\t'" in message:
        return Problem("", "is not YAML: a tab where an indent or a value begins", line, "indent with spaces")
    mend = "look at this line and the one before: the indent, a colon without a space, a quote left open"
    return Problem("", message, line, mend)


def _note_lines(node: yaml.Node | None, prefix: str, source: Source, seen: set[int]) -> None:
    """Notes the line of every key below `node`, and keys that stand twice in one section."""
    if node is None or id(node) in seen:  # an alias may point back at what holds it
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place, line = f"{prefix}{key.value}", key.start_mark.line + 1
            if place in source.lines:
                message = f"stands here again, first on line {source.lines[place]}"
                source.problems.append(Problem(place, message, line, "keep one of the two"))
            source.lines[place] = line
            _note_lines(value, place + ".", source, seen)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            source.lines[f"{prefix}{number}"] = value.start_mark.line + 1
            _note_lines(value, f"{prefix}{number}.", source, seen)


def _set(values: Any, path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        if isinstance(values, dict) and values.get(part) is None:
            values[part] = {}
        values = values[int(part) if isinstance(values, list) else part]
    if isinstance(values, list):
        values[int(path[-1])] = value
    elif isinstance(values, dict):
        values[path[-1]] = value
    else:
        raise TypeError(f"{path[-2]} is no section")
