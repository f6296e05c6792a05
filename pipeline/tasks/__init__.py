"""One file here is one family of training: what a sample becomes, which network, which loss.

A task file has a class `Config` and a class `Task`, and its file name is its name in YAML: to add a family, add a
file. Anyone else's task works by its import path (`task: {name: my_package.my_task}`). Task files import no torch at
their top, so that a configuration is checked without it. `Task` below says what the loop asks of one; nothing has to
inherit from it.

    sample --prepare--> arrays --(loader stacks them)--> batch --loss--> sum over terms, metrics as pairs of sums

A task may also have `gather(samples) -> dict of arrays [m, ...] | None`: what stacking `prepare(sample, None)` of each
gives, for a whole micro batch at once, where that is faster; None when something is not the plain case, and then each
is prepared by itself. It is asked only when nothing is drawn at random; reader.Samples says what it is given.

A task that can start from a pretrained folder has `pretrained: Path | None` in its Config. Then `build_model` leaves
parameters on the meta device, and `weights` (models/pretrained.py) says where to read them. On a resume the folder is
not read: `kept` is then what the checkpoint says of the network. Other tasks need not take it. A task may also have
`write_settings(folder)`: it puts what transformers wants beside an exported network, such as a tokenizer.

A task may have `show(model, batch) -> list[Row]`: what the network makes of each sample of a micro batch, for people to
look at. It is asked after an evaluation, about the same samples on every rank, so all ranks call the network alike.
A task may have `derive(metrics) -> dict`: what follows from the mean metrics of a whole held-out set, such as
perplexity from the loss. And `unit`: what a term of its loss is ("tokens"), to tell how many of them a second are
trained on.

A task that generates has `sample(model, prompts, count, generator, options) -> list[Row]`, for `millstream sample`:
`count` new samples for each of `prompts` (list[str]; empty: `count` without any), prompt by prompt. `model` is the bare
network in fp32, in eval mode and without gradients, on the device of its parameters. All that is random is drawn from
`generator`, a torch.Generator on the host, so that a seed says what comes out. `options` are the key=value words of the
command line, both text; `task_file.options` reads them into a section of the task's own, with an error for each that
does not fit. Texts and numbers of a row are printed, pictures are written as PNG, and all of them in one grid.

The micro batch is the unit: a loss is a sum over its terms, never a mean, and the loop divides by the number of terms
of the whole step. So padding and short batches weigh exactly nothing, at any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from pipeline import task_file

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from pipeline.data.reader import Sample

Batch: TypeAlias = "Mapping[str, Tensor]"
"""A micro batch on the model's device; the task documents its keys and shapes."""

Sums: TypeAlias = "dict[str, tuple[Tensor | float, Tensor | float]]"
"""name -> (numerator, denominator); the metric is the quotient after both are added up over micro batches and ranks."""


Row: TypeAlias = "dict[str, str | int | float | np.ndarray]"
"""One sample as it is shown: name -> text, number, or picture (uint8 [H, W, 1 or 3])."""


class Task(Protocol):
    """What the loop asks of a task. `model` below is called like the network itself (it is DeepSpeed's engine)."""

    augments: bool
    """Whether `prepare` uses its generator in training."""

    def __init__(self, config: Any) -> None: ...

    def build_model(self, kept: Mapping[str, Any] | None = None) -> nn.Module:
        """The network in fp32; its weights follow from torch's generator alone. `kept`: see above."""
        ...

    def prepare(self, sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        """One sample as arrays, of one shape and type for all samples; no augmentation when `rng` is None."""
        ...

    def weight(self, batch: Batch) -> float:
        """How many terms the loss of this micro batch has (asked before the forward, on the host)."""
        ...

    def loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Sums]:
        """For training: the loss summed over its terms (fp32 scalar with gradient) and sums, among them "loss"."""
        ...

    def score(self, model: Callable[..., Any], batch: Batch) -> Sums:
        """For evaluation: sums over this micro batch."""
        ...

    def flops_per_sample(self) -> float:
        """Floating point operations of one sample, forward and backward."""
        ...


def find(name: str) -> ModuleType:
    """The module of the task called `name`: a file in this folder, or any module by its import path.

    Raises ConfigError, with the nearest name, when there is none.
    """
    return task_file.find(name)
