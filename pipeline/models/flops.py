"""Floating point operations of one training sample, counted from the graph and not from a formula for some
architecture.

The network is built and run on fake tensors, which have shapes and no memory: a network of any size is counted in
seconds. Counted are matrix products, convolutions and attention (as if every token saw all others, the convention of
MFU figures), forward and backward; what is left out, norms and activations, is a percent or two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count(build: Callable[[], nn.Module], example: Callable[[], Mapping[str, Tensor]]) -> float:
    """Operations of forward and backward of `build()(**example()).logits`; draws nothing from torch's generator.

    Attention runs as plain products here: the counter does not know the fused CPU kernel and would miss it.
    """
    with torch.random.fork_rng(devices=[]), FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        module = build().train()
        with FlopCounterMode(display=False, custom_mapping=_FUSED) as counter:
            module(**example()).logits.sum().backward()
    return float(counter.get_total_flops())


def _of_a_layer(x: torch.Size, first: torch.Size, second: torch.Size, *rest: Any, **more: Any) -> int:
    """A fused LSTM layer: two products a step and row, input [steps, m, inputs] and weights [4 * hidden, *]."""
    return 2 * x[0] * x[1] * (first.numel() + second.numel())


def _of_its_backward(x: torch.Size, first: torch.Size, second: torch.Size, *rest: Any, **more: Any) -> int:
    return 2 * _of_a_layer(x, first, second)


_FUSED = {
    torch.ops.aten.mkldnn_rnn_layer: _of_a_layer,
    torch.ops.aten.mkldnn_rnn_layer_backward: _of_its_backward,
}
