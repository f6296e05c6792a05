"""Batch norm that does not know how many workers there are.

A batch-norm layer normalises with the statistics of the micro batch it sees, which is the same at every world size.
Its *running* statistics would not be: each rank sees other micro batches, and sees more of them when there are fewer
ranks. So they get one update per step, from the mean over all M micro batches of the step:

    running <- (1 - momentum) * running + momentum * mean over micro batches (batch statistic)

Kept in fp32 beside the module, because in bf16 the module's buffers are bf16 too, where a momentum of 0.1 soon
adds nothing. What it gives up: SyncBatchNorm's statistics over the whole batch; take group norm when micro batches
are tiny.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.session import World

KINDS = ("running_mean", "running_var")


class RunningStatistics:
    """Running mean and variance of every batch-norm layer of a module; empty and free of cost when it has none."""

    def __init__(self, module: nn.Module) -> None:
        layers = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, _BatchNorm))
        self.layers = {name: layer for name, layer in layers if layer.track_running_stats}
        self.momentum: dict[str, float] = {}
        self.values: dict[str, Tensor] = {}  # "layer.running_mean" -> fp32 [channels]
        self._sums: list[Tensor] = []
        for name, layer in self.layers.items():
            if layer.momentum is None:
                raise ValueError(
                    f"batch norm {name!r} has momentum None (a cumulative average), which restarts cannot repeat"
                )
            self.momentum[name] = layer.momentum
            layer.momentum = 1.0  # after a forward the layer's buffers then hold this batch's own statistics
            for kind in KINDS:
                self.values[f"{name}.{kind}"] = getattr(layer, kind).detach().float().clone()

    def to(self, device: torch.device) -> None:
        """Move to the device where the module lives."""
        self.values = {name: value.to(device) for name, value in self.values.items()}

    def begin(self) -> None:
        """Start of a step: forget the last one's statistics."""
        self._sums = [torch.zeros_like(value) for value in self.values.values()]

    def add(self) -> None:
        """After the forward of a micro batch that counts."""
        if self.values:
            torch._foreach_add_(self._sums, self._buffers())

    def update(self, world: World, micro_batches: int) -> None:
        """End of a step: one update from the mean over the step's `micro_batches`, equal on all ranks."""
        if not self.values:
            return
        flat = world.sum_(torch.cat(self._sums))  # [sum of channels]
        totals = flat.split([value.numel() for value in self.values.values()])
        for (name, value), total in zip(self.values.items(), totals, strict=True):
            momentum = self.momentum[name.rpartition(".")[0]]
            value.mul_(1 - momentum).add_(total, alpha=momentum / micro_batches)

    def publish(self) -> None:
        """Put the running values into the module's buffers, as evaluation and export read them."""
        for value, buffer in zip(self.values.values(), self._buffers(), strict=True):
            buffer.copy_(value)

    def _buffers(self) -> list[Tensor]:
        """The layers' own buffers, in the order of `values`; a forward leaves its micro batch's statistics there."""
        return [getattr(layer, kind) for layer in self.layers.values() for kind in KINDS]
