"""Every layout by its name: DeepSpeed keeps there what layouts.py says, and any of them reads what any other saved.

The contract with DeepSpeed is tested by what it does, not only by names being there: masters read through the private
attributes are the weights that the model was built with, and what is written through them is what the forward pass
reads. fp16 runs on this CPU as soon as DeepSpeed's question whether it can is answered with yes.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import MillstreamError
from pipeline.sections import Ema
from pipeline.session import World
from tests import gloo, small_run

SMALL_PARTS = {"sub_group_size": 300, "stage3_param_persistence_threshold": 40}
# expressions in our code that stand for an object of DeepSpeed's
OF_DEEPSPEED = r"(^|\.)(deepspeed|optimizer|parameter|ds_tensor|mapping|[lh]p_fragment_address)$"
# name -> (precision, stage, offloaded, DeepSpeed's optimizer)
LAYOUTS: dict[str, tuple[str, int, str | None, str]] = {
    "fp32 at stage 0": ("fp32", 0, None, "AdamW"),
    "bf16 at stage 0": ("bf16", 0, None, "FP16_UnfusedOptimizer"),
    "fp16 at stage 0": ("fp16", 0, None, "FP16_UnfusedOptimizer"),
    "fp32 at stage 1": ("fp32", 1, None, "DeepSpeedZeroOptimizer"),
    "BF16_Optimizer": ("bf16", 1, None, "BF16_Optimizer"),
    "fp16 at stage 1": ("fp16", 1, None, "DeepSpeedZeroOptimizer"),
    "fp32 at stage 2": ("fp32", 2, None, "DeepSpeedZeroOptimizer"),
    "bf16 at stage 2": ("bf16", 2, None, "DeepSpeedZeroOptimizer"),
    "fp16 at stage 2": ("fp16", 2, None, "DeepSpeedZeroOptimizer"),
    "fp32 at stage 3": ("fp32", 3, None, "DeepSpeedZeroOptimizer_Stage3"),
    "bf16 at stage 3": ("bf16", 3, None, "DeepSpeedZeroOptimizer_Stage3"),
    "fp16 at stage 3": ("fp16", 3, None, "DeepSpeedZeroOptimizer_Stage3"),
    "fp32 at stage 1, offloaded": ("fp32", 1, "cpu", "DeepSpeedZeroOptimizer"),
    "bf16 at stage 1, offloaded": ("bf16", 1, "cpu", "DeepSpeedZeroOptimizer"),
    "fp16 at stage 1, offloaded": ("fp16", 1, "cpu", "DeepSpeedZeroOptimizer"),
    "fp32 at stage 2, offloaded": ("fp32", 2, "cpu", "DeepSpeedZeroOptimizer"),
    "bf16 at stage 2, offloaded": ("bf16", 2, "cpu", "DeepSpeedZeroOptimizer"),
    "fp16 at stage 2, offloaded": ("fp16", 2, "cpu", "DeepSpeedZeroOptimizer"),
    "fp32 at stage 3, offloaded": ("fp32", 3, "cpu", "DeepSpeedZeroOptimizer_Stage3"),
    "bf16 at stage 3, offloaded": ("bf16", 3, "cpu", "DeepSpeedZeroOptimizer_Stage3"),
    "fp16 at stage 3, offloaded": ("fp16", 3, "cpu", "DeepSpeedZeroOptimizer_Stage3"),
}


def begin(world: World, name: str) -> tuple[Any, Any]:
    dtype, stage, offload, _ = LAYOUTS[name]
    extra = SMALL_PARTS if stage == 3 else {}
    settings = small_run.config("words", stage, dtype, extra=extra, offload=offload, ema=Ema(decay=0.5))
    return settings, small_run.start(world, settings, "words")


def allow_fp16() -> None:
    """PyTorch computes in fp16 on any CPU; DeepSpeed wants instructions of its own for it."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    accelerator.is_fp16_supported = lambda: True


def without_masters(world: World, root: Path) -> dict[str, str]:
    """What a save answers when a layout is not what it should be, and a restore whose counters went astray."""
    said: dict[str, str] = {}
    settings, engine = begin(world, "fp32 at stage 0")
    small_run.save(world, settings, engine, root, 1)
    engine.deepspeed.module.bfloat16()
    said["no masters"] = failure(lambda: small_run.save(world, settings, engine, root, 2))
    engine.close()

    settings, engine = begin(world, "fp32 at stage 3")
    [first, second, *_] = [engine.optimizer.state[tensor] for _, tensor in engine.optimizer_tensors()]
    first["step"] = second["step"] = torch.tensor(0.0)  # one object: what DeepSpeed's own conversion leaves behind
    small_run.load(world, settings, engine, root)
    small_run.step(engine, world, settings, "words", 0)
    said["shared"] = failure(lambda: small_run.save(world, settings, engine, root, 3))
    engine.close()

    settings, engine = begin(world, "fp32 at stage 2")
    engine.param_groups[0]["weight_decay"] = 0.7
    said["settings"] = failure(lambda: small_run.load(world, settings, engine, root))
    engine.close()
    return said


def failure(action: Any) -> str:
    try:
        action()
    except MillstreamError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def on_two(world: World, root: Path) -> dict[str, Any]:
    return {**every_layout(world, root), "refused": without_masters(world, root / "refused")}


def every_layout(world: World, root: Path) -> dict[str, Any]:
    """What was found in each layout; each also loads what the one before it has saved."""
    import pipeline.engine  # noqa: F401 (says first which accelerator there is)

    allow_fp16()
    found: dict[str, Any] = {}
    before: tuple[str, dict[str, torch.Tensor]] | None = None
    for number, name in enumerate(LAYOUTS):
        settings, engine = begin(world, name)
        said: dict[str, Any] = {"class": type(engine.deepspeed.optimizer).__name__}
        said["private"] = private_attributes(engine)
        said["built"] = unequal_to_model(world, engine)
        said["written"] = unread_writes(engine)
        if before is not None:
            said["loaded"] = loaded(world, settings, engine, root / before[0], before[1])
        said["losses"] = small_run.curve(engine, world, settings, "words", number, number + 2)
        small_run.save(world, settings, engine, root / name, number + 2)
        before = name, small_run.whole(world, engine)
        found[name] = said
        engine.close()
    return found


def private_attributes(engine: Any) -> dict[str, list[str]]:
    """Role in PRIVATE -> its attributes that are absent, for the roles that this engine has."""
    from pipeline.checkpoint.layouts import PRIVATE

    optimizer = engine.deepspeed.optimizer
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    roles: dict[str, Any] = {"engine": engine.deepspeed}
    if engine.scaler or engine.stage == 3:
        roles["optimizer (fp16, stage 3)"] = optimizer
    if engine.stage == 3:
        roles |= {"parameter (stage 3)": trained[0], "partition (stage 3)": trained[0].ds_tensor}
        roles["optimizer (stage 3)"] = optimizer
        assert len(optimizer.fp16_groups) > len(engine.param_groups) and optimizer.persistent_parameters  # as meant
    elif engine.stage > 0:
        parameter = next(p for p in trained if p._hp_mapping is not None)
        roles |= {"parameter (stages 1, 2, BF16_Optimizer)": parameter, "mapping": parameter._hp_mapping}
        roles |= {"fragment address": parameter._hp_mapping.hp_fragment_address}
        roles["optimizer (stages 1, 2, BF16_Optimizer)"] = optimizer
        if engine.offloaded:
            roles["optimizer (stages 1, 2, offloaded)"] = optimizer
    elif not engine.plain:
        roles["optimizer (stage 0, bf16 and fp16)"] = optimizer
    return {role: [name for name in PRIVATE[role] if not hasattr(thing, name)] for role, thing in roles.items()}


def unequal_to_model(world: World, engine: Any) -> list[str]:
    """States that are not what the model was built with: masters and averages its weights, the rest zeros."""
    want = {name: p.detach().flatten() for name, p in small_run.model("words").named_parameters()}
    wrong = []
    for place, tensor in small_run.whole(world, engine).items():
        name, key = place.split("|")
        built = want[name].to(engine.dtype).float()  # the model was rounded before the masters were made
        expected = built if key in ("master", "ema", "value") else torch.zeros_like(built)
        wrong += [place] * (not torch.equal(tensor.float(), expected))
    return wrong


def unread_writes(engine: Any) -> list[str]:
    """Parameters whose whole weights, as the forward pass sees them, are not what was written piece by piece."""
    import deepspeed

    from pipeline.checkpoint import layouts

    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    held = [(tensor, tensor.clone()) for piece in layouts.pieces(engine) for tensor in piece.state.values()]
    sizes = {name: torch.Size(shape).numel() for name, shape in layouts.parameters(engine).items()}
    whole = {name: torch.arange(sizes[name]).float().sin() * 1000 + len(name) for name in trained}
    for piece in layouts.pieces(engine):
        if piece.name in trained:
            master = piece.state["master"]
            master.copy_(whole[piece.name][piece.start : piece.start + master.numel()])
    layouts.refresh_weights(engine)
    with deepspeed.zero.GatheredParameters(list(trained.values()), enabled=engine.stage == 3):
        seen = {name: p.detach().clone().flatten() for name, p in trained.items()}
    with torch.no_grad():
        for tensor, value in held:
            tensor.copy_(value)
    layouts.refresh_weights(engine)
    return [name for name in trained if not torch.equal(seen[name], whole[name].to(engine.dtype))]


def loaded(world: World, settings: Any, engine: Any, root: Path, saved: dict[str, torch.Tensor]) -> list[str]:
    """States that are not bit for bit what another layout has saved (frozen ones: to their rounding)."""
    engine.module.shift.zero_()
    restored = small_run.load(world, settings, engine, root)
    assert restored is not None and torch.equal(engine.module.shift, small_run.model("words").get_buffer("shift"))
    table = [(place.parameter, place.key, place.numel) for place in restored.manifest.fragments]
    for name, key in (("shift", "value"), ("place", "value"), ("embed.weight", "master")):  # each element once
        assert sum(row[2] for row in table if row[:2] == (name, key)) == small_run.ELEMENTS[name]
    assert not [row for row in table if row[0] == "head.weight"]  # tied: stored under its other name
    now = small_run.whole(world, engine)
    assert now.keys() == saved.keys()
    return [place for place in now if not torch.equal(now[place], saved[place].to(now[place].dtype))]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    return gloo.run(on_two, 2, tmp_path_factory.mktemp("layouts"), timeout=240)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_state_lies_where_it_is_looked_for(two, name):
    for rank in two:
        assert rank[name]["class"] == LAYOUTS[name][3]
        assert rank[name]["built"] == []
        assert rank[name]["written"] == []


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_it_reads_what_another_layout_has_saved(two, name):
    assert [rank[name]["loaded"] for rank in two] == [[], []]


def test_the_losses_go_on_from_layout_to_layout(two):
    losses = [loss for name in LAYOUTS for loss in two[0][name]["losses"]]
    assert losses[-1] < 0.75 * losses[0], losses


def test_every_private_attribute_that_is_read_is_there(two):
    """When this fails after an upgrade: layouts.py reads what is no longer so; do not only change the list."""
    from pipeline.checkpoint.layouts import PRIVATE

    looked_at = [two[0][name]["private"] for name in LAYOUTS]
    assert [absent for private in looked_at for absent in private.values() if absent] == []
    assert {role for private in looked_at for role in private} == PRIVATE.keys()


def test_no_private_attribute_is_read_that_is_not_listed():
    """Whatever layouts.py and engine.py read of DeepSpeed's objects is torch's, documented, or in PRIVATE."""
    from pipeline import engine
    from pipeline.checkpoint import layouts

    read = set()
    for node in (node for module in (layouts, engine) for node in ast.walk(ast.parse(inspect.getsource(module)))):
        if isinstance(node, ast.Attribute) and re.search(OF_DEEPSPEED, ast.unparse(node.value)):
            read.add(node.attr)
        elif isinstance(node, ast.Constant) and re.match("ds_|_hp", str(node.value)):
            read.add(node.value)  # by getattr
    torchs = (torch.nn.Parameter, torch.optim.SGD([torch.ones(1, requires_grad=True)]))
    documented = {*dir(engine.deepspeed), *dir(engine.deepspeed.DeepSpeedEngine), "module", "optimizer"}
    listed = {name for names in layouts.PRIVATE.values() for name in names}
    unknown = {name for name in read if not any(hasattr(thing, name) for thing in torchs)}
    assert unknown - {name for name in documented if not name.startswith("_")} - {"__version__"} - listed == set()
    assert listed - read == set(), "listed, but no longer read"


def test_what_is_not_as_it_should_be_is_not_saved_and_not_loaded(two):
    for rank in two:
        said = rank["refused"]
        assert "has no fp32 master (it is torch.bfloat16)" in said["no masters"]
        assert "its parts have taken other numbers of steps than the rest" in said["shared"]
        assert "optimizer groups changed since they were built" in said["settings"]
