"""Recurrent layers without bytes: the workspace of oneDNN and packed sequences as the real ones take them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from pipeline.doctor import network, recurrent
from pipeline.models.recurrent import Cell, RecurrentClassifier

LENGTHS = [7, 3, 12, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_workspace_grows_evenly_with_the_steps(dtype: torch.dtype) -> None:
    two, four = (recurrent.asked(steps, 16, 96, 128, True, dtype) for steps in (2, 4))
    real = recurrent.asked(40, 16, 96, 128, True, dtype)
    assert two + (four - two) * (40 - 2) // 2 == pytest.approx(real, rel=0.02)


def run(model: RecurrentClassifier, features: Tensor, lengths: Tensor) -> int:
    """Bytes at the peak of forward and backward."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(network._let_go)
    with network.Alive() as alive, recurrent.Numbers():
        model(features, lengths).sum().backward()
    return alive.peak


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_packed_sequences_take_what_the_real_ones_take(cell: Cell) -> None:
    made = RecurrentClassifier(inputs=6, classes=3, cell=cell, width=16, layers=2)
    real = run(made, torch.randn(len(LENGTHS), max(LENGTHS), 6), torch.tensor(LENGTHS))
    with FakeTensorMode(allow_non_fake_inputs=True):
        with unset_fake_temporarily():
            lengths = torch.tensor(LENGTHS)
        fake = RecurrentClassifier(inputs=6, classes=3, cell=cell, width=16, layers=2)
        assert run(fake, torch.randn(len(LENGTHS), max(LENGTHS), 6), lengths) == pytest.approx(real, rel=0.05)
