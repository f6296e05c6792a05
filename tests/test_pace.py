"""Ranks and hosts that hold the others up are named, once, with the figures; noise names nobody."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from pipeline import config as configs
from pipeline import pace as paces
from pipeline.data.loader import Loader
from pipeline.pace import Figures, Pace
from pipeline.session import Session, World
from tests import gloo, small_data
from tests.small_session import of_kind, records_of
from tests.test_train import RESNET


class Noted:
    """What rank 0 notes in a run of ranks on `hosts`, whose figures the test makes up."""

    def __init__(self, hosts: list[str]) -> None:
        self.records: list[dict[str, Any]] = []
        world = SimpleNamespace(rank=0, gather_objects=lambda host: hosts)
        record = lambda kind, **facts: self.records.append({"kind": kind, **facts})  # noqa: E731
        self.pace = Pace(cast(Session, SimpleNamespace(world=world, host=hosts[0], record=record)))
        self.loader = cast(Loader, SimpleNamespace(slow_shards=list, slow_links=list, cache_troubles=list))
        self.step = 0

    def steps(self, computed: np.ndarray, waited: np.ndarray) -> list[dict[str, Any]]:
        """Steps of which rank r computes `computed[:, r]`; what was said of slow ones."""
        for one, other in zip(computed, waited):
            ranks = Figures(other, 0 * one, one, 1e9 + 0 * one, 0 * one)
            self.pace.note(self.step, ranks, float((one + other).max() * 2), self.loader)
            self.step += 1
        return of_kind(self.records, "slow")


def noise(steps: int, ranks: int, seed: int, seconds: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Healthy ranks: log-normal times, one step in fifty ten times as long, data waits mostly nothing."""
    draw = np.random.default_rng(seed)
    computed = seconds * draw.lognormal(0.0, 0.25, (steps, ranks))
    computed *= np.where(draw.random((steps, ranks)) < 0.02, 10.0, 1.0)
    waited = np.where(draw.random((steps, ranks)) < 0.05, seconds * draw.exponential(0.5, (steps, ranks)), 1e-4)
    return computed, waited


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_a_thousand_noisy_healthy_steps_name_nobody(ranks: int) -> None:
    for seed, seconds in enumerate((0.003, 0.3, 1.0, 40.0)):
        noted = Noted([f"h{rank // 4}" for rank in range(ranks)])
        assert noted.steps(*noise(1000, ranks, seed, seconds)) == []
        assert sum(record["steps"] for record in of_kind(noted.records, "pace")) <= 1000


def test_a_rank_that_becomes_slow_is_named_once_with_host_and_figures() -> None:
    computed, waited = noise(1000, 4, 5)
    computed[200:, 1] *= 2.1
    noted = Noted(["h1", "h2", "h3", "h4"])
    [slow] = noted.steps(computed, waited)
    assert (slow["what"], slow["by"], slow["ranks"], slow["host"], slow["since"]) == ("rank", "compute", [1], "h2", 200)
    assert slow["step"] == 299  # five windows of 20 steps
    times = re.search(r"^rank 1 on h2 computes (.+) x as long as the others", slow["message"])
    assert times and float(times[1]) == pytest.approx(2.1, rel=0.25)
    record = of_kind(noted.records, "pace")[12]
    assert len(record["compute"]) == len(record["data"]) == 4 and record["compute"][1] > 1.5 * record["compute"][0]
    assert record["memory"] == [1e9] * 4


def test_a_host_is_named_when_all_its_ranks_are_slow_and_a_rank_when_it_alone_is() -> None:
    hosts = [f"h{rank // 4}" for rank in range(8)]
    computed, waited = noise(600, 8, 6)
    computed[:, 4:] *= 1.6
    computed[:40, 6] /= 1.6  # one of them follows a little later: they are named together
    [slow] = Noted(hosts).steps(computed, waited)
    assert (slow["what"], slow["ranks"], slow["host"]) == ("host", [4, 5, 6, 7], "h1")
    assert "host h1 (ranks 4, 5, 6, 7) computes" in slow["message"]
    computed, waited = noise(400, 8, 7)
    computed[:, 5] *= 1.6
    [slow] = Noted(hosts).steps(computed, waited)
    assert (slow["what"], slow["ranks"]) == ("rank", [5])


def test_a_rank_that_waits_for_data_is_named() -> None:
    computed, waited = noise(400, 3, 8)
    waited[100:, 2] += 0.15
    [slow] = Noted(["h1", "h2", "h3"]).steps(computed, waited)
    assert (slow["by"], slow["ranks"], slow["since"]) == ("data", [2], 100)
    assert "rank 2 on h3 waits longer for data than the others" in slow["message"]


def test_what_costs_nothing_is_not_named() -> None:
    computed, waited = np.full((400, 2), 0.01), np.full((400, 2), 0.9)
    computed[:, 1] = 0.03  # three times as long, but nothing against the step
    assert Noted(["h1", "h2"]).steps(computed, waited) == []


def two_ranks(world: World, path: Path, runs: Path) -> list[dict[str, Any]]:
    """Train with windows of a fifth of a second, so that some twenty steps show what a run shows in minutes."""
    paces.WINDOW = 3, 0.2
    task = configs.load(path).task.name
    assert task == "tests.sleepy_task"
    return records_of(world, configs.load(path), runs)


def test_a_real_rank_that_sleeps_is_named(tmp_path: Path) -> None:
    """Rank 1's forward passes take a moment longer (tests/sleepy_task.py); both wait for it in the backward pass."""
    pictures = small_data.images(tmp_path / "pictures")
    task = {**RESNET, "name": "tests.sleepy_task"}
    path = small_data.config(
        tmp_path / "toy.yaml", task, pictures, steps=24, zero={"stage": 2}, checkpoint={"every": 99}
    )
    first, second = gloo.run(two_ranks, 2, path, tmp_path / "run")
    [slow] = of_kind(first, "slow")
    assert (slow["what"], slow["by"], slow["ranks"], slow["since"]) == ("rank", "compute", [1], 0)
    assert "the run goes at its pace" in slow["message"] and of_kind(second, "slow") == []
    assert len(of_kind(first, "pace")) >= 5
