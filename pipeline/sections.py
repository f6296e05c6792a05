"""The sections of a run's configuration and their keys, in the order of its YAML file; config.py joins them.

Each key says what it is; `Strict` refuses those that nobody knows. What a section's numbers must be to each other and
to the others is said in rules.py. What it gives up: defaults stand here and nowhere else, so a change of one changes
runs that did not set it; the resolved configuration in a run folder has every key written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Folder = Annotated[Path, AfterValidator(Path.expanduser)]


def _place(value: object) -> object:
    """A URL stays as it is; all else is a path."""
    if not isinstance(value, str | Path):
        return value
    return str(value) if "://" in str(value) else Path(value).expanduser()


Shards = Annotated[Path | str, BeforeValidator(_place)]


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

    folder: Shards = Field(description="folder of indexed tar shards, or a URL of one")
    weight: float = Field(default=1.0, gt=0, description="its part of the samples, relative to the other weights")


def _sources(value: object) -> object:
    """`train: FOLDER` is short for one source."""
    named = {"train": value} if isinstance(value, str | Path) else value
    if isinstance(named, Mapping) and named:
        return {name: {"folder": item} if isinstance(item, str | Path) else item for name, item in named.items()}
    raise ValueError("should be a folder of shards, or several by name, such as {prose: data/prose, code: data/code}")


def _window(value: tuple[int, int]) -> tuple[int, int]:
    if 0 <= value[0] <= value[1]:
        return value
    raise ValueError("should be the first and the last step that are left out, such as [100, 119]")


Sources = Annotated[dict[Name, Source], BeforeValidator(_sources)]
Window = Annotated[tuple[int, int], AfterValidator(_window)]


class Data(Strict):
    """Where samples come from, how they are mixed, and how far ahead they are read."""

    train: Sources = Field(description="folder or URL of indexed tar shards to train on; or several by name, mixed")
    evaluate: dict[Name, Shards] = Field(default={}, description="name -> folder or URL of shards to evaluate on")
    lanes: Count | None = Field(default=None, description="reading positions; null: one per micro batch of a step")
    shuffle_blocks: Count = Field(default=96, description="blocks that are shuffled together, over all lanes")
    block_bytes: Count | None = Field(
        default=None, description="bytes that are read in one piece, on average; null: 1 MiB, of a URL 4 MiB"
    )
    cache: Folder | None = Field(
        default=None, description="where each node keeps what it reads of URLs; null: millstream-cache-UID in TMPDIR"
    )
    cache_bytes: Count = Field(default=32 << 30, description="that it keeps there at most, for all its workers")
    threads: int = Field(default=1, ge=0, description="decoder threads per worker; 0: in the loop itself, when needed")
    processes: int = Field(default=0, ge=0, description="decoder processes per worker, instead of threads; 0: threads")
    prefetch: Count = Field(default=4, description="micro batches decoded ahead of need, per worker")
    check_digests: bool = Field(default=True, description="compare every sample read with the digest in the index")
    bad_samples: Literal["fail", "substitute"] = Field(default="fail", description="substitute: the next good one")
    max_bad_samples: Count = Field(default=100, description="more substituted samples than these end the run")
    decoders: dict[str, str] = Field(default={}, description="extension -> import path of its decoder, module:function")
    skip_steps: tuple[Window, ...] = Field(
        default=(), description="windows of steps that are left out, such as [[100, 119]]; each counts as a step"
    )


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


Optimizer = Literal["adamw", "adam", "nadam", "radam", "adamax", "adadelta", "rmsprop", "sgd", "lion", "muon"]
_WHOLE = "it looks at whole matrices or layers, and ZeRO gives each worker a flat slice of them"
_NOT_ELEMENTWISE = {
    **dict.fromkeys(("adafactor", "lamb", "lars", "shampoo", "soap"), _WHOLE),
    "lbfgs": "its line search runs a step's forward pass several times",
    "sparseadam": "it takes sparse gradients, which ZeRO does not",
    "adagrad": "DeepSpeed builds torch's anew at ZeRO 1 to 3, and its parameter groups are lost",
    "asgd": "its averages begin from the learning rate, which is set step by step here",
    "rprop": "it needs the gradient of the whole data set, and its steps begin from the learning rate",
}


def _optimizer(name: object) -> object:
    """Those that are known and cannot serve are refused with the reason."""
    plain = str(name).lower().replace("_", "").replace("-", "")
    if plain in _NOT_ELEMENTWISE:
        raise ValueError(
            f"{name} cannot serve: {_NOT_ELEMENTWISE[plain]}. Proven are: {', '.join(get_args(Optimizer))}"
        )
    return name


class Optim(Strict):
    """Optimizer, its learning rate over time, and its parameter groups."""

    name: Annotated[Optimizer, BeforeValidator(_optimizer)] = Field(description="optimizer")
    lr: float = Field(gt=0, description="peak learning rate")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="per step and unit of learning rate (adamw, lion: decoupled; others: in the gradient)",
    )
    betas: tuple[Decay, Decay] = Field(
        default=(0.9, 0.999), description="decay of adam's and lion's two running means; rmsprop, adadelta: the second"
    )
    eps: float = Field(default=1e-8, gt=0, description="added to the denominator (all but sgd, lion)")
    momentum: Decay = Field(default=0.9, description="decay of sgd's, rmsprop's, muon's running gradient, per step")
    nesterov: bool = Field(default=False, description="sgd looks one momentum step ahead")
    clip: float | None = Field(default=1.0, gt=0, description="largest norm of the whole gradient; null: any")
    freeze: tuple[str, ...] = Field(default=(), description="globs over names of parameters that are not trained")
    groups: tuple[Group, ...] = Field(default=(), description="first group whose glob matches a parameter name has it")
    layer_decay: float = Field(
        default=1.0, gt=0, le=1, description="factor on the learning rate from each layer to the one below it; 1: none"
    )
    decay_norm_and_bias: bool = Field(default=False, description="weight decay also for 1-d parameters (norms, biases)")
    schedule: Schedule = Field(default=Schedule(), description="learning rate over time")


class Zero(Strict):
    """How DeepSpeed shares the model's state among workers."""

    stage: Literal[0, 1, 2, 3] = Field(default=1, description="1: optimizer state, 2: gradients too, 3: weights too")
    offload_optimizer: Literal["cpu"] | None = Field(
        default=None, description="cpu: masters and optimizer state in host memory, stepped there (stages 1 to 3)"
    )
    extra: dict[str, Any] = Field(default={}, description="any other DeepSpeed setting, in DeepSpeed's own words")


class Precision(Strict):
    """Numbers of the forward and backward pass; master weights and optimizer state are always fp32."""

    dtype: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="fp16 scales the loss; few CPUs have it")


class Ema(Strict):
    """Exponential moving average of the weights: average <- decay * average + (1 - decay) * weights."""

    decay: float = Field(default=0.999, gt=0, lt=1, description="per update; 0.999 looks back over 1,000 or so")
    every: Count = Field(default=1, description="steps between updates")


class Checkpoint(Strict):
    """When the run is saved and what is kept."""

    every: Count | Literal["auto"] = Field(
        default=100, description="steps between checkpoints, or auto: as often as pays; the last step is always saved"
    )
    failure_hours: float = Field(default=24, gt=0, description="hours between failures of the job, for every: auto")
    background: bool = Field(default=True, description="train on while it is written, from a copy in host memory")
    keep: Count = Field(default=2, description="newest good checkpoints that stay")
    keep_every: Count | None = Field(default=None, description="steps; checkpoints at its multiples stay for good")
    keep_best: int = Field(default=0, ge=0, description="those with the best evaluate.best that stay, so many")
    url: str | None = Field(default=None, description="second home, such as s3://bucket/folder; filled as the run goes")
    upload_wait_seconds: float = Field(default=300, ge=0, description="that a run waits at its end for what is sent")


class Evaluate(Strict):
    """When the sets of `data.evaluate` are scored; always at the end."""

    every: Count | None = Field(default=None, description="steps between evaluations; null: only at the end")
    best: str | None = Field(default=None, description="set/metric whose best value is kept, such as test/accuracy")
    mode: Literal["max", "min"] = Field(default="max", description="whether larger or smaller is better")


class Track(Strict):
    """What is recorded besides the steps, and Weights & Biases, which can neither stop nor slow a run."""

    health_every: Count | None = Field(default=100, description="steps between looks at every layer; null: none")
    samples: int = Field(default=8, ge=0, description="of each held-out set, shown after every evaluation; 0: none")
    peak_flops: float | None = Field(default=None, gt=0, description="FLOP/s of one device, for MFU; null: if known")
    wandb: Literal["auto", "online", "offline", "off"] = Field(default="auto", description="auto: online, given a key")
    project: str = Field(default="millstream", min_length=1, description="W&B project")
    entity: str | None = Field(default=None, description="W&B user or team")
    group: str | None = Field(default=None, description="W&B group of runs")
    tags: tuple[str, ...] = Field(default=(), description="W&B tags")
    on_rewind: Literal["skip", "rewind", "new_run"] = Field(
        default="skip",
        description="W&B's steps that are done again: kept, forgotten, or left beside a new run",
    )


class Stall(Strict):
    """Seconds that a worker may stay in a phase before it counts as stalled and the attempt is ended."""

    start: float = Field(default=900, gt=0, description="imports, the process group, compilation")
    restore: float = Field(default=1800, gt=0, description="reading a checkpoint")
    data: float = Field(default=300, gt=0, description="waiting for the next samples")
    step: float = Field(
        default=600, gt=0, description="until 20 steps are measured; then it is found in 10 medians, or 10 s"
    )
    evaluation: float = Field(default=3600, gt=0, description="all held-out sets")
    save: float = Field(default=1800, gt=0, description="copying the state of a checkpoint, or writing it in between")
    commit: float = Field(default=1800, gt=0, description="waiting for a checkpoint that is being written")
    upload: float = Field(default=7200, gt=0, description="sending the last checkpoints to their second home")


class Guard(Strict):
    """What happens when numbers or workers go wrong."""

    non_finite: Literal["skip", "stop"] = Field(default="skip", description="on a NaN or infinite loss or gradient")
    max_skipped: Count = Field(default=3, description="such steps in a row that are borne; one more: the run goes back")
    recompute: bool = Field(default=True, description="compute such a step once more first: the fault may not repeat")
    spike: Literal["off", "warn", "skip", "rollback"] = Field(
        default="warn", description="on a loss far above the recent ones; rollback: train on, go back if it stays there"
    )
    spike_power: int = Field(default=3, ge=2, description="far above: median x (largest / median) to this power")
    spike_window: int = Field(default=128, ge=8, description="steps that are recent; half of them must be known")
    rollbacks: int = Field(
        default=2, ge=0, description="times that the run goes back to before such steps; then it ends"
    )
    margin: int = Field(
        default=10, ge=0, description="steps before and behind them that are left out too, when it does"
    )
    replicas_every: Count | None = Field(
        default=None, description="steps between comparisons of ranks' weights; null: at the end"
    )
    collective_timeout_seconds: float = Field(default=600, gt=0, description="seconds a worker waits for the others")
    stall: Stall = Field(default=Stall(), description="when a worker that does not move is taken for stalled")


class Cluster(Strict):
    """Workers and where they run."""

    workers: int = Field(default=2, ge=0, description="training processes; 0: this process alone, without Ray")
    min_workers: Count | None = Field(default=None, description="fewest to go on with after a loss; null: all of them")
    grow_seconds: float = Field(default=60, ge=0, description="that there must be room for more, before more are taken")
    wait_seconds: float = Field(default=300, ge=0, description="for lost nodes to return, before the run ends with 75")
    threads_per_worker: Count = Field(default=1, description="CPU threads of each; another number moves the last bits")
    address: str | None = Field(default=None, description="of a running Ray cluster; null: one is started here")
    metrics_port: int | None = Field(
        default=None, ge=1024, le=65535, description="Prometheus, of a Ray cluster started here; null: any free one"
    )
    gpu: bool | None = Field(default=None, description="one GPU per worker; null: when there is one")
    restarts: int = Field(default=3, ge=0, description="attempts after the first, when workers are lost")


class TaskConfig(Strict):
    """What every task section has; the rest is the task file's own."""

    name: str = Field(description="file in pipeline/tasks/, or an import path such as my_package.my_task")


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation such as `Count` or `float | None` is made of."""
    inside = get_args(annotation)
    return set().union(*map(_kinds, inside)) if inside else {annotation} if isinstance(annotation, type) else set()
