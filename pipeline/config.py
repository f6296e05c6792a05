"""Every knob of a run, in the order of its YAML file, and the way from file to `Config`.

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
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipeline import rules, task_file, yaml_file
from pipeline.problems import InvalidConfig, explain, readable

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Folder = Annotated[Path, AfterValidator(Path.expanduser)]


class Strict(BaseModel):
    """A frozen section that refuses keys it does not know. Base of every section, also of each task's `Config`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: object, info: ValidationInfo) -> object:
        """`steps: true` is a slip, though Python would count it as 1."""
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        return str(value).lower() if isinstance(value, bool) and kinds <= {int, float, type(None)} else value


class Source(Strict):
    """One of the data sets that are trained on together."""

    folder: Folder = Field(description="folder of indexed tar shards")
    weight: float = Field(default=1.0, gt=0, description="its part of the samples, relative to the other weights")


def _sources(value: object) -> object:
    """`train: FOLDER` is short for one source."""
    named = {"train": value} if isinstance(value, str | Path) else value
    if isinstance(named, Mapping) and named:
        return {name: {"folder": item} if isinstance(item, str | Path) else item for name, item in named.items()}
    raise ValueError("should be a folder of shards, or several by name, such as {prose: data/prose, code: data/code}")


Sources = Annotated[dict[Name, Source], BeforeValidator(_sources)]


class Data(Strict):
    """Where samples come from, how they are mixed, and how far ahead they are read."""

    train: Sources = Field(description="folder of indexed tar shards to train on; or several by name, to be mixed")
    evaluate: dict[Name, Folder] = Field(default={}, description="name -> folder of indexed tar shards to evaluate on")
    lanes: Count | None = Field(default=None, description="reading positions; null: one per micro batch of a step")
    shuffle_blocks: Count = Field(default=96, description="blocks that are shuffled together, over all lanes")
    block_bytes: Count = Field(default=1 << 20, description="bytes that are read in one piece, on average")
    threads: int = Field(default=1, ge=0, description="decoder threads per worker; 0: in the loop itself, when needed")
    processes: int = Field(default=0, ge=0, description="decoder processes per worker, instead of threads; 0: threads")
    prefetch: Count = Field(default=4, description="micro batches decoded ahead of need, per worker")
    check_digests: bool = Field(default=True, description="compare every sample read with the digest in the index")
    bad_samples: Literal["fail", "substitute"] = Field(default="fail", description="substitute: the next good one")
    max_bad_samples: Count = Field(default=100, description="more substituted samples than these end the run")
    decoders: dict[str, str] = Field(default={}, description="extension -> import path of its decoder, module:function")


class Schedule(Strict):
    """The learning rate as a function of the step: warm-up from 0, then a shape, down to `final` x lr."""

    name: Literal["cosine", "linear", "constant", "wsd"] = Field(default="cosine", description="after the warm-up")
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up")
    decay: Count | None = Field(default=None, description="steps of the last, falling part (wsd only)")
    final: Share = Field(default=0.0, description="learning rate at the last step, as a share of lr")


class Group(Strict):
    """Parameters that are treated apart."""

    match: str = Field(min_length=1, description="glob over parameter names, such as *.embeddings.*")
    lr_scale: float = Field(default=1.0, ge=0, description="factor on the learning rate")
    weight_decay: float | None = Field(default=None, ge=0, description="instead of optim.weight_decay")


class Optim(Strict):
    """Optimizer, its learning rate over time, and its parameter groups."""

    name: Literal["adamw", "sgd"] = Field(description="optimizer")
    lr: float = Field(gt=0, description="peak learning rate")
    weight_decay: float = Field(default=0.0, ge=0, description="per step and unit of learning rate (adamw: decoupled)")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.999), description="decay of adamw's two running means, per step")
    eps: float = Field(default=1e-8, gt=0, description="added to adamw's denominator")
    momentum: Decay = Field(default=0.9, description="decay of sgd's running gradient, per step")
    nesterov: bool = Field(default=False, description="sgd looks one momentum step ahead")
    clip: float | None = Field(default=1.0, gt=0, description="largest norm of the whole gradient; null: any")
    groups: tuple[Group, ...] = Field(default=(), description="first group whose glob matches a parameter name has it")
    decay_norm_and_bias: bool = Field(default=False, description="weight decay also for 1-d parameters (norms, biases)")
    schedule: Schedule = Field(default=Schedule(), description="learning rate over time")


class Zero(Strict):
    """How DeepSpeed shares the model's state among workers."""

    stage: Literal[0, 1, 2, 3] = Field(default=1, description="1: optimizer state, 2: gradients too, 3: weights too")
    extra: dict[str, Any] = Field(default={}, description="any other DeepSpeed setting, in DeepSpeed's own words")


class Precision(Strict):
    """Numbers of the forward and backward pass; master weights and optimizer state are always fp32."""

    dtype: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="fp16 scales the loss and needs a GPU")


class Checkpoint(Strict):
    """When the run is saved and what is kept."""

    every: Count = Field(default=100, description="steps between checkpoints; the last step is always saved")
    keep: Count = Field(default=2, description="newest good checkpoints that stay")
    keep_every: Count | None = Field(default=None, description="steps; checkpoints at its multiples stay for good")


class Evaluate(Strict):
    """When the sets of `data.evaluate` are scored; always at the end."""

    every: Count | None = Field(default=None, description="steps between evaluations; null: only at the end")
    best: str | None = Field(default=None, description="set/metric whose best value is kept, such as test/accuracy")
    mode: Literal["max", "min"] = Field(default="max", description="whether larger or smaller is better")


class Track(Strict):
    """Weights & Biases, besides the run's own journal; it can neither stop nor slow a run."""

    wandb: Literal["auto", "online", "offline", "off"] = Field(default="auto", description="auto: online, given a key")
    project: str = Field(default="millstream", min_length=1, description="W&B project")
    entity: str | None = Field(default=None, description="W&B user or team")
    group: str | None = Field(default=None, description="W&B group of runs")
    tags: tuple[str, ...] = Field(default=(), description="W&B tags")


class Guard(Strict):
    """What happens when numbers or workers go wrong."""

    non_finite: Literal["skip", "stop"] = Field(default="skip", description="on a NaN or infinite loss or gradient")
    max_skipped: Count = Field(default=3, description="skipped steps in a row that end the run")
    collective_timeout_seconds: float = Field(default=600, gt=0, description="seconds a worker waits for the others")


class Cluster(Strict):
    """Workers and where they run."""

    workers: int = Field(default=2, ge=0, description="training processes; 0: this process alone, without Ray")
    threads_per_worker: Count = Field(default=1, description="CPU threads of each; another number moves the last bits")
    address: str | None = Field(default=None, description="of a running Ray cluster; null: one is started here")
    gpu: bool | None = Field(default=None, description="one GPU per worker; null: when there is one")
    restarts: int = Field(default=3, ge=0, description="attempts after the first, when workers are lost")


class TaskConfig(Strict):
    """What every task section has; the rest is the task file's own."""

    name: str = Field(description="file in pipeline/tasks/, or an import path such as my_package.my_task")


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


def load_resolved(path: str | os.PathLike[str]) -> Config:
    """The config that a run folder keeps. Its data may be out of reach: a run is looked at on other machines too."""
    return _load(path, (), [rules.numbers])


def resolve(config: Config) -> Config:
    """The same config with every path absolute, so that it means the same in any working directory."""
    return _absolute(config)


def dump(config: Config) -> str:
    """YAML with every key written out; `load` of it gives an equal config."""
    return yaml_file.text(config.model_dump(mode="json"))


def difference(old: Config, new: Config) -> list[str]:
    """Dotted keys whose values differ, in the order of the file."""
    before, after = _leaves(old.model_dump(mode="json")), _leaves(new.model_dump(mode="json"))
    return [key for key in before | after if key not in before or key not in after or before[key] != after[key]]


def _load(path: str | os.PathLike[str], overrides: Iterable[str], checks: Iterable[rules.Rule]) -> Config:
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
    for check in checks:
        problems += check(rules.Known(known))
    if problems or config is None:
        raise InvalidConfig(str(path), [source.locate(problem) for problem in problems])
    return config


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation such as `Count` or `float | None` is made of."""
    inside = get_args(annotation)
    return set().union(*map(_kinds, inside)) if inside else {annotation} if isinstance(annotation, type) else set()


def _absolute(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_copy(update={name: _absolute(getattr(value, name)) for name in type(value).model_fields})
    if isinstance(value, dict):
        return {key: _absolute(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_absolute, value))
    return value.absolute() if isinstance(value, Path) else value


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
