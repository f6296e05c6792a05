"""A run's configuration: its sections (sections.py) in one, and the way from file to `Config`.

`load` reads a YAML file and lays the command line's `key.path=value` over it (yaml_file.py), then checks everything
before anything costs time: keys and types (pydantic), numbers against each other and folders on disk (rules.py). All
problems come at once, each with its place, its line and a way to mend it (problems.py). The `task` section is checked
by the task file's own `Config`, found by its name (task_file.py), so this module imports no task and no torch.

What it gives up: one file describes a run completely. There is no inheritance between files and no interpolation.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, PlainValidator, SerializeAsAny, ValidationError, model_validator

from pipeline import rules, task_file, yaml_file
from pipeline.problems import InvalidConfig, Problem, explain, readable
from pipeline.sections import (
    Checkpoint,
    Cluster,
    Count,
    Data,
    Ema,
    Evaluate,
    Folder,
    Guard,
    Name,
    Optim,
    Precision,
    Strict,
    TaskConfig,
    Track,
    Zero,
)


class Config(Strict):
    """One run. See the sections for their keys."""

    name: Name = Field(description="name of the run and of its folder: letters, digits, . _ -")
    seed: int = Field(default=0, ge=0, lt=2**63, description="fixes initial weights, order of samples and augmentation")
    steps: Count = Field(description="optimizer steps of the whole run")
    global_batch_size: Count = Field(description="samples per optimizer step, over all workers")
    micro_batch_size: Count = Field(description="samples per forward pass; divides global_batch_size")
    runs: Folder = Field(default=Path("runs"), description="folder that holds the run folders")
    compile: bool = Field(default=False, description="torch.compile the model")
    activation_checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")
    deterministic: bool = Field(default=False, description="on GPU: bitwise repeatable kernels, slower")

    data: Data
    task: Annotated[SerializeAsAny[TaskConfig], PlainValidator(task_file.validate)]
    optim: Optim
    zero: Zero = Zero()
    precision: Precision = Precision()
    ema: Ema | None = Field(
        default=None, description="moving average of the weights, evaluated beside them; null: none"
    )
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    track: Track = Track()
    guard: Guard = Guard()
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _numbers_agree(self) -> Config:
        if problems := rules.numbers(rules.Known(self.model_dump())):
            raise InvalidConfig(f"run {self.name}", problems)
        return self

    @property
    def micro_batches(self) -> int:
        """M: micro batches per optimizer step, over all workers."""
        return self.global_batch_size // self.micro_batch_size

    def micro_steps(self, world_size: int) -> int:
        """A = ceil(M / R): micro batches that each of `world_size` workers runs per optimizer step."""
        return -(-self.micro_batches // world_size)


def load(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file, lays `key.path=value` overrides over it, and checks everything, the data folders included.

    Raises `InvalidConfig`, a `ConfigError` whose `.problems` holds every problem found, not only the first.
    """
    return _load(path, overrides, [rules.numbers, rules.folders])


def load_resolved(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """The config of a run elsewhere, or that a run folder keeps: its data may be out of reach, all else is checked."""
    return _load(path, overrides, [rules.numbers])


def resolve(config: Config, folder: Path | None = None) -> Config:
    """The same config with every path absolute, so that it means the same in any working directory.

    Relative ones begin in `folder`, or in the working directory.
    """
    return _absolute(config, folder or Path.cwd())


def unseen(config: Config) -> list[Problem]:
    """What `load` finds on disk and `load_resolved` does not ask for: data folders and a task's files."""
    values = config.model_dump()
    return rules.folders(rules.Known(readable(Config, values, []) | {"task": values["task"]}))


def dump(config: Config) -> str:
    """YAML with every key written out; `load` of it gives an equal config."""
    return yaml_file.text(config.model_dump(mode="json"))


def difference(old: Config, new: Config) -> list[str]:
    """Dotted keys whose values differ, in the order of the file."""
    before, after = _leaves(old.model_dump(mode="json")), _leaves(new.model_dump(mode="json"))
    return [key for key in before | after if key not in before or key not in after or before[key] != after[key]]


class Checked(NamedTuple):
    """A file as far as it can be read. config: None when it cannot be one.  problems: each with its line.

    elsewhere: the same configuration, also when only its folders and files are wrong.
    """

    config: Config | None
    problems: list[Problem]
    source: yaml_file.Source
    elsewhere: Config | None


def check(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Checked:
    """What `load` reads and finds, without raising but for a file that is no YAML at all (`InvalidConfig`)."""
    return _check(path, overrides, [rules.numbers, rules.folders])


def _load(path: str | os.PathLike[str], overrides: Iterable[str], checks: Iterable[rules.Rule]) -> Config:
    found = _check(path, overrides, checks)
    if found.config is None:
        raise InvalidConfig(str(path), found.problems)
    return found.config


def _check(path: str | os.PathLike[str], overrides: Iterable[str], checks: Iterable[rules.Rule]) -> Checked:
    source = yaml_file.read(Path(path))
    yaml_file.lay_over(source, overrides)
    task = task_file.config_class(source.values) or TaskConfig
    problems, config, wrong = source.problems, None, []
    try:
        config = Config.model_validate(source.values)
    except InvalidConfig:
        pass  # each key is right by itself; the same rules say below, where lines are known, what does not fit
    except ValidationError as error:
        wrong = explain(error, Config, {"task": task})
    problems += wrong
    known = readable(Config, source.values, wrong)
    if isinstance(source.values.get("task"), dict):
        known["task"] = readable(task, source.values["task"], wrong, "task.")
    for rule in checks:
        problems += rule(rules.Known(known))
    located = [source.locate(problem) for problem in problems]
    return Checked(None if problems else config, located, source, config)


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return value.model_copy(update={name: _absolute(getattr(value, name), folder) for name in fields})
    if isinstance(value, dict):
        return {key: _absolute(item, folder) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_absolute(item, folder) for item in value)
    return folder / value if isinstance(value, Path) else value


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
