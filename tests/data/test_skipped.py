"""Steps that are left out: the others are as ever, nothing of them is read, and a checkpoint remembers them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import config as configs
from pipeline.data.reader import Sample, open_dataset
from pipeline.data.skipped import Skipped
from pipeline.data.stream import Stream
from pipeline.problems import InvalidConfig
from tests import small_data
from tests.data.small_loader import loader, plain, write

WINDOWS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 15)).map(lambda pair: (pair[0], sum(pair))), max_size=6)


@given(WINDOWS, st.integers(0, 60))
def test_windows_are_the_steps_that_they_hold(windows: list[tuple[int, int]], since: int) -> None:
    skipped, out = Skipped.of(windows), {step for first, last in windows for step in range(first, last + 1)}
    assert {step for step in range(70) if skipped.window(step)} == out
    for step in range(70):
        assert skipped.next(step) == min(set(range(step, 72)) - out)
        first, last = skipped.window(step) or (step, step)
        assert first <= step <= last
    assert {step for step in range(70) if skipped.since(since).window(step)} == {step for step in out if step >= since}
    edges = [edge for window in skipped.windows for edge in window]
    assert edges == sorted(edges) and all(b > a + 1 for a, b in zip(edges[1::2], edges[2::2]))
    assert Skipped.of(skipped.windows) == skipped == Skipped.of(json.loads(json.dumps(skipped.windows)))


def guarded(forbidden: set[int], sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    assert sample.number not in forbidden
    return plain(sample, rng)


@pytest.mark.parametrize(("threads", "processes"), [(0, 0), (2, 0), (0, 1)])
def test_a_loader_passes_over_them_without_reading(tmp_path: Path, threads: int, processes: int) -> None:
    """The other steps have the rows that they have without."""
    ways: dict[str, Any] = {"micro_batch": 4, "micro_batches": 2, "start_step": 1, "threads": threads}
    with open_dataset(write(tmp_path / "train")) as dataset:
        with loader(dataset, **ways) as whole:
            expected = {step: [micro.numbers.tolist() for micro in whole.step(step)] for step in range(1, 11)}
        forbidden = {n for step in (1, 2, 5, 6, 7, 8) for numbers in expected[step] for n in numbers}
        skipped = Skipped.of([(1, 2), (5, 8)])
        with loader(dataset, partial(guarded, forbidden), **ways, processes=processes, skipped=skipped) as some:
            with pytest.raises(ValueError, match="step 3 comes next, not 1"):
                some.step(1)
            for step in (3, 4, 9, 10):
                assert [micro.numbers.tolist() for micro in some.step(step)] == expected[step]


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    pictures = small_data.images(tmp_path / "pictures")
    return small_data.config(tmp_path / "toy.yaml", {"name": "tests.poisoned_task"}, pictures)


def test_a_checkpoint_keeps_them_whatever_the_configuration_says_later(toy: Path) -> None:
    data = Stream(configs.load(toy, ["data.skip_steps=[[4, 6], [7, 7]]"]))
    data.leave_out([(12, 14)])
    kept = json.loads(json.dumps(data.state))
    assert kept["skipped"] == [[4, 7], [12, 14]]
    later = Stream(configs.load(toy, ["data.skip_steps=[[2, 10], [20, 21]]"]))
    assert later.resume(9, kept, new_order=False) == []
    assert later.skipped.windows == ((4, 7), (9, 10), (12, 14), (20, 21))  # 2 and 3 have been trained on
    del kept["skipped"]  # as an earlier version wrote it
    plain = Stream(configs.load(toy))
    assert plain.resume(9, kept, new_order=False) == [] and plain.skipped == Skipped()
    assert np.array_equal(plain.mixture.rows(13, 0, 4)[2], data.mixture.rows(13, 0, 4)[2])


@pytest.mark.parametrize("wrong", ["[[5, 4]]", "[[-1, 4]]", "[5, 6]", "[[1, 2, 3]]"])
def test_a_window_that_is_none_is_refused(toy: Path, wrong: str) -> None:
    with pytest.raises(InvalidConfig, match=r"data\.skip_steps"):
        configs.load(toy, [f"data.skip_steps={wrong}"])
