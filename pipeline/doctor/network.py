"""The network of a run without its memory: built on the meta device, made ready as the engine makes it, and run once
forward and backward on fake tensors, which have shapes and no bytes.

    task.build_model on meta -> freeze, groups, prepare -> fake tensors -> task.loss -> backward
                                                                |-> parameters, buffers    '-> bytes alive at the peak

A network of any size is looked at in seconds. What is counted are the bytes of all storages that are alive at once,
whatever made them, so it holds for any network. What it gives up: what a fused kernel of a GPU never writes down.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline import optim, task_file
from pipeline.config import Config
from pipeline.doctor import recurrent
from pipeline.doctor.findings import Report
from pipeline.errors import MillstreamError
from pipeline.prepare import input_cast, prepare

PART = "network"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


@dataclass(frozen=True)
class Network:
    """parameters, trained: numbers.  largest: of one parameter.  groups: trained numbers of each of the optimizer's
    groups.  buffers: bytes.  kind: class of the module.

    activations: bytes alive at the peak of forward and backward of one micro batch beside parameters and their
    gradients, None when that cannot be told.  metrics: what is told of an evaluation.
    """

    kind: str
    parameters: int
    trained: int
    largest: int
    groups: tuple[int, ...]
    buffers: int
    activations: int | None
    metrics: tuple[str, ...]


def look(config: Config, report: Report, samples: Sequence[Mapping[str, np.ndarray]]) -> Network | None:
    """Build and run it without memory; None when it cannot be built. samples: prepared, of a micro batch at most."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    task = _task(config, report)
    if task is None:
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = task.build_model()
    except MillstreamError as error:
        report.refuse(PART, error, "task.model")
        return None
    except Exception as error:  # a task's own code, or a library's for numbers that make no network
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, NotImplementedError) or "meta" in str(error).lower():  # it would be, with memory
            report.add("note", PART, "task", f"cannot be built without memory ({said})")
        else:
            report.add("error", PART, "task", f"the network cannot be built: {said}", "look at the numbers in task")
        return None
    groups: list[dict[str, Any]] = []
    for step in (
        lambda: optim.freeze(model, config.optim),
        lambda: prepare(model, DTYPES[config.precision.dtype], recompute=config.activation_checkpointing),
        lambda: groups.extend(optim.parameter_groups(model, config.optim)),
    ):
        try:
            step()
        except MillstreamError as error:
            report.refuse(PART, error, "optim")
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    activations, metrics = None, ()
    if samples and any(trained for _, trained in sizes):
        activations, metrics = _run(config, report, task, model, samples)
    return Network(
        kind=type(model).__name__,
        parameters=sum(size for size, _ in sizes),
        trained=sum(size for size, trained in sizes if trained),
        largest=max((size for size, _ in sizes), default=0),
        groups=tuple(sum(p.numel() for p in group["params"]) for group in groups),
        buffers=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        activations=activations,
        metrics=metrics,
    )


def _task(config: Config, report: Report) -> Any:
    """Without what draws numbers from a fake tensor."""
    section = config.task
    if getattr(section, "mixup", 0):
        section = section.model_copy(update={"mixup": 0.0})
    try:
        return task_file.find(config.task.name).Task(section)
    except MillstreamError as error:
        report.refuse("task", error, "task")
    except Exception as error:  # anyone's own code, told of already where the data are looked at
        report.add("error", "task", "task", f"its Task cannot be made: {type(error).__name__}: {error}")
    return None


def _run(
    config: Config, report: Report, task: Any, model: nn.Module, samples: Sequence[Mapping[str, np.ndarray]]
) -> tuple[int | None, tuple[str, ...]]:
    """Bytes at the peak, and the names of an evaluation's metrics."""
    rows = [samples[i % len(samples)] for i in range(config.micro_batch_size)]
    dtype, metrics = DTYPES[config.precision.dtype], ()
    try:
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            batch = {name: _given(mode, array) for name, array in arrays.items()}
            module = _without_bytes(model, dtype).train()
            module.register_forward_pre_hook(input_cast(dtype, torch.device("cpu")), with_kwargs=True)
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_let_go)
            with Alive() as alive, recurrent.Numbers():
                loss, _ = task.loss(module, batch)
                loss.float().backward()
            del loss
            module.eval()
            with torch.no_grad(), recurrent.Numbers(), suppress(*UNKNOWN):  # what training takes is known by now
                metrics = tuple(task.score(module, batch)) if config.data.evaluate else ()
        return alive.peak, metrics
    except UNKNOWN as error:
        report.add("note", PART, "task", f"activations are not known: {type(error).__name__} on fake tensors")
    except Exception as error:  # whatever a network says of a batch that it cannot take
        said = " ".join(str(error).split("\n")[0].split())
        message = f"{type(model).__name__} fails on a micro batch of the data: {type(error).__name__}: {said}"
        report.add("error", PART, "task.model", message, _mend(said))
    return None, ()


def _mend(said: str) -> str:
    if "more than 1 value per channel" in said:
        return "a batch norm needs company: a larger micro_batch_size or image_size, fewer stages, or task.norm: group"
    return "sizes of the network and of the data do not fit: see task.model and the sizes of the samples"


def _given(mode: FakeTensorMode, array: np.ndarray) -> Tensor:
    """[rows, ...] without bytes; whole numbers, one of each row (lengths, labels), as they are."""
    if array.ndim == 1 and array.dtype.kind in "iu":
        with unset_fake_temporarily():
            return torch.from_numpy(array)
    dtype = torch.from_numpy(array[:0]).dtype
    with mode:
        return torch.empty(array.shape, dtype=dtype)


def _without_bytes(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Its parameters and buffers as fake tensors of the host, floating ones of `dtype`; those that are tied stay so."""
    made: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Tensor:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=kind)

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(fake(parameter.detach()), requires_grad=parameter.requires_grad)
                made[-id(parameter)] = parameter  # so that no other gets its id
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            module._buffers[name] = fake(buffer)
    return model


def _let_go(parameter: Tensor) -> None:
    """Gradients are counted by themselves (memory.py)."""
    parameter.grad = None


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, for as long as they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in given:
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._known:
            self._known.add(key)
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
