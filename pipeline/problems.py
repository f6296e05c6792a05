"""What is wrong with a configuration, said so that it can be mended: place, line, message, suggestion.

`explain` turns pydantic's errors into `Problem`s. `readable` gives the values that can be read although others are
wrong, so that rules across keys are checked in the same go.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from pipeline.errors import ConfigError

UNION_TAG = re.compile(r"\[key\]|constrained-\w+|literal\[.*\]")  # pydantic's, in an error's place
# The key that people look for, in the words of other trainers -> where it is here.
ELSEWHERE = {
    "learning_rate": "optim.lr",
    "max_lr": "optim.lr",
    "max_steps": "steps",
    "num_train_steps": "steps",
    "epochs": "steps (epochs x samples / global_batch_size)",
    "num_epochs": "steps (epochs x samples / global_batch_size)",
    "num_workers": "cluster.workers (training processes) or data.threads (decoders)",
    "gradient_accumulation_steps": "micro_batch_size (accumulation follows from it and the number of workers)",
    "gradient_clipping": "optim.clip",
    "max_grad_norm": "optim.clip",
    "warmup_steps": "optim.schedule.warmup",
    "save_steps": "checkpoint.every",
    "eval_steps": "evaluate.every",
    "output_dir": "runs",
    "fp16": "precision.dtype",
    "bf16": "precision.dtype",
}


@dataclass(frozen=True)
class Problem:
    """One thing to mend. `place` is a dotted key (after `command line: ` if given there), `line` counts from 1."""

    place: str
    message: str
    line: int | None = None
    suggestion: str | None = None

    def __str__(self) -> str:
        where = self.place + (f" (line {self.line})" if self.line else "")
        text = f"{where}: {self.message}" if self.place else f"{where} {self.message}"
        return text + (f"\n   -> {self.suggestion}" if self.suggestion else "")


class InvalidConfig(ConfigError):
    """Everything that is wrong with one configuration: `.source` (a file) and `.problems`, in the order of the file."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        super().__init__(source, problems)
        self.source = source
        self.problems = sorted(problems, key=lambda problem: problem.line or 0)

    def __str__(self) -> str:
        if len(self.problems) == 1 and not self.problems[0].place:
            return f"{self.source}{self.problems[0]}"
        many = f"{len(self.problems)} problems" if len(self.problems) > 1 else "a problem"
        listed = "\n".join(f"{number}. {problem}" for number, problem in enumerate(self.problems, 1))
        return f"{self.source} has {many}:\n{listed}"


def explain(
    error: ValidationError, model: type[BaseModel], sections: Mapping[str, type[BaseModel] | None]
) -> list[Problem]:
    """Pydantic's errors in plain words. `sections` names the models of top-level keys that `model` leaves open."""
    problems = []
    for item in error.errors(include_url=False):
        location = tuple(part for part in item["loc"] if not UNION_TAG.fullmatch(str(part)))
        place, key = ".".join(map(str, location)), str(location[-1]) if location else ""
        owner = _model_at(model, location[:-1], sections)
        message, suggestion = _words(item["type"], item["input"], item.get("ctx", {}), item["msg"])
        if item["type"] == "extra_forbidden" and owner:
            suggestion = _known_key(key, owner, model)
        elif item["type"] == "missing" and owner:
            suggestion = f"add `{key}: ...` ({owner.model_fields[key].description or 'a section'})"
        if problems and problems[-1].place == place and item["type"] == "literal_error":  # the other half of a union
            choices = item.get("ctx", {}).get("expected", "").replace("'", "")
            problems[-1] = replace(problems[-1], message=f"{problems[-1].message}; or {choices}")
        else:
            problems.append(Problem(place, message, suggestion=suggestion))
    return problems


def readable(
    model: type[BaseModel], values: Mapping[str, Any], wrong: Sequence[Problem], at: str = ""
) -> dict[str, Any]:
    """Nested values of `model` as pydantic would have them, without those that are wrong or missing."""
    read: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        place, section = at + name, _model_in(info.annotation)
        if name not in values:
            if not info.is_required():
                default = info.get_default(call_default_factory=True)
                read[name] = default.model_dump() if isinstance(default, BaseModel) else default
        elif section and section is info.annotation and isinstance(values[name], Mapping):
            read[name] = readable(section, values[name], wrong, place + ".")
        elif not any(place in upwards(problem.place) for problem in wrong):
            with suppress(ValidationError):  # a task's own validator may know better than the plain type
                read[name] = TypeAdapter(info.rebuild_annotation()).validate_python(values[name])
    return read


def nearest(word: str, known: Iterable[str]) -> str | None:
    """`did you mean ...?` for the nearest of the known words, or None when none is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {found[0]}?" if found else None


def _known_key(key: str, owner: type[BaseModel], root: type[BaseModel]) -> str:
    """The key that was probably meant: one of this section's, one of another's, or the list of this section's."""
    if key in ELSEWHERE:
        return f"Millstream calls it {ELSEWHERE[key]}"
    near = nearest(key, owner.model_fields)
    elsewhere = [place for place in places(root) if place.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return near or f"known here: {', '.join(owner.model_fields)}"


def _words(kind: str, value: object, context: Mapping[str, Any], message: str) -> tuple[str, str | None]:
    """(message, suggestion) for one of pydantic's error types."""
    shown = _shown(value)
    match kind:
        case "extra_forbidden":
            return "there is no such key", None
        case "missing":
            return "is missing", None
        case "int_parsing" | "int_type" | "int_from_float" | "int_parsing_size":
            return f"should be a whole number, not {shown}", None
        case "float_parsing" | "float_type" | "finite_number":
            return f"should be a number, not {shown}", None
        case "bool_parsing" | "bool_type":
            return f"should be true or false, not {shown}", None
        case "string_type" if isinstance(value, (list, dict)) or value is None:
            return f"should be text, not {shown}", None
        case "string_type":
            return f"should be text, not {shown}", f"put it in quotes: '{value}'"
        case "path_type":
            return f"should be a path, not {shown}", None
        case "string_pattern_mismatch":
            return f"{shown} is not a name", "use letters, digits, . _ and -, the first a letter or digit"
        case "literal_error":
            choices = context["expected"].replace("'", "").replace(" or ", ", ")
            return f"{shown} is none of: {choices}", nearest(str(value), choices.split(", "))
        case "greater_than_equal" | "less_than_equal" | "greater_than" | "less_than":
            word = {"ge": "at least", "le": "at most", "gt": "more than", "lt": "less than"}
            name, limit = next((name, context[name]) for name in word if name in context)
            return f"must be {word[name]} {limit:g}, not {shown}", None
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"should be a section with keys of its own, not {shown}", None
        case "list_type" | "tuple_type":
            return f"should be a list, not {shown}", None
        case "too_short" | "too_long":
            return f"{message[0].lower()}{message[1:]}", None
    return message.removeprefix("Value error, "), context.get("suggestion")


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "empty"
    text = str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def upwards(place: str) -> Iterator[str]:
    """`a.b.c`, `a.b`, `a`."""
    while place:
        yield place
        place = place.rpartition(".")[0]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The section class in an annotation such as `tuple[Group, ...]` or `Schedule | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _model_at(
    model: type[BaseModel], location: Sequence[Any], sections: Mapping[str, type[BaseModel] | None]
) -> type[BaseModel] | None:
    at: type[BaseModel] | None = model
    for depth, part in enumerate(location):
        if depth == 0 and part in sections:
            at = sections[part]
        elif isinstance(part, str) and at and part in at.model_fields:
            at = _model_in(at.model_fields[part].annotation)
    return at


def places(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted places of all keys of `model`."""
    for name, info in model.model_fields.items():
        yield prefix + name
        section = _model_in(info.annotation)
        if section and section is info.annotation:
            yield from places(section, f"{prefix}{name}.")
