"""Learning rates against their definitions, parameter groups, and state allocated instead of stepped into being."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from pipeline import optim
from pipeline.errors import ConfigError
from pipeline.sections import Group, Optim, Schedule


def rates(steps: int = 10, **schedule) -> list[float]:
    return [optim.learning_rate(Schedule(**schedule), 2.0, step, steps) for step in range(steps + 1)]


def test_warmup_is_linear_and_ends_at_the_peak():
    assert rates(name="constant", warmup=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_linear_and_cosine_fall_to_their_final_share():
    linear = rates(name="linear", warmup=2, final=0.1)
    assert linear[2] == 2.0 and linear[10] == pytest.approx(0.2)
    assert [a - b for a, b in pairwise(linear[2:])] == pytest.approx([1.8 / 8] * 8)
    cosine = rates(name="cosine", final=0.1)
    assert cosine[0] == 2.0 and cosine[5] == pytest.approx(1.1) and cosine[10] == pytest.approx(0.2)
    assert cosine[2] == pytest.approx(0.2 + 0.9 * (1 + math.cos(math.pi / 5)))


def test_wsd_is_stable_until_its_last_part():
    assert rates(name="wsd", warmup=2, decay=4)[1:] == pytest.approx([2, 2, 2, 2, 2, 2, 1.5, 1, 0.5, 0])
    assert rates(name="wsd")[8:] == [2.0, 2.0, 0.0]  # a tenth of the steps, when not given


def test_a_schedule_that_is_all_warmup_divides_by_nothing():
    assert rates(name="cosine", warmup=10)[9] == 2.0
    assert rates(steps=1, name="linear")[0] == 2.0


def network() -> nn.Module:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 5), nn.Linear(4, 5, bias=False))
    model[3].weight = model[0].weight  # tied
    model[2].bias.requires_grad_(False)
    return model


def grouped(**changes) -> dict[str, tuple[float, float, list[str]]]:
    groups = optim.parameter_groups(network(), Optim(name="adamw", lr=1, weight_decay=0.1, **changes))
    return {g["name"]: (g["lr_scale"], g["weight_decay"], g["parameters"]) for g in groups}


def test_one_dimensional_parameters_are_not_decayed():
    assert grouped() == {
        "default": (1.0, 0.1, ["0.weight", "2.weight"]),
        "default (not decayed)": (1.0, 0.0, ["1.weight", "1.bias"]),
    }
    assert list(grouped(decay_norm_and_bias=True)) == ["default"]


def test_the_first_matching_glob_decides_and_its_own_decay_holds_for_all_it_matches():
    groups = (Group(match="1.*", lr_scale=0.5, weight_decay=0.3), Group(match="*.weight", lr_scale=2.0))
    assert grouped(groups=groups) == {
        "*.weight": (2.0, 0.1, ["0.weight", "2.weight"]),
        "1.*": (0.5, 0.3, ["1.weight", "1.bias"]),
    }


def test_a_glob_that_matches_nothing_is_refused_with_real_names():
    with pytest.raises(ConfigError, match=r"'embeddings\.\*'.*0\.weight"):
        grouped(groups=(Group(match="embeddings.*"),))


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ConfigError, match="no trainable parameter"):
        optim.parameter_groups(network().requires_grad_(False), Optim(name="sgd", lr=1))


def blocks() -> nn.Module:
    """Stem, two blocks of which one holds a list of its own, a norm between two lists, a block, a head."""
    model = nn.Module()
    model.stem, model.first, model.last = nn.Linear(2, 4), nn.Linear(4, 4, bias=False), nn.LayerNorm(4)
    inner = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model.blocks = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.ModuleDict({"experts": inner})])
    model.norm = nn.LayerNorm(4)
    model.more = nn.ModuleList([nn.Linear(4, 4, bias=False)])
    model.head = nn.Linear(4, 2, bias=False)
    return model


def test_layers_are_counted_from_the_stem_to_the_head_by_the_outermost_lists() -> None:
    model = blocks()
    model.blocks[0].requires_grad_(False)  # type: ignore[operator, union-attr, index] # frozen ones count
    by_hand = {
        0: ["stem.weight", "stem.bias", "first.weight", "last.weight", "last.bias"],
        1: ["blocks.0.weight"],
        2: [f"blocks.1.experts.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")],
        3: ["norm.weight", "norm.bias"],
        4: ["more.0.weight"],
        5: ["head.weight"],
    }
    assert optim.depths(model) == {name: layer for layer, names in by_hand.items() for name in names}


def test_each_layer_learns_at_a_share_of_the_rate_of_the_one_above_it() -> None:
    groups = (Group(match="head.*", lr_scale=3.0, weight_decay=0.0),)
    config = Optim(name="adamw", lr=1, weight_decay=0.1, layer_decay=0.5, groups=groups)
    found = {g["name"]: (g["lr_scale"], g["weight_decay"]) for g in optim.parameter_groups(blocks(), config)}
    assert found == {
        "default, layer 0": (0.5**5, 0.1),
        "default (not decayed), layer 0": (0.5**5, 0.0),
        "default, layer 1": (0.5**4, 0.1),
        "default, layer 2": (0.5**3, 0.1),
        "default (not decayed), layer 2": (0.5**3, 0.0),
        "default (not decayed), layer 3": (0.5**2, 0.0),
        "default, layer 4": (0.5, 0.1),
        "head.*, layer 5": (3.0, 0.0),
    }
    with pytest.raises(ConfigError, match=r"Sequential keeps no layers.*optim\.groups"):
        optim.parameter_groups(network(), config)


def test_lion_is_the_published_program() -> None:
    """Program 1 of its paper: update = sign(b1 m + (1 - b1) g) + weight decay * w; m = b2 m + (1 - b2) g."""
    torch.manual_seed(0)
    config = Optim(name="lion", lr=0.1, betas=(0.9, 0.99))
    weights = torch.nn.Parameter(torch.randn(40))
    group = {"params": [weights], "lr_scale": 1.0, "weight_decay": 0.3, "name": "all", "parameters": ["w"]}
    optimizer = optim.build(config, [group])
    optimizer.param_groups[0]["lr"] = 0.1
    expected, momentum = weights.detach().double().tolist(), [0.0] * 40
    for _ in range(5):
        weights.grad = torch.randn(40)
        for i, gradient in enumerate(weights.grad.double().tolist()):
            step = math.copysign(1, 0.9 * momentum[i] + 0.1 * gradient) + 0.3 * expected[i]
            expected[i] -= 0.1 * step
            momentum[i] = 0.99 * momentum[i] + 0.01 * gradient
        optimizer.step()
    torch.testing.assert_close(weights.detach(), torch.tensor(expected))


@pytest.mark.parametrize(
    "settings", [{"name": "adamw"}, {"name": "sgd"}, {"name": "sgd", "nesterov": True}, {"name": "lion"}]
)
def test_allocated_state_steps_as_torchs_own_first_step(settings):
    """The same gradients from allocated and from absent state give the same weights, to the bit."""
    results = []
    for allocated in (True, False):
        torch.manual_seed(0)
        config = Optim(lr=0.1, weight_decay=0.1, **settings)
        model = network()
        optimizer = optim.build(config, optim.parameter_groups(model, config))
        for group in optimizer.param_groups:
            group["lr"] = 0.1
            for parameter in group["params"] if allocated else ():
                optim.allocate(optimizer, group, parameter)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_an_optimizer_of_unknown_state_is_refused():
    with pytest.raises(ConfigError, match="Adagrad"):
        optim.state_keys(torch.optim.Adagrad(network().parameters()), {})
