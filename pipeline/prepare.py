"""A model made ready for DeepSpeed: what it leaves undone at one precision or stage and not at another.

    module -> prepare -> deepspeed.initialize -> input_cast on every forward

What it gives up: inputs inside lists or dictionaries are passed as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.errors import ConfigError


def prepare(model: nn.Module, dtype: torch.dtype, recompute: bool) -> None:
    """Change `model` in place; `recompute`: activations are dropped in the forward pass, made again in the backward.

    Raises ConfigError when the module cannot recompute.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # as every other stage makes them; checkpoints cut flat pieces
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            module.running_mean, module.running_var = module.running_mean.to(dtype), module.running_var.to(dtype)
    if recompute:
        _recompute_activations(model)


def _recompute_activations(model: nn.Module) -> None:
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise ConfigError(
            f"activation_checkpointing: {type(model).__name__} has no gradient_checkpointing_enable(). "
            "Set it to false, or give the module that method."
        )
    try:
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"activation_checkpointing: {error} Set it to false.") from error


def input_cast(dtype: torch.dtype, device: torch.device) -> Any:
    """A hook that gives a module its floating-point inputs in `dtype`; on GPU [N, C, H, W] in channels-last order."""

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        channels_last = device.type == "cuda" and value.ndim == 4
        return value.to(dtype, memory_format=torch.channels_last if channels_last else torch.preserve_format)

    def hook(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return tuple(cast(value) for value in inputs), {name: cast(value) for name, value in kwargs.items()}

    return hook
