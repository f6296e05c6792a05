"""Mixtures against slow ones that keep lists, and the promises that follow: once per epoch, through any change."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.draws import drawn, drawn_before, resolve
from pipeline.data.mixture import Mixture, Source
from pipeline.data.order import Order
from pipeline.errors import CheckpointError, ConfigError, DataError
from tests.data.slow_mixture import Row, SlowMixture, SlowSource, slow_draws

weights = st.one_of(st.sampled_from([1.0, 0.5, 1e-2, 1e-4]), st.floats(1e-3, 1))


@st.composite
def mixtures(draw: st.DrawFn, most: int = 3) -> dict[str, Any]:
    """Keyword arguments of Mixture.start; few samples, so that epochs end soon and lanes may go without any."""
    samples = draw(st.lists(st.one_of(st.integers(1, 60), st.sampled_from([1, 2, 31, 97])), min_size=1, max_size=most))
    block = partial(draw, st.integers(1, 12))
    sources = [
        Source(f"s{i}", f"data {i}", n, block(), draw(st.sampled_from([1.0, 0.5, 2.0, 0.07])))
        for i, n in enumerate(samples)
    ]
    lanes = draw(st.integers(1, 7))
    seed = draw(st.integers(-(2**65), 2**65))
    depth = draw(st.integers(1, 6))
    return {
        "sources": sources,
        "lanes": lanes,
        "shuffle_blocks": draw(st.integers(1, 20)),
        "seed": seed,
        "global_batch": lanes * depth,
    }


def slow(plan: dict[str, Any], counts: tuple[int, ...]) -> SlowMixture:
    return SlowMixture(
        [SlowSource(order(plan, s)) for s in plan["sources"]], counts, plan["seed"], plan["global_batch"]
    )


def order(plan: dict[str, Any], source: Source) -> Order:
    return Order(source.samples, source.block, plan["lanes"], plan["shuffle_blocks"], plan["seed"])


def fast(mixture: Mixture, first: int, steps: int, batch: int) -> list[Row]:
    rows = [mixture.rows(step, 0, batch) for step in range(first, first + steps)]
    assert all(column.dtype == np.int64 and column.shape == (batch,) for row in rows for column in row)
    return [row for columns in rows for row in zip(*(column.tolist() for column in columns))]


def stored(mixture: Mixture) -> dict[str, Any]:
    """The state as a checkpoint gives it back."""
    return json.loads(json.dumps(mixture.state))


# ------------------------------------------------------------------------------------------------------------ draws


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 0, 1, 1), (1, 0.003, 0.5), (3,)])
def test_draws_are_the_slow_ones(weights: tuple[float, ...]):
    counts = resolve({str(i): weight for i, weight in enumerate(weights)})
    block = sum(counts)
    length = block + 2000
    for lane in (0, 3):
        sources, ranks = drawn(counts, 9, np.full(length, lane), np.arange(length))
        expected = list(islice(slow_draws(counts, 9, lane), length))
        assert sources.tolist() == expected
        for source, draws in enumerate(counts):
            assert ranks[sources == source].tolist() == list(range(expected.count(source)))
            assert expected[:block].count(source) == draws
        for some in (0, 1, 1023, 1024, block - 1, block, length):
            assert drawn_before(counts, 9, lane, some).tolist() == [
                expected[:some].count(s) for s in range(len(counts))
            ]


def test_a_rare_source_comes_evenly_but_not_in_all_lanes_at_once():
    counts = resolve({"much": 1, "rare": 1e-4})
    length = 2 * sum(counts)
    places = [np.flatnonzero(drawn(counts, 0, np.full(length, lane), np.arange(length))[0]) for lane in range(2)]
    mean = length / len(places[0])
    assert max(np.diff(places[0]).max(), places[0][0]) < 3 * mean
    assert not set((places[0] // 1024).tolist()) <= set((places[1] // 1024).tolist())


@given(st.lists(weights, min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_counts_are_as_asked_within_one_percent(weights: list[float]):
    total = sum(weights)
    if min(weights) / total < 100 / 2**20:  # then it depends on luck
        return
    counts = resolve({str(i): weight for i, weight in enumerate(weights)})
    assert sum(counts) in [2**k for k in range(12, 21)]
    assert all(abs(c / sum(counts) / (w / total) - 1) <= 0.01 + 1e-9 for c, w in zip(counts, weights))


def test_counts_in_numbers():
    assert resolve({"a": 7, "b": 3}) == resolve({"a": 0.7, "b": 0.3}) == (2867, 1229)
    assert resolve({"a": 1, "b": 1, "c": 1}) == (1366, 1365, 1365)
    assert resolve({"a": 1, "b": 0}) == (4096, 0)
    assert resolve({"a": 1 - 1e-4, "b": 1e-4})[1] >= 1
    with pytest.raises(ConfigError, match=r"dust \(weight 1e-06\) asks for 1.05 and would get 1, more than 1 % off"):
        resolve({"a": 1, "dust": 1e-6})
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="the weight of b is"):
            resolve({"a": 1, "b": wrong})
    with pytest.raises(ConfigError, match="no source has a weight above 0"):
        resolve({"a": 0})


# ------------------------------------------------------------------------------------------------------------- rows


@given(mixtures(), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_rows_are_the_slow_ones_and_each_sample_comes_once(plan: dict[str, Any], steps: int):
    mixture = Mixture.start(**plan)
    brute = slow(plan, mixture.segments[0].draws)
    assert fast(mixture, 0, steps, plan["global_batch"]) == brute.steps(steps)
    for source in brute.sources:
        source.check()


@given(mixtures(most=1), st.integers(0, 10**9), st.data())
@settings(max_examples=40, deadline=None)
def test_one_source_is_its_order(plan: dict[str, Any], step: int, data: st.DataObject):
    batch = plan["global_batch"]
    micro = data.draw(st.sampled_from([m for m in range(1, batch + 1) if batch % m == 0]))
    j = data.draw(st.integers(0, batch // micro - 1))
    sources, epochs, numbers = Mixture.start(**plan).rows(step, j, micro)
    expected = order(plan, plan["sources"][0]).rows(step, j, batch, micro)
    assert [epochs.tolist(), numbers.tolist()] == [column.tolist() for column in expected]
    assert not sources.any()


@given(st.lists(weights, min_size=2, max_size=4), st.integers(1, 3), st.integers(0, 5))
@settings(max_examples=6, deadline=None)
def test_long_runs_of_uneven_mixtures_hold_each_sample_once_per_epoch(shares: list[float], lanes: int, seed: int):
    """Also of the rarest source: steps as large as a block of draws, and the epochs that every lane has left."""
    sources = [
        Source(str(i), str(i), n, 3, w)
        for i, (n, w) in enumerate(zip([9973, 1000, 5, 2], sorted(shares, reverse=True)))
    ]
    if min(shares) / sum(shares) < 100 / 2**20:
        return
    batch = lanes * 30_000
    mixture = Mixture.start(sources, lanes=lanes, shuffle_blocks=8, seed=seed, global_batch=batch)
    source, epoch, number = np.concatenate([mixture.rows(step, 0, batch) for step in range(2)], axis=1)
    lane = np.tile(np.repeat(np.arange(lanes), batch // lanes), 2)
    for s, described in enumerate(sources):
        pairs = epoch[source == s] * described.samples + number[source == s]
        assert len(np.unique(pairs)) == len(pairs)
        last = [epoch[(source == s) & (lane == one)].max(initial=0) for one in range(lanes)]
        over = epoch[source == s] < min(last)
        if described.samples >= lanes:  # else a lane without a sample in an epoch says nothing of it
            assert over.sum() == min(last) * described.samples


@given(mixtures(), st.lists(st.tuples(st.integers(0, 4), st.integers(1, 64)), min_size=1, max_size=6), st.data())
@settings(max_examples=40, deadline=None)
def test_any_chain_of_interruptions_at_any_world_size_gives_the_same_micro_batches(plan, attempts, data):
    batch = plan["global_batch"]
    micro = data.draw(st.sampled_from([m for m in range(1, batch + 1) if batch % m == 0]))
    micro_batches = batch // micro
    mixture, step, got = Mixture.start(**plan), 0, []
    for steps, world_size in attempts:
        mixture = Mixture.from_state(stored(mixture))
        for _ in range(steps):
            for rank in range(world_size):
                own = range(rank * micro_batches // world_size, (rank + 1) * micro_batches // world_size)
                got += [[column.tolist() for column in mixture.rows(step, j, micro)] for j in own]
            step += 1
    straight = Mixture.start(**plan)
    assert got == [
        [column.tolist() for column in straight.rows(k, j, micro)] for k in range(step) for j in range(micro_batches)
    ]


def test_the_order_of_a_mixture_never_changes():
    """These numbers are in every checkpoint's future: if they differ, raise VERSION and keep the old arithmetic."""
    sources = [Source("a", "A", 1003, 10, 0.7), Source("b", "B", 97, 5, 0.299), Source("c", "C", 10**10, 512, 0.001)]
    mixture = Mixture.start(sources, lanes=4, shuffle_blocks=16, seed=42, global_batch=16)
    assert mixture.shares == [("a", 22937, 32768), ("b", 9798, 32768), ("c", 33, 32768)]
    assert [column.tolist() for column in mixture.rows(10**6, 1, 8)] == [
        [0, 0, 0, 0, 0, 0, 1, 1],
        [11166, 11166, 11166, 11166, 11166, 11166, 49321, 49321],
        [139, 83, 958, 294, 571, 114, 84, 19],
    ]
    fewer = [sources[0], replace(sources[1], weight=0.1)]
    changed = Mixture.start(fewer, lanes=4, shuffle_blocks=16, seed=42, global_batch=16)
    newest, _ = Mixture.continued(mixture.state, 12345, changed, lambda *_: None)
    assert [list(chain.bases) for chain in newest.segments[1].chains] == [
        [34563, 34563, 34579, 34567],
        [14767, 14767, 14752, 14763],
        [50, 50, 49, 50],
    ]
    assert newest.rows(54321, 1, 8)[2].tolist() == [962, 828, 170, 963, 711, 717, 530, 712]


def test_what_cannot_work_is_refused():
    start = partial(Mixture.start, lanes=2, shuffle_blocks=4, seed=0, global_batch=8)
    a = Source("a", "A", 10, 1)
    with pytest.raises(ConfigError, match="3 lanes must divide the global batch of 8"):
        start([a], lanes=3)
    with pytest.raises(ConfigError, match="shuffle_blocks is 0"):
        start([a], shuffle_blocks=0)
    with pytest.raises(ConfigError, match="micro batches of 3 must divide the global batch of 8"):
        start([a]).rows(0, 0, 3)
    with pytest.raises(IndexError):
        start([a]).rows(0, 2, 4)
    with pytest.raises(IndexError):
        start([a]).rows(-1, 0, 4)
    with pytest.raises(DataError, match="a has no samples"):
        start([replace(a, samples=0)])
    with pytest.raises(ConfigError, match="a and b hold the same data"):
        start([a, replace(a, name="b")])
    with pytest.raises(ConfigError, match="two sources are called a"):
        start([a, replace(a, identity="B")])
    with pytest.raises(ConfigError, match="overflow 64-bit"):
        start([replace(a, samples=2**40)])
    for sources in ([a], [a, Source("b", "B", 10**6, 1)]):
        assert start(sources).rows(2**59, 0, 8)[2].max() < 10**6
        with pytest.raises(ConfigError, match="step 1152921504606846976 overflow 64-bit"):
            start(sources).rows(2**60, 0, 8)
    with pytest.raises(CheckpointError, match="version 7"):
        Mixture.from_state({"version": 7})
