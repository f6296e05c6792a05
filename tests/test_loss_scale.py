"""fp16 on real DeepSpeed: every stage alike, an overflow skips the step on all ranks, the scale is state.

PyTorch computes in fp16 on any CPU; DeepSpeed asks for instructions of its own, a question that is answered with yes
here. Nothing else is made up. No GPU has run it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import loss_scale
from pipeline.engine import StepResult
from pipeline.errors import RunError
from pipeline.guard import Judge
from pipeline.loss_scale import LEAST, LossScale
from pipeline.sections import Guard
from pipeline.session import Session, World
from tests import gloo, small_run

STAGES = (0, 1, 2, 3)


def fp16_steps(world: World, root: Path) -> dict[str, Any]:
    import pipeline.engine  # noqa: F401 (says first which accelerator there is)

    found: dict[str, Any] = {}
    for stage in STAGES:
        if stage == 0:
            settings = small_run.config("words", 2)
            engine = small_run.start(world, settings, "words")
            found["fp32"] = small_run.curve(engine, world, settings, "words", 0, 8)
            engine.close()
            allow_fp16()
        settings = small_run.config("words", stage, "fp16")
        found[f"curve {stage}"] = curve(world, settings, steps_to_grow=1000)
        found[f"grown {stage}"] = curve(world, settings, steps_to_grow=3)
        found[f"overflow {stage}"] = overflow(world, settings, root / f"{stage}")
    for saved in STAGES:  # the scale and its count, at another stage
        settings = small_run.config("words", 3 - saved, "fp16")
        engine = small_run.start(world, settings, "words")
        assert small_run.load(world, settings, engine, root / f"{saved}") is not None
        found[f"restored {saved}"] = (engine.scaler, float(engine.deepspeed.optimizer.loss_scale))
        engine.close()
    return found


def allow_fp16() -> None:
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    accelerator.is_fp16_supported = lambda: True


def curve(world: World, settings: Any, steps_to_grow: int) -> list[tuple[float, float, float]]:
    """(loss, gradient norm, loss scale) of eight steps."""
    loss_scale.STEPS_TO_GROW = steps_to_grow
    engine = small_run.start(world, settings, "words")
    engine.set_loss_scale(LossScale(scale=256.0))  # what the scale hides then is far below what is compared
    steps = (small_run.step(engine, world, settings, "words", number) for number in range(8))
    rows = [(loss, result.grad_norm, result.loss_scale) for loss, result in steps]
    engine.close()
    return rows


def overflow(world: World, settings: Any, root: Path) -> dict[str, Any]:
    """A step whose gradient is too large for fp16 on one rank; then good ones, and a save."""
    engine = small_run.start(world, settings, "words")
    engine.set_loss_scale(LossScale(scale=256.0))
    small_run.step(engine, world, settings, "words", 0)
    before = small_run.state(engine)
    result = small_run.step(engine, world, settings, "words", 1, spoil=1e6)[1]
    found: dict[str, Any] = {"result": result, "unchanged": small_run.same(before, small_run.state(engine))}
    found["scale"] = float(engine.deepspeed.optimizer.loss_scale)
    found["after"] = [small_run.step(engine, world, settings, "words", number)[1].applied for number in (2, 3)]
    small_run.save(world, settings, engine, root, 4)
    engine.close()
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return gloo.run(fp16_steps, 2, tmp_path_factory.mktemp("fp16"), timeout=240)


def relative(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_the_curve_of_fp32_to_the_precision_of_fp16(two: list[dict[str, Any]], stage: int) -> None:
    rows = two[0][f"curve {stage}"]
    assert relative([loss for loss, _, _ in rows], two[0]["fp32"]) < 5e-3
    assert rows[-1][0] < 0.9 * rows[0][0]  # it does learn


@pytest.mark.parametrize("stage", STAGES)
def test_the_scale_grows_and_neither_weights_nor_norms_know(two: list[dict[str, Any]], stage: int) -> None:
    """Powers of two are exact: what was scaled by more is the same to fp16's smallest numbers."""
    plain, grown = two[0][f"curve {stage}"], two[0][f"grown {stage}"]
    assert [scale for _, _, scale in plain] == [256] * 8
    assert [scale for _, _, scale in grown] == [256] * 3 + [512] * 3 + [1024] * 2
    for column in (0, 1):
        assert relative([row[column] for row in grown], [row[column] for row in plain]) < 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_skips_the_step_on_all_ranks_and_halves_the_scale(two: list[dict[str, Any]], stage: int) -> None:
    for rank in two:
        found = rank[f"overflow {stage}"]
        assert found["result"] == StepResult(grad_norm=float("inf"), applied=False, loss_scale=256.0)
        assert found["unchanged"] and found["scale"] == 128.0
        assert found["after"] == [True, True]


@pytest.mark.parametrize("stage", STAGES)
def test_scale_and_count_are_restored_at_another_stage(two: list[dict[str, Any]], stage: int) -> None:
    for rank in two:
        assert rank[f"restored {stage}"] == (LossScale(128.0, good_steps=2), 128.0)


def test_the_guard_ends_a_run_that_overflows_at_the_least_scale(tmp_path: Path) -> None:
    scaler = LossScale(scale=2.0)
    assert [scaler.after(False), scaler.after(False)] == [LEAST, LEAST]
    session = Session(World(0, 1, 0, torch.device("cpu"), None), tmp_path, 1, lambda *_: False)  # pyright: ignore
    guard = Judge(Guard(max_skipped=1, rollbacks=0))
    for scale in (4.0, 2.0):
        guard.judge(session, 5, StepResult(float("inf"), False, scale), 1.5, [])
    assert guard.in_a_row == 0
    guard.judge(session, 6, StepResult(float("inf"), False, LEAST), 1.5, [])
    with pytest.raises(RunError, match=r"step 7: loss 1\.5, gradient not finite, 2 step"):
        guard.judge(session, 7, StepResult(float("inf"), False, LEAST), 1.5, [])
