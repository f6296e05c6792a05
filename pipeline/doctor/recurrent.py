"""What recurrent layers need beyond fake tensors: lengths that are numbers, packed sequences, oneDNN's workspace.

    numbers of a batch, [m] -> computed for real -> lengths -> packed [rows that go on at each step]
                                                           '-> torch's own loop over the steps, on fake tensors

Torch packs sequences by looking at their lengths, which fake tensors do not have. So whole numbers of one dimension
stay real for as long as they meet nothing else; all that is large stays fake. What it gives up: lengths of the micro
batches that were not looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
MOST = 1 << 16  # numbers that are computed for real


class Numbers(TorchDispatchMode):
    """Keeps whole numbers real, packs by them, and gives oneDNN's recurrent layers their workspace."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._pack_padded_sequence.default and not isinstance(args[1], FakeTensor):
            return _pack(*args)
        if func is aten.mkldnn_rnn_layer.default:
            out = func(*args, **kwargs)
            return [*out[:3], _workspace(*args)]
        tensors = list(_tensors(args, kwargs))
        if tensors:
            real = all(_whole(tensor) and not isinstance(tensor, FakeTensor) for tensor in tensors)
        else:
            real = func.overloadpacket in (aten.empty, aten.arange) and _whole(func(*args, **kwargs))
        with unset_fake_temporarily() if real else nullcontext():
            return func(*args, **kwargs)


def _tensors(args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Those of an operation, some in lists; torch's own way of finding them takes far longer."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (each for each in value if isinstance(each, Tensor))


def _whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) and tensor.ndim <= 1 and tensor.numel() <= MOST


def _pack(padded: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """padded [m, steps, ...] or [steps, m, ...], falling lengths [m] -> [sum of lengths, ...], rows of each step."""
    with _disable_current_modes():
        steps = torch.arange(int(lengths[0]))
        rows = (lengths[:, None] > steps).sum(dim=0)  # [steps]
        total = int(lengths.sum())
    return padded.new_empty((total, *padded.shape[2:])), rows


def _workspace(inputs: Tensor, *rest: Any) -> Tensor:
    """uint8: what a layer of oneDNN (its rnn_utils.cpp) writes down in training for its backward pass: gates, states
    and their gradients at every step. It grows evenly with the steps; the library is asked for two and for four.
    """
    steps, rows, size = inputs.shape  # never batch first: torch has turned it
    hidden, training = rest[9], rest[14]
    if not training:
        return inputs.new_empty(0, dtype=torch.uint8)
    two, four = (asked(count, rows, size, hidden, bool(rest[11]), inputs.dtype) for count in (2, 4))
    return inputs.new_empty(two + (four - two) * (steps - 2) // 2, dtype=torch.uint8)


@functools.lru_cache
def asked(steps: int, rows: int, inputs: int, hidden: int, biases: bool, dtype: torch.dtype) -> int:
    """Bytes of the workspace of one real LSTM layer of oneDNN over so many steps."""
    with _disable_current_modes(), torch.enable_grad():  # without gradients there is none
        weights = [torch.zeros(4 * hidden, size, dtype=dtype) for size in (inputs, hidden)]
        biased = [torch.zeros(4 * hidden, dtype=dtype)] * 2
        state = torch.zeros(rows, hidden, dtype=dtype)
        x = torch.zeros(steps, rows, inputs, dtype=dtype)
        out = aten.mkldnn_rnn_layer(
            x, *weights, *biased, state, state, False, [], 2, hidden, 1, biases, False, False, True
        )
        return out[3].numel()
