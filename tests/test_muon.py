"""Muon by DeepSpeed against a loop in plain torch that knows no shards: curves, checkpoints, what is refused.

A network of two layers with matrices, biases and norms, between an embedding and a head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline import optim
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.sections import Optim
from pipeline.session import World
from tests import gloo, small_run

SAVED_AT, END, RATE = 3, 8, 2e-2
SETTINGS: dict[str, Any] = {"name": "muon", "lr": RATE, "momentum": 0.95, "weight_decay": 0.1, "clip": None}
SETTINGS |= {"groups": [{"match": "head.*", "lr_scale": 0.5}], "schedule": {"name": "constant"}}
WIDTH = small_run.WIDTH


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 31), nn.Linear(31, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x).cumsum(1) / 4)))


class Layered(nn.Module):
    """tokens [B, LENGTH] -> logits [B, LENGTH, WORDS]"""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(small_run.WORDS, WIDTH)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(WIDTH, small_run.WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def network() -> nn.Module:
    torch.manual_seed(0)
    return Layered()


def start(world: World, stage: int, dtype: str = "fp32") -> tuple[Config, Any]:
    from pipeline import engine

    extra = {"sub_group_size": 300, "stage3_param_persistence_threshold": 40} if stage == 3 else {}
    settings = small_run.config("words", stage, dtype, optim=SETTINGS, extra=extra)
    return settings, engine.build(settings, network(), world)


def runs(world: World, root: Path) -> dict[str, Any]:
    """Losses and gradient norms at stages 0 and 3, saved on two ranks, and gone on with on any."""
    found: dict[str, Any] = {}
    for stage in (0, 3):
        settings, engine = start(world, stage)
        steps = [small_run.step(engine, world, settings, "words", number) for number in range(SAVED_AT)]
        if world.world_size == 2:
            small_run.save(world, settings, engine, root / f"stage-{stage}", SAVED_AT)
        steps += [small_run.step(engine, world, settings, "words", number) for number in range(SAVED_AT, END)]
        found[f"{stage}"] = [loss for loss, _ in steps]
        found[f"{stage} norms"] = [result.grad_norm for _, result in steps]
        before = small_run.state(engine)
        spoilt = small_run.step(engine, world, settings, "words", END, spoil=float("nan"))[1]
        found[f"{stage} spoilt"] = spoilt.applied, small_run.same(before, small_run.state(engine))
        engine.close()
    for saved, stage in ((0, 3), (3, 0), (3, 3), (0, 0)):
        settings, engine = start(world, stage)
        assert small_run.load(world, settings, engine, root / f"stage-{saved}") is not None
        found[f"{saved} to {stage}"] = small_run.curve(engine, world, settings, "words", SAVED_AT, END)
        engine.close()
    for stage in (0, 3):
        settings, engine = start(world, stage, "bf16")
        found[f"{stage} bf16"] = small_run.curve(engine, world, settings, "words", 0, END)
        engine.close()
    return found


def orthogonal(matrix: Tensor) -> Tensor:
    """Newton-Schulz as in Jordan's own code (kellerjordan.github.io/posts/muon), in fp32."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


def reference() -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the same steps: every gradient whole, AdamW by torch."""
    model = network()
    matrices = {n: p for n, p in model.named_parameters() if n.startswith("layers.") and p.ndim == 2}
    assert len(matrices) == 4
    momenta = {name: torch.zeros_like(p) for name, p in matrices.items()}
    others = [(n, p) for n, p in model.named_parameters() if n not in matrices]
    groups = [
        {"params": [p], "lr": RATE * (0.5 if n.startswith("head.") else 1), "weight_decay": 0.1 if p.ndim > 1 else 0.0}
        for n, p in others
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    losses, norms = [], []
    for step in range(END):
        model.zero_grad()
        inputs, targets, counts = small_run.batch("words", step)
        loss = small_run.loss_sum(model, inputs, targets, counts) / counts.sum()
        loss.backward()
        losses.append(loss.item())
        norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
        adamw.step()
        with torch.no_grad():
            for name, parameter in matrices.items():
                assert parameter.grad is not None
                momenta[name].lerp_(parameter.grad, 0.05)
                update = orthogonal(parameter.grad.lerp(momenta[name], 0.95))
                update *= max(1, parameter.shape[0] / parameter.shape[1]) ** 0.5
                parameter.mul_(1 - RATE * 0.1).sub_(RATE * update)
    return losses, norms


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    root = tmp_path_factory.mktemp("muon")
    return {ranks: gloo.run(runs, ranks, root, timeout=240)[0] for ranks in (2, 1, 3)}


@pytest.mark.slow
def test_both_stages_have_the_reference_curve_on_any_number_of_ranks(found: dict[int, dict[str, Any]]) -> None:
    losses, norms = reference()
    assert losses[-1] < 0.95 * losses[0]
    for ranks in found:
        for stage in (0, 3):
            assert found[ranks][f"{stage}"] == pytest.approx(losses, rel=2e-6), (ranks, stage)
            assert found[ranks][f"{stage} norms"] == pytest.approx(norms, rel=1e-5), (ranks, stage)
            assert found[ranks][f"{stage} bf16"] == pytest.approx(losses, rel=2e-2), (ranks, stage)


@pytest.mark.slow
def test_its_momentum_goes_on_to_the_bit_and_elsewhere_to_rounding(found: dict[int, dict[str, Any]]) -> None:
    for saved in (0, 3):
        went_on = found[2][f"{saved}"][SAVED_AT:]
        assert found[2][f"{saved} to {saved}"] == went_on
        for ranks in found:
            for stage in (0, 3):
                assert found[ranks][f"{saved} to {stage}"] == pytest.approx(went_on, rel=2e-6), (ranks, saved, stage)


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_changes_nothing(found: dict[int, dict[str, Any]]) -> None:
    for ranks in found:
        assert found[ranks]["0 spoilt"] == found[ranks]["3 spoilt"] == (False, True)


def test_matrices_inside_layers_are_muons_and_all_else_is_adamws() -> None:
    config = Optim.model_validate(SETTINGS | {"layer_decay": 0.5})
    groups = optim.parameter_groups(network(), config)
    muons = {n: g["lr_scale"] for g in groups if g["use_muon"] for n in g["parameters"]}
    assert muons == {f"layers.{i}.{kind}.weight": 0.5 ** (2 - i) for i in range(2) for kind in ("up", "down")}
    optimizer = optim.build(config, groups)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optim.allocate(optimizer, group, parameter)
            kept = {"momentum_buffer", "step"} if group["use_muon"] else {"exp_avg", "exp_avg_sq", "step"}
            assert optimizer.state[parameter].keys() == kept
    flat = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ConfigError, match="matrices inside layers, and this network has none; take adamw"):
        optim.build(
            Optim.model_validate(SETTINGS),
            optim.parameter_groups(flat, Optim.model_validate(SETTINGS | {"groups": []})),
        )
