"""Every optimizer that is allowed is proven: at ZeRO 1, 2 and 3 the curve of ZeRO 0, and its state goes on elsewhere.

The language model with three groups (rates and weight decays of their own) and a frozen parameter. Saved at ZeRO 2 on
two ranks; read back there to the bit, and on three ranks at ZeRO 3, where the sub-groups are other ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from pipeline import optim
from pipeline.errors import ConfigError
from pipeline.sections import Optim, Optimizer
from pipeline.session import World
from tests import gloo, small_run

NAMES = tuple(name for name in get_args(Optimizer) if name != "muon")  # not element by element: test_muon.py
RATES = {"adadelta": 1.0, "sgd": 5e-2, "rmsprop": 1e-3, "lion": 2e-3}
SAVED_AT, END, SAVED_STAGE = 4, 10, 2
OFFLOADED = [("adamw", 1), ("adamw", 2), ("adamw", 3), ("sgd", 2)]
SMALL_PARTS = {"sub_group_size": 300, "stage3_param_persistence_threshold": 40}


def start(world: World, name: str, stage: int, dtype: str = "fp32", offload: str | None = None) -> tuple[Any, Any]:
    change = {"name": name, "lr": RATES.get(name, 1e-2), "freeze": ("down.*",)}
    extra = SMALL_PARTS if stage == 3 else {}
    settings = small_run.config("words", stage, dtype, optim=change, extra=extra, offload=offload)
    return settings, small_run.start(world, settings, "words")


def on_two(world: World, root: Path) -> dict[str, Any]:
    """By optimizer and stage: losses of steps [0, END); "again": of [SAVED_AT, END) after a restore at once."""
    found: dict[str, Any] = {}
    for name in NAMES:
        for stage in range(4):
            settings, engine = start(world, name, stage)
            losses = small_run.curve(engine, world, settings, "words", 0, SAVED_AT)
            if stage == SAVED_STAGE:
                small_run.save(world, settings, engine, root / name, SAVED_AT)
            found[f"{name} {stage}"] = losses + small_run.curve(engine, world, settings, "words", SAVED_AT, END)
            engine.close()
        settings, engine = start(world, name, SAVED_STAGE)
        assert small_run.load(world, settings, engine, root / name) is not None
        found[f"{name} again"] = small_run.curve(engine, world, settings, "words", SAVED_AT, END)
        engine.close()
    return found | {f"{name} {stage} offloaded": offloaded(world, name, stage) for name, stage in OFFLOADED}


def offloaded(world: World, name: str, stage: int) -> dict[str, Any]:
    """The optimizer's state and step in host memory: losses, and what a step does that is not finite."""
    settings, engine = start(world, name, stage, offload="cpu")
    found: dict[str, Any] = {"losses": small_run.curve(engine, world, settings, "words", 0, END)}
    engine.close()
    settings, engine = start(world, name, stage, "bf16", offload="cpu")
    found["bf16"] = small_run.curve(engine, world, settings, "words", 0, END)
    before = small_run.state(engine)
    result = small_run.step(engine, world, settings, "words", END, spoil=float("nan"))[1]
    found["poisoned"] = (result.applied, result.grad_norm, small_run.same(before, small_run.state(engine)))
    found["next"] = small_run.step(engine, world, settings, "words", END + 1)[1].applied
    engine.close()
    return found


def on_three(world: World, root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in NAMES:
        settings, engine = start(world, name, 3)
        restored = small_run.load(world, settings, engine, root / name)
        assert restored is not None and restored.step == SAVED_AT
        found[name] = small_run.curve(engine, world, settings, "words", SAVED_AT, END)
        engine.close()
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optimizers")


@pytest.fixture(scope="module")
def two(root: Path) -> dict[str, Any]:
    return gloo.run(on_two, 2, root, timeout=240)[0]


@pytest.fixture(scope="module")
def three(root: Path, two: dict[str, Any]) -> dict[str, Any]:
    return gloo.run(on_three, 3, root, timeout=240)[0]


def largest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_stage_has_the_curve_of_stage_0(two: dict[str, Any], name: str) -> None:
    plain = two[f"{name} 0"]
    assert plain[-1] < 0.97 * plain[0], plain  # it does learn
    for stage in (1, 2, 3):
        assert largest(two[f"{name} {stage}"], plain) < 1e-5, stage


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_its_state_goes_on_to_the_bit_and_elsewhere_to_rounding(
    two: dict[str, Any], three: dict[str, Any], name: str
) -> None:
    went_on = two[f"{name} {SAVED_STAGE}"][SAVED_AT:]
    assert two[f"{name} again"] == went_on
    assert largest(three[name], went_on) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), OFFLOADED)
def test_offloaded_it_has_the_curve_of_stage_0_too(two: dict[str, Any], name: str, stage: int) -> None:
    """That what it saves is read elsewhere, and the other way round, is in checkpoint/test_layouts.py."""
    found = two[f"{name} {stage} offloaded"]
    assert largest(found["losses"], two[f"{name} 0"]) < 1e-5
    assert largest(found["bf16"], two[f"{name} 0"]) < 2e-2
    assert found["poisoned"] == (False, float("inf"), True) and found["next"]


def test_names_are_those_of_the_configuration() -> None:
    assert tuple(optim.OPTIMIZERS) == (*NAMES, "muon")


@pytest.mark.parametrize("name", NAMES)
def test_the_table_says_what_torch_keeps(name: str) -> None:
    """State that torch makes by itself in a first step has the keys, shapes and first values of the table."""
    config = Optim.model_validate({"name": name, "lr": 1.0})
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    group = {"params": [parameter], "lr_scale": 1.0, "weight_decay": 0.1, "name": "all", "parameters": ["w"]}
    optimizer = optim.build(config, [group])
    parameter.grad = torch.randn(3, 4)
    optimizer.step()
    made = optimizer.state[parameter]
    optim.allocate(optimizer, optimizer.param_groups[0], parameter)
    allocated = optimizer.state[parameter]
    assert made.keys() == allocated.keys()
    assert all(made[key].shape == allocated[key].shape for key in made)
    assert {key for key in made if made[key].ndim == 0} == optim.OPTIMIZERS[name].numbers.keys()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("adafactor", "adafactor cannot serve: it looks at whole matrices"),
        ("Shampoo", "Shampoo cannot serve: it looks at whole matrices"),
        ("lbfgs", "lbfgs cannot serve: its line search runs"),
        ("SparseAdam", "sparse gradients"),
        ("adagrad", "its parameter groups are lost"),
    ],
)
def test_others_are_refused_with_the_reason_and_what_there_is(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as raised:
        Optim.model_validate({"name": name, "lr": 1.0})
    assert "sgd" in str(raised.value) and "adamw" in str(raised.value)


def test_a_glob_that_freezes_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.freeze: 'encoder\.\*' matches no parameter.*embed\.weight"):
        optim.freeze(small_run.model("words"), Optim(name="sgd", lr=1, freeze=("encoder.*",)))


def test_a_tied_parameter_is_frozen_by_either_name() -> None:
    model = small_run.model("words")
    optim.freeze(model, Optim(name="sgd", lr=1, freeze=("head.*",)))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"embed.weight", "place"}
