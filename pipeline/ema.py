"""A moving average of the weights, kept where the masters are: average <- decay * average + (1 - decay) * masters.

It is one more tensor of the optimizer's state, beside the first and second moments. So under ZeRO each rank averages
the slice it owns, no weight is gathered for it, and a checkpoint saves and reshards it like any other state. To be
evaluated the averages change places with the masters, and the forward pass is given what it is given after a step.

    step applied -> update          evaluate -> averaged(engine): swap, refresh, score, swap, refresh

What it gives up: the running statistics of batch norm are not averaged (they are averages already), and there is no
warm-up: a decay of 0.999 remembers the first weights for a thousand updates or so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.checkpoint import layouts
from pipeline.engine import Engine
from pipeline.optim import EMA
from pipeline.sections import Ema


@torch.no_grad()
def update(engine: Engine, ema: Ema | None, step: int) -> None:
    """After step `step` (counted from 0) was applied: average its weights in, on every `ema.every`-th step."""
    if ema is None or (step + 1) % ema.every:
        return
    tensors = [tensor.detach() for _, tensor in engine.optimizer_tensors()]
    averages = [engine.optimizer.state[tensor][EMA] for _, tensor in engine.optimizer_tensors()]
    torch._foreach_lerp_(averages, tensors, 1 - ema.decay)


@contextmanager
def averaged(engine: Engine) -> Iterator[None]:
    """The forward pass reads the averages, rounded to its precision; afterwards the weights, the same to the bit.

    All ranks enter together. An exception inside ends the run: nothing is swapped back, as the other ranks would not
    come to the collective that this needs.
    """
    _swap(engine)
    yield
    _swap(engine)


@torch.no_grad()
def _swap(engine: Engine) -> None:
    for _, tensor in engine.optimizer_tensors():
        average = engine.optimizer.state[tensor][EMA]
        masters = tensor.detach().clone()
        tensor.copy_(average)
        average.copy_(masters)
    layouts.refresh_weights(engine)
