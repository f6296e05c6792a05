"""The engine over real DeepSpeed on gloo: all stages alike, the full-batch gradient, steps that must change nothing.

Starting a group costs most of the time, so each world size is started once and the tests look at what came out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.errors import ConfigError, MillstreamError
from pipeline.session import World
from tests import gloo, small_run

KINDS, STAGES, SAMPLED = ("words", "images"), (0, 1, 2, 3), (0, 3)


def curves(world: World, stages: tuple[int, ...]) -> dict[tuple[str, int], list[float]]:
    """20 losses of each network at each stage."""
    found = {}
    for kind in KINDS:
        for stage in stages:
            settings = small_run.config(kind, stage)
            engine = small_run.start(world, settings, kind)
            found[kind, stage] = small_run.curve(engine, world, settings, kind, 0, 20)
            engine.close()
    return found


def gradient_errors(world: World) -> dict[tuple[str, int], float]:
    """Largest relative difference of one SGD step's change from one full-batch gradient taken without DeepSpeed."""
    from pipeline.checkpoint import layouts

    errors = {}
    for kind in KINDS:
        plain = small_run.model(kind).eval()
        inputs, targets, counts = small_run.batch(kind, 0)
        (small_run.loss_sum(plain, inputs, targets, counts) / counts.sum()).backward()
        gradients = {name: p.grad.flatten() for name, p in plain.named_parameters() if p.grad is not None}
        for stage in STAGES:
            change = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "clip": None, "groups": ()}
            settings = small_run.config(kind, stage, optim=change)
            engine = small_run.start(world, settings, kind)
            engine.model.eval()  # no dropout
            before = small_run.state(engine)
            rate = settings.optim.lr / settings.optim.schedule.warmup
            norm = small_run.step(engine, world, settings, kind, 0)[1].grad_norm
            worst = abs(norm / float(torch.cat(list(gradients.values())).norm()) - 1)
            for piece in layouts.pieces(engine):
                if piece.name in gradients:
                    want = gradients[piece.name][piece.start : piece.start + len(piece.state["master"])]
                    got = (before[f"{piece.name}|master"] - piece.state["master"]) / rate
                    worst = max(worst, float((got - want).norm() / gradients[piece.name].norm()))
            errors[kind, stage] = max(world.gather([worst])[:, 0])
            engine.close()
    return errors


def lone_gradients(world: World) -> dict[tuple[str, int], torch.Tensor]:
    """Weights [all] after an SGD step in which one micro batch of one rank counts: nothing to add up but zeros."""
    found = {}
    for kind in KINDS:
        for stage in (0, 1, 2):  # stage 3 can only average
            change = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "clip": None, "groups": ()}
            settings = small_run.config(kind, stage, optim=change)
            engine = small_run.start(world, settings, kind)
            engine.model.eval()  # no dropout
            inputs, targets, counts = (tensor[: small_run.MICRO] for tensor in small_run.batch(kind, 0))
            for turn in range(settings.micro_steps(world.world_size)):
                loss = small_run.loss_sum(engine.model, inputs, targets, counts)
                engine.backward(loss * (1 / 7 if (world.rank, turn) == (0, 0) else 0.0))
            engine.step(0.1)
            found[kind, stage] = torch.cat([p.detach().flatten() for p in engine.module.parameters()])
            engine.close()
    return found


def idle_steps(world: World) -> dict[tuple[str, int], list[Any]]:
    """Per dtype and stage: (applied, norm, state unchanged) of two poisoned steps and a good one after."""
    found = {}
    for dtype in ("fp32", "bf16"):
        for stage in STAGES:
            settings = small_run.config("words", stage, dtype)
            engine = small_run.start(world, settings, "words")
            small_run.step(engine, world, settings, "words", 0)
            row, before = [], small_run.state(engine)
            # only rank 0 runs the spoiled micro batch; the others must come to the same answer
            for number, spoil in ((1, float("nan")), (2, float("inf"))):
                result = small_run.step(engine, world, settings, "words", number, spoil)[1]
                row.append((result.applied, result.grad_norm, small_run.same(before, small_run.state(engine))))
            row.append(
                (
                    small_run.step(engine, world, settings, "words", 4)[1].applied,
                    0.0,
                    small_run.same(before, small_run.state(engine)),
                )
            )
            found[dtype, stage] = row
            engine.close()
    return found


def variants(world: World) -> dict[str, bool]:
    """Whether a curve stays the same, to the bit, when something is done that must not matter."""
    found = {}
    for stage in (0, 3):
        settings = small_run.config("words", stage)
        engine = small_run.start(world, settings, "words")
        usual = small_run.curve(engine, world, settings, "words", 0, 6)
        engine.close()
        engine = small_run.start(world, settings, "words")
        watched = []
        for number in range(6):
            watched += small_run.curve(engine, world, settings, "words", number, number + 1)
            engine.model.eval()
            with torch.no_grad():
                engine.model(small_run.batch("words", 99)[0][:3])
            engine.model.train()
        engine.close()
        settings = small_run.config("words", stage, activation_checkpointing=True)
        engine = small_run.start(world, settings, "words")
        found[f"evaluation {stage}"] = watched == usual
        found[f"recompute {stage}"] = small_run.curve(engine, world, settings, "words", 0, 6) == usual
        found[f"recompute {stage} is on"] = engine.module.recompute
        engine.close()
    return found


def on_two(world: World) -> dict[str, Any]:
    return {
        "curves": curves(world, STAGES),
        "gradients": gradient_errors(world),
        "lone": lone_gradients(world),
        "idle": idle_steps(world),
        "variants": variants(world),
        "refused": refusals(world),
    }


def refusals(world: World) -> dict[str, str]:
    """What settings that cannot work are answered with."""
    found: dict[str, str] = {}
    for name, settings in {
        "fp16": small_run.config("images", 1, "fp16"),
        "recompute": small_run.config("images", 1, activation_checkpointing=True),
    }.items():
        try:
            small_run.start(world, settings, "images")
        except MillstreamError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def on_three(world: World) -> dict[str, Any]:
    return {"curves": curves(world, SAMPLED), "lone": lone_gradients(world)}


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return gloo.run(on_two, 2)


@pytest.fixture(scope="module")
def three() -> dict[str, Any]:
    return gloo.run(on_three, 3)[0]


def largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_all_stages_give_the_same_losses(two, kind):
    losses = {stage: two[0]["curves"][kind, stage] for stage in STAGES}
    assert losses[0][-1] < 0.9 * losses[0][0]  # it does learn
    assert max(largest_difference(losses[0], losses[stage]) for stage in STAGES) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_workers_does_not_matter(two, three, kind):
    """3 does not divide the 4 micro batches: some ranks run a filler."""
    for stage in SAMPLED:
        assert largest_difference(two[0]["curves"][kind, 0], three["curves"][kind, stage]) < 1e-5


def test_the_backward_pass_rounds_alike_on_any_number_of_workers(two, three):
    """A micro batch's gradient is the same to the bit on 2 and 3 workers, so only the order of adding up is left."""
    for place, weights in two[0]["lone"].items():
        assert torch.equal(weights, three["lone"][place]), place


def test_the_gradient_is_that_of_the_full_batch(two):
    """Ragged rows, and ranks with different numbers of terms: still every term weighs the same."""
    assert max(two[0]["gradients"].values()) < 1e-5, two[0]["gradients"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_applied_changes_nothing(two, dtype, stage):
    for rank in two:
        nan, inf, good = rank["idle"][dtype, stage]
        assert nan == inf == (False, float("inf"), True)
        assert good == (True, 0.0, False)


def test_evaluation_and_recomputation_leave_the_curve_alone(two):
    assert all(two[0]["variants"].values()), two[0]["variants"]


def test_what_cannot_work_is_refused_before_deepspeed_sees_it(two):
    assert two[0]["refused"]["fp16"].startswith("ConfigError: precision.dtype: fp16 needs a GPU or a CPU with")
    assert "Images has no gradient_checkpointing_enable" in two[0]["refused"]["recompute"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"reduce_buckt_size": 5}, "reduce_buckt_size"),
        ({"reduce_bucket_size": "many"}, "reduce_bucket_size"),
        ({"offload_optimizer": {"device": "cpu"}}, r"zero\.extra\.offload_optimizer: write it as zero\.offload"),
        ({"offload_param": {"device": "cpu"}}, "zero.extra.offload_param: not supported"),
        ({"round_robin_gradients": True}, "round_robin_gradients"),
        ({"stage": 2}, "zero.stage"),
        ({"compute_grad_norm": False}, "compute_grad_norm"),
    ],
)
def test_settings_that_deepspeed_or_checkpoints_do_not_know_are_refused(extra, message):
    from pipeline import engine

    with pytest.raises(ConfigError, match=message):
        engine.deepspeed_config(small_run.config("words", 1, extra=extra), 1)


def test_the_batch_is_split_as_deepspeed_wants_it():
    from pipeline import engine

    settings = small_run.config("words", 2, "bf16", extra={"reduce_bucket_size": 1000})
    got = engine.deepspeed_config(settings, 3)
    assert (got["train_batch_size"], got["train_micro_batch_size_per_gpu"], got["gradient_accumulation_steps"]) == (
        12,
        2,
        2,
    )
    assert got["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    with pytest.raises(ConfigError, match="5 workers, but a step has only 4 micro batches"):
        engine.deepspeed_config(settings, 5)


def test_another_deepspeed_is_refused(monkeypatch):
    from pipeline import engine

    monkeypatch.setattr(engine, "DEEPSPEED_VERSION", "0.19.9")
    with pytest.raises(MillstreamError, match=r"pip install deepspeed==0\.19\.9"):
        engine.init_distributed(World(0, 1, 0, torch.device("cpu"), None))  # pyright: ignore[reportArgumentType]
