"""Gradients summed over ranks in one order, whatever order the backward pass makes them in.

ZeRO-2 puts each gradient into a buffer as it comes and adds up the ranks' buffers place by place. Where the pass
differs by rank, the order does too: torch packs clips of unequal lengths but not equal ones, and autograd then reaches
an LSTM's weights another way. Each rank then adds its gradient of one weight to another's of a second, and nothing
tells. Here gradients wait until all before them in the order have come; the order is the parameters' reversed, nearly
that of a backward pass, so that few have to wait.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def in_order(optimizer: Any) -> None:
    """Let DeepSpeed's optimizer of ZeRO-1 or 2 take the same gradients in the same order on all ranks.

    A parameter without a gradient on this rank gets one of zeros, as another rank may have one. Other optimizers are
    left alone: at ZeRO-0 gradients stay where they are, and at ZeRO-3 passes must run alike on all ranks to begin with.
    """
    if not hasattr(optimizer, "bit16_groups"):
        return
    order = [(p, group) for group, ps in enumerate(optimizer.bit16_groups) for p in ps if p.requires_grad][::-1]
    if optimizer.partition_gradients or optimizer.overlap_comm:
        _while_they_come(optimizer, order)
    else:
        _at_the_end(optimizer, order)


def _while_they_come(optimizer: Any, order: list[tuple[nn.Parameter, int]]) -> None:
    """ZeRO-2, and ZeRO-1 with overlap_comm, take them in the order in which they come."""
    take, end = optimizer.process_gradients, optimizer.independent_gradient_partition_epilogue
    place = {id(parameter): at for at, (parameter, _) in enumerate(order)}
    come: set[int] = set()
    taken = 0

    def wait(parameter: nn.Parameter, group: int) -> None:
        nonlocal taken
        if not (optimizer.partition_gradients or optimizer.is_gradient_accumulation_boundary()):
            take(parameter, group)  # only added up yet
            return
        come.add(place[id(parameter)])
        while taken in come:
            take(*order[taken])
            taken += 1

    def finish() -> None:
        nonlocal taken
        for at in range(taken, len(order) if come else 0):
            parameter, group = order[at]
            if at not in come and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            take(parameter, group)
        come.clear()
        taken = 0
        end()

    optimizer.process_gradients, optimizer.independent_gradient_partition_epilogue = wait, finish


def _at_the_end(optimizer: Any, order: list[tuple[nn.Parameter, int]]) -> None:
    """ZeRO-1 takes them in the order of the parameters by itself, but leaves out those that it lacks."""
    reduce = optimizer.reduce_gradients

    def fill(*args: Any, **options: Any) -> None:
        for parameter, group in order:
            if optimizer.get_gradient_for_reduction(parameter) is None:
                parameter.grad = torch.zeros_like(parameter)
                optimizer.process_gradients(parameter, group)
        reduce(*args, **options)

    optimizer.reduce_gradients = fill
