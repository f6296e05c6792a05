"""Gradients of ranks whose backward passes run in another order, or leave a parameter out: summed weight by weight."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.session import World
from tests import gloo, small_run

# Not stage 3: its ranks gather weights inside the forward pass, which must therefore run alike on all of them.
ZEROS = {"0": (0, {}), "1": (1, {}), "1, overlapped": (1, {"overlap_comm": True}), "2": (2, {})}
DTYPES = ("fp32", "bf16")


class Turns(nn.Module):
    """x [m, 8] -> [m]: two layers in either order, one of them behind a third that is `asked` for or not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other, self.third = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, swapped: bool, asked: bool) -> Tensor:
        layers = [self.one, self.other][:: -1 if swapped else 1]
        terms = [layer(x).tanh() * (2 if layer is self.one else 1) for layer in layers]
        y = terms[0] + terms[1]
        return (self.third(y) if asked else y).sum(-1)


def rows(number: int) -> Tensor:
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(number))


def passes(micro: int) -> tuple[bool, bool]:
    """Which way micro batch 0 to 3 goes; with two ranks, rank 1 has the odd ones."""
    return micro % 2 == 1, micro % 2 == 0


def gradients(world: World) -> dict[tuple[str, str], float]:
    """By stage and dtype: largest difference to the whole batch's gradient, relative to its norm."""
    from pipeline import engine as engines

    sgd = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "clip": None, "groups": ()}
    found = {}
    for (zero, (stage, extra)), dtype in product(ZEROS.items(), DTYPES):
        whole = Turns().to(torch.bfloat16 if dtype == "bf16" else torch.float32)
        weights = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in whole.named_parameters()}
        for micro in range(4):
            whole.zero_grad()
            whole(rows(micro).to(whole.one.weight.dtype), *passes(micro)).float().sum().div(8).backward()
            for name, p in whole.named_parameters():
                weights[name] += 0 if p.grad is None else p.grad.float()
        settings = small_run.config("images", stage, dtype, optim=sgd, extra=extra)
        engine = engines.build(settings, Turns(), world)
        for micro in range(world.rank, 4, world.world_size):
            engine.backward(engine.model(rows(micro), *passes(micro)).float().sum() / 8)
        got = dict(engine.gradients())
        norm = torch.cat([w.flatten() for w in weights.values()]).norm()
        worst = max(float((got[name].cpu() - want).norm() / norm) for name, want in weights.items())
        found[zero, dtype] = worst
        engine.step(0.1)
        engine.close()
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[Any, float]]:
    return gloo.run(gradients, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_weight_has_its_own_gradient(found: list[dict[Any, float]], dtype: str) -> None:
    for rank in found:
        errors = {zero: error for (zero, kind), error in rank.items() if kind == dtype}
        assert len(errors) == len(ZEROS)
        assert all(error < (1e-6 if dtype == "fp32" else 5e-3) for error in errors.values()), errors
