"""Optimizers, parameter groups, and the learning rate as a pure function of the step.

There is no scheduler object, so nothing of it can be saved wrongly: step k always asks `learning_rate(..., k, ...)`.
Only optimizers that work element by element are offered, because under ZeRO they see flat slices of parameters, never
whole matrices. Their state is made by allocation (`allocate`), so that a checkpoint can be read into an engine that
has not yet taken a step.
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.sections import Group, Optim, Schedule

# Names that wrappers put inside a parameter's name; the canonical name is without them.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


def learning_rate(schedule: Schedule, lr: float, step: int, steps: int) -> float:
    """Learning rate of step `step` (counted from 0) in a run of `steps` steps; before each group's `lr_scale`.

    Linear warm-up to `lr` over `schedule.warmup` steps, then the shape, which would reach `schedule.final * lr` at
    step `steps`, one after the last. wsd stays at `lr` and falls linearly over the last `schedule.decay` steps (a
    tenth when not given).
    """
    if step < schedule.warmup:
        return lr * (step + 1) / schedule.warmup
    if schedule.name == "constant":
        return lr
    begin = schedule.warmup
    if schedule.name == "wsd":
        begin = max(begin, steps - (schedule.decay or max(1, steps // 10)))
    done = min(1.0, max(0.0, (step - begin) / max(1, steps - begin)))  # 0 at the begin of the fall, 1 at its end
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule.name == "cosine" else 1 - done
    return lr * (schedule.final + (1 - schedule.final) * left)


def canonical(name: str) -> str:
    """A parameter's name without what torch.compile and checkpoint wrappers add to it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def parameter_groups(model: nn.Module, config: Optim) -> list[dict[str, Any]]:
    """The trainable parameters by treatment: "name", "lr_scale", "weight_decay", "params", "parameters" (their names).

    A parameter belongs to the first of `config.groups` whose glob matches its name, else to "default". A group without
    a weight decay of its own is split in two, so that parameters of one dimension (biases, norms) are not decayed.
    Raises ConfigError when a glob matches nothing or when nothing is trainable.
    """
    groups: dict[str, dict[str, Any]] = {}
    matched: set[str] = set()
    trainable = {canonical(name): p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    for name, parameter in trainable.items():
        chosen = next((g for g in config.groups if fnmatchcase(name, g.match)), Group(match="default"))
        matched.add(chosen.match)
        label, decay = chosen.match, chosen.weight_decay
        if decay is None:
            decay = config.weight_decay
            if decay and parameter.ndim <= 1 and not config.decay_norm_and_bias:
                label, decay = f"{label} (not decayed)", 0.0
        group = groups.setdefault(
            label,
            {"name": label, "lr_scale": chosen.lr_scale, "weight_decay": decay, "params": [], "parameters": []},
        )
        group["params"].append(parameter)
        group["parameters"].append(name)
    if not groups:
        raise ConfigError(f"{type(model).__name__} has no trainable parameter: every one has requires_grad=False")
    for group in config.groups:
        if group.match not in matched:
            some = ", ".join(list(trainable)[:5])
            raise ConfigError(
                f"optim.groups: {group.match!r} is the first match of no parameter. Names are like: {some}"
            )
    return list(groups.values())


def build(config: Optim, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The torch optimizer over `groups`, at learning rate 0 until the first step sets one.

    Zero, because DeepSpeed takes a step of its own while it builds some layouts: at rate 0 that leaves the weights
    alone.
    """
    if config.name == "adamw":
        fused = torch.cuda.is_available()
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=fused)
    return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, weight_decay=0.0, nesterov=config.nesterov)


def state_keys(optimizer: torch.optim.Optimizer) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What an optimizer keeps per parameter: keys of tensors of the parameter's shape, keys of single numbers."""
    if type(optimizer) is torch.optim.AdamW:
        return ("exp_avg", "exp_avg_sq"), ("step",)
    if type(optimizer) is torch.optim.SGD:
        return ("momentum_buffer",) if optimizer.defaults["momentum"] else (), ()
    raise ConfigError(f"{type(optimizer).__name__}: its state is not known to the checkpoint; use adamw or sgd")


def allocate(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
    """Give `parameter` the state that its first step would make: all zeros, in place of whatever is there.

    For SGD torch's first step copies the gradient into the momentum; momentum * 0 + gradient is the same.
    """
    tensors, numbers = state_keys(optimizer)
    on_device = group.get("fused") or group.get("capturable")
    state = optimizer.state[parameter] = {}
    for key in numbers:
        state[key] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
    for key in tensors:
        state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False)
