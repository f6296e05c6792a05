"""Jumps of the loss are told from its noise: none on ordinary curves, every real one, and a restart changes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine import StepResult
from pipeline.guard import Judge
from pipeline.sections import Guard
from pipeline.session import Session, World
from pipeline.spikes import Recent

STEPS, SEEDS = 2000, 10
Curve = Callable[[np.random.Generator, np.ndarray], np.ndarray]


def noise(rng: np.random.Generator, steps: np.ndarray, share: float) -> np.ndarray:
    return np.exp(rng.normal(0, share, len(steps)))


def fitted(rng: np.random.Generator, steps: np.ndarray, wrong: float = 0.03) -> np.ndarray:
    """A classifier that has learnt its images: next to nothing, but for batches that hold a hard one."""
    falling = 2.3 * np.exp(-steps / 200) * noise(rng, steps, 0.6)
    return (
        falling + 1e-3 * noise(rng, steps, 0.7) + (rng.random(len(steps)) < wrong) * rng.exponential(0.08, len(steps))
    )


def warm_up(rng: np.random.Generator, steps: np.ndarray) -> np.ndarray:
    """Flat while the learning rate is next to nothing, up while it comes, then down."""
    bump = 0.5 * np.sin(np.pi * np.clip((steps - 60) / 100, 0, 1))
    return (2.3 + bump) * np.exp(-np.clip(steps - 160, 0, None) / 800) * noise(rng, steps, 0.004)


ORDINARY: dict[str, Curve] = {
    "language model": lambda rng, t: (1.6 + 8 * np.exp(-t / 60) + 1 / np.sqrt(1 + t / 20)) * noise(rng, t, 0.02),
    "large batches": lambda rng, t: (1.6 + 8 * np.exp(-t / 60)) * noise(rng, t, 0.003),
    "classifier": lambda rng, t: (2.3 * np.exp(-t / 150) + 0.02) * noise(rng, t, 0.6),
    "fitted classifier": fitted,
    "diffusion": lambda rng, t: 0.05 * noise(rng, t, 0.35),
    "warm-up": warm_up,
    "gradient norm": lambda rng, t: (1 + 5 * np.exp(-t / 100)) * np.exp(0.3 * rng.standard_t(6, len(t))),
    "log-likelihood, below 0": lambda rng, t: -3 + 4 * np.exp(-t / 100) + rng.normal(0, 0.05, len(t)),
    "constant": lambda rng, t: np.ones(len(t)),
}


def alarms(values: np.ndarray, window: int = 128, power: int = 3) -> list[int]:
    recent, found = Recent(window, power), []
    for step, value in enumerate(values.tolist()):
        if recent.limit is not None and value > recent.limit:
            found.append(step)
        else:
            recent.add(value)
    return found


def six_deviations(values: np.ndarray, window: int = 128) -> list[int]:
    """What OLMo-core's rule would skip for being too high."""
    before = ((step, values[max(0, step - window) : step]) for step in range(window // 2, len(values)))
    return [step for step, recent in before if values[step] > recent.mean() + 6 * recent.std(ddof=1)]


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_curves_raise_no_alarm(kind: str) -> None:
    steps = np.arange(STEPS)
    found = {seed: alarms(ORDINARY[kind](np.random.default_rng(seed), steps)) for seed in range(SEEDS)}
    assert {seed: steps for seed, steps in found.items() if steps} == {}


@pytest.mark.parametrize("run", ["digits", "stdlib"])
def test_the_recorded_curves_of_the_shipped_configurations_raise_none(run: str) -> None:
    """configs/digits.yaml whole, configs/stdlib.yaml up to step 137, as one process trained them; a jump is found."""
    recorded = json.loads(Path(__file__).with_name("curves.json").read_text())[run]
    for name in ("loss", "grad_norm"):
        values = np.array(recorded[name][recorded["warmup"] :])
        assert len(values) > 64 and alarms(values) == []
    losses = np.array(recorded["loss"][recorded["warmup"] :])
    losses[-1] = 12.0  # from 0.03, and from 4.9 at the foot of a slope
    assert alarms(losses) == [len(losses) - 1]


def test_standard_deviations_would_alarm_on_the_same_curves() -> None:
    steps = np.arange(STEPS)
    kinds = ("classifier", "fitted classifier", "warm-up", "gradient norm")
    assert all(six_deviations(ORDINARY[kind](np.random.default_rng(0), steps)) for kind in kinds)


@pytest.mark.parametrize(
    ("kind", "factor"),
    [("language model", 1.6), ("large batches", 1.15), ("diffusion", 100.0), ("warm-up", 1.6), ("constant", 1.2)],
)
def test_what_is_far_above_is_found_wherever_it_comes(kind: str, factor: float) -> None:
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        curve = ORDINARY[kind](rng, np.arange(STEPS))
        at = int(rng.integers(STEPS // 2, STEPS))
        curve[at] = np.median(curve[at - 50 : at]) * factor
        assert alarms(curve) == [at]


def test_the_limit_follows_from_median_and_largest() -> None:
    recent = Recent(8, 3, [1.0, 1.0, 2.0])
    assert recent.limit is None
    recent.add(1.0)
    assert recent.median == 1.0 and recent.limit == 8.0
    for _ in range(8):
        recent.add(1.0)  # the 2 has left
    assert recent.limit == 1.1 and len(recent.values) == 8
    below = Recent(8, 3, [-2.0, -1.0, -1.0, 0.0])
    assert below.limit == -1.0 + 3 * 1.0


# --- the guard, with a session of one rank ---


class Steps:
    """Takes steps with a guard, and says what it made of each."""

    def __init__(self, session: Session, policy: Guard) -> None:
        self.session, self.judge = session, Judge(policy, warmup=3)
        self.decided: list[Any] = []

    def take(self, step: int, loss: float) -> bool:
        """Whether the run goes on."""
        refused = self.judge.refuses(self.session.world, {"loss": (torch.tensor(loss), torch.tensor(1.0))})
        applied = math.isfinite(loss) and not refused
        result = StepResult(abs(loss) if applied else math.inf, applied, None)
        window = self.judge.judge(self.session, step, result, loss, [])
        self.decided.append((step, refused, window, self.judge.in_a_row))
        return window is None

    def restarted(self) -> None:
        """Another process goes on from what the checkpoint holds."""
        state = json.loads(json.dumps(self.judge.state))
        self.judge = Judge(self.judge.policy, warmup=3)
        self.judge.resume(state)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    alone = World(0, 1, 0, torch.device("cpu"), None)  # pyright: ignore
    return Session(alone, tmp_path_factory.mktemp("run"), 1, lambda *_: False)


LOSSES = st.lists(st.sampled_from([1.0, 1.1, 1.3, 0.9, 40.0, 9e3, math.nan]) | st.floats(0.8, 1.2), max_size=60)


@settings(deadline=None, max_examples=200)
@given(losses=LOSSES, cuts=st.sets(st.integers(0, 60)), spike=st.sampled_from(["off", "warn", "skip", "rollback"]))
def test_a_restart_changes_no_decision(session: Session, losses: list[float], cuts: set[int], spike: Any) -> None:
    """Interrupted after any steps, the guard decides as one that was not, to the end, and keeps the same state."""
    policy = Guard(spike=spike, spike_window=8, max_skipped=2, margin=1)
    whole, broken = Steps(session, policy), Steps(session, policy)
    for step, loss in enumerate(losses):
        goes_on = whole.take(step, loss)
        if step in cuts:
            broken.restarted()
        assert broken.take(step, loss) == goes_on
        if not goes_on:
            break
    assert broken.decided == whole.decided
    assert json.dumps(broken.judge.state) == json.dumps(whole.judge.state)


def test_each_policy_on_the_same_losses(session: Session) -> None:
    """Ten ordinary losses, one that jumps, one ordinary, then a level that stays."""
    losses = [1.0, 1.2] * 5 + [50.0, 1.0] + [60.0] * 4
    found: dict[str, Any] = {}
    for spike in ("off", "warn", "skip", "rollback"):
        steps = Steps(session, Guard.model_validate({"spike": spike, "spike_window": 8, "max_skipped": 2, "margin": 3}))
        for step, loss in enumerate(losses):
            if not steps.take(step, loss):
                break
        found[spike] = steps
    assert [len(steps.decided) for steps in found.values()] == [16, 16, 15, 12 + 3]
    assert not any(refused for _, refused, *_ in found["warn"].decided + found["rollback"].decided)
    assert [step for step, refused, *_ in found["skip"].decided if refused] == [10, 12, 13, 14]
    assert found["skip"].decided[-1][2] == found["rollback"].decided[-1][2] == (9, 17)
    assert found["warn"].decided[-1][3] == 0 and found["off"].judge.state["losses"] == []
    assert list(found["warn"].judge.losses.values) == [60.0]  # the level is learnt anew


def test_a_state_of_an_earlier_version_is_none(session: Session, tmp_path: Path) -> None:
    judge = Judge(Guard())
    judge.resume({})
    assert judge.in_a_row == 0 and not judge.losses.values
