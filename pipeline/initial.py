"""The first weights of a network that was built without memory for them: one parameter at a time, read by rank 0.

    parameter on the meta device -> rank 0 reads it from its folder -> broadcast -> each rank keeps a share -> the next

At stage 3 a parameter is cut into shares before the next one is read, so no rank ever holds more than its shares and
one whole parameter. At the other stages every rank holds all of them anyway; DeepSpeed sends them to the others when
it starts. What it gives up: ranks other than 0 wait while it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.session import World


class Weights(Protocol):
    """Where parameters are read."""

    def read_into(self, name: str, target: Tensor) -> None:
        """Fill `target`, on the host, with the parameter of this name."""
        ...


class OneByOne(nn.Module):
    """Looks like the network to DeepSpeed, and gives each parameter its memory just before it is asked for."""

    def __init__(self, filled: Iterator[nn.Parameter]) -> None:
        super().__init__()
        self._filled = filled

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self._filled


def fill(
    model: nn.Module,
    world: World,
    weights: Weights | None,
    partition: Callable[[nn.Module], Any] | None,
    dtype: torch.dtype,
) -> None:
    """Give every parameter of `model` that is on the meta device memory and its weights, in place. All ranks call it.

    `weights`: read on rank 0 alone; None: zeros, as a checkpoint is going to be read into them. `partition` takes a
    module and cuts its parameters, of `dtype`, among the ranks, one after the other (stage 3); None: they stay whole.
    """
    if partition is None:
        for _ in _filled(model, world, weights, torch.float32, None):
            pass
        return
    largest = max(parameter.numel() for parameter in model.parameters() if parameter.is_meta)
    # one piece of memory for all: the allocator could not give back the holes between the shares
    filled = _filled(model, world, weights, dtype, torch.empty(largest))
    partition(OneByOne(filled))
    for module in model.modules():  # a module that is cut already is not moved by DeepSpeed
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(world.device)


def _filled(
    model: nn.Module, world: World, weights: Weights | None, dtype: torch.dtype, scratch: Tensor | None
) -> Iterator[nn.Parameter]:
    """Every parameter once it has its weights; in `scratch`, where that is given, until the next one is asked for."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            memory = torch.empty(parameter.numel()) if scratch is None else scratch[: parameter.numel()]
            real = memory.view(parameter.shape)
            if weights is None:
                real.zero_()
            elif world.rank == 0:
                weights.read_into(name, real)
            # the optimizer's groups and tied modules keep the object; only what is in it changes
            torch.utils.swap_tensors(parameter, nn.Parameter(real, parameter.requires_grad))
        parameter.data = parameter.data.to(dtype)
        yield parameter
