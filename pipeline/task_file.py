"""Finds the file of a task by its name in YAML, and hands the `task` section to the `Config` in it.

A task is a module with a class `Config` and a class `Task`: a file in pipeline/tasks/, known by its file name, or any
importable module, known by its dotted path. Nothing is registered. Task files import no torch at their top, so this is
quick enough to happen while a configuration is checked.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from pipeline.problems import InvalidConfig, Problem, explain, nearest

Section = TypeVar("Section", bound=BaseModel)
FOLDER = Path(__file__).parent / "tasks"


def names() -> list[str]:
    """Names of the task files that come with Millstream, found by listing their folder."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


def find(name: str) -> ModuleType:
    """The module of the task called `name`. Raises `InvalidConfig` when there is none that works."""
    if "." not in name and name not in names():
        known = f"the tasks are: {', '.join(names())}; any other by import path, such as my_package.my_task"
        raise _no_task(f"there is no task {name!r}", nearest(name, names()) or known)
    module_name = name if "." in name else f"pipeline.tasks.{name}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        mend = f"install the package that has {error.name!r}, or put its folder on PYTHONPATH"
        raise _no_task(f"task {name!r} cannot be imported: {error}", mend) from None
    except Exception as error:  # a task file is anyone's code
        mend = f"see the whole traceback with `python -c 'import {module_name}'`"
        raise _no_task(f"importing task {name!r} fails with {type(error).__name__}: {error}", mend) from error
    if not hasattr(module, "Config") or not hasattr(module, "Task"):
        raise _no_task(f"{module_name} is no task", "a task file has a class Config and a class Task")
    return module


def validate(section: object) -> BaseModel:
    """The `task` section as its task's own `Config`; for pydantic, so every error keeps its place below `task`."""
    if isinstance(section, BaseModel):
        return section
    if not isinstance(section, Mapping):
        raise _at(None, "should be a section, not a single value", "write `task:` and below it `name: ...`", section)
    name = section.get("name")
    if not isinstance(name, str):
        raise _at("name", "is missing", f"add `name: ...`, one of: {', '.join(names())}", section)
    try:
        module = find(name)
    except InvalidConfig as error:
        raise _at("name", error.problems[0].message, error.problems[0].suggestion, name) from None
    return module.Config.model_validate(section)


def options(section: type[Section], given: Mapping[str, str]) -> Section:
    """Key=value words of a command line, read as the keys of `section`. Raises `InvalidConfig` with all mistakes."""
    try:
        return section.model_validate(given)
    except ValidationError as error:
        raise InvalidConfig("the command line", explain(error, section, {})) from None


def config_class(values: Mapping[str, object]) -> type[BaseModel] | None:
    """The class that `validate` uses for the `task` section of `values`, or None when it names no task."""
    section = values.get("task")
    name = section.get("name") if isinstance(section, Mapping) else None
    try:
        return find(name).Config if isinstance(name, str) else None
    except InvalidConfig:
        return None


def _no_task(message: str, suggestion: str) -> InvalidConfig:
    return InvalidConfig("the configuration", [Problem("task.name", message, suggestion=suggestion)])


def _at(key: str | None, message: str, suggestion: str | None, given: object) -> ValidationError:
    error = PydanticCustomError("task", "{message}", {"message": message, "suggestion": suggestion})
    location = (key,) if key else ()
    return ValidationError.from_exception_data("task", [InitErrorDetails(type=error, loc=location, input=given)])
