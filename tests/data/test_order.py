"""The order against a slow version of itself that keeps lists, and the promises that follow from it."""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from math import ceil, isqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import BLOCKS, ROUNDS, WINDOWS, Order, block_samples, places
from pipeline.errors import ConfigError, DataError

MASK = 2**64 - 1


def slow_key(seed: int, *parts: int) -> int:
    key = seed % 2**64
    for part in parts:
        z = ((key ^ part) + 0x9E3779B97F4A7C15) & MASK
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
        key = z ^ (z >> 31)
    return key


def slow_permutation(size: int, key: int) -> list[int]:
    """Where each of 0..size-1 goes."""
    return [slow_place(x, size, key) for x in range(size)]


def slow_place(x: int, size: int, key: int) -> int:
    """Where x of 0..size-1 goes, in plain integers."""
    a = isqrt(size) + (isqrt(size) ** 2 < size)
    b = ceil(size / a)

    def part(x: int, i: int, below: int) -> int:
        bits = (x + key + i * 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9 & MASK
        bits = (bits ^ (bits >> 32)) * 0x94D049BB133111EB & MASK
        return (bits >> 32) * below >> 32

    while True:
        right, left = divmod(x, a)
        for i in range(0, ROUNDS, 2):
            left = (left + part(right, i, a)) % a
            right = (right + part(left, i + 1, b)) % b
        x = right * a + left
        if x < size:
            return x


@lru_cache(maxsize=64)
def slow_epoch(order: Order, epoch: int) -> tuple[tuple[int, ...], ...]:
    """The sample numbers of each lane in one epoch, made by moving blocks about in a list."""
    n, lanes, size = order.samples, order.lanes, order.block
    blocks = [list(range(start, min(start + size, n))) for start in range(0, n, size)]
    # Place z holds block P(z).
    order_of_blocks = slow_permutation(len(blocks), slow_key(order.seed, BLOCKS, epoch))
    sequence = [number for block in order_of_blocks for number in blocks[block]]
    # Samples of all epochs are dealt to the lanes in turn; that fixes how many each lane gets in this one.
    dealt = Counter(t % lanes for t in range(epoch * n, (epoch + 1) * n))
    result, start = [], 0
    for lane in range(lanes):
        count = dealt[lane]
        result.append(tuple(slow_windows(order, epoch, lane, sequence[start : start + count])))
        start += count
    return tuple(result)


def slow_windows(order: Order, epoch: int, lane: int, numbers: list[int]) -> list[int]:
    count, lanes = len(numbers), order.lanes
    window = max(2, ceil(order.shuffle_blocks / lanes)) * order.block
    windows = max(1, int(count / window + 0.5))
    edges = [0, *((j * lanes + lane + 1) * count // (windows * lanes) for j in range(windows)), count]
    result = []
    for j, (low, high) in enumerate(pairwise(edges)):
        places = slow_permutation(high - low, slow_key(order.seed, WINDOWS, epoch, lane, j)) if high > low else []
        result += [numbers[low + place] for place in places]
    return result


def slow_lane(order: Order, lane: int, epochs: int) -> list[tuple[int, int]]:
    return [(epoch, number) for epoch in range(epochs) for number in slow_epoch(order, epoch)[lane]]


orders = st.builds(
    Order,
    samples=st.one_of(st.integers(1, 400), st.sampled_from([1, 2, 97, 101, 257, 389])),
    block=st.integers(1, 60),
    lanes=st.integers(1, 17),
    shuffle_blocks=st.integers(1, 64),
    seed=st.integers(-(2**65), 2**65),
)


@given(orders, st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_order_is_the_slow_one_and_each_epoch_holds_every_sample_once(order: Order, epochs: int):
    total = epochs * order.samples
    seen: list[tuple[int, int]] = []
    for lane in range(order.lanes):
        expected = slow_lane(order, lane, epochs)
        positions = np.arange(len(expected))
        got = order.at(np.full_like(positions, lane), positions)
        assert list(zip(*(column.tolist() for column in got))) == expected
        seen += expected
    assert sorted(seen) == [(epoch, number) for epoch in range(epochs) for number in range(order.samples)]
    assert len(seen) == total


def slow_about(order: Order, epoch: int, number: int) -> tuple[int, int, int]:
    """The lane of a sample in an epoch, its lane position, and the samples that the lane has of that epoch."""
    for lane in range(order.lanes):
        numbers = slow_epoch(order, epoch)[lane]
        if number in numbers:
            before = sum(len(slow_epoch(order, earlier)[lane]) for earlier in range(epoch))
            return lane, before + numbers.index(number), len(numbers)
    raise AssertionError


@given(orders, st.integers(0, 2), st.data())
@settings(max_examples=150, deadline=None)
def test_where_a_sample_comes_is_known_to_within_a_window(order: Order, epoch: int, data):
    number = data.draw(st.integers(0, order.samples - 1))
    lane, position, count = slow_about(order, epoch, number)
    found, about = order.about(epoch, number)
    window = order.window_blocks * order.block
    longest = ceil(count / max(1, int(count / window + 0.5)))  # of the windows that the lane has in this epoch
    assert found == lane and abs(about - position) < longest


@given(orders, st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_before_windows_are_shuffled_a_sample_comes_just_where_it_is_said(order: Order, epoch: int):
    """All samples of an epoch are said to come at places of their own, each lane's without a gap."""
    said = sorted(order.about(epoch, number) for number in range(order.samples))
    expected = []
    for lane in range(order.lanes):
        before = sum(len(slow_epoch(order, earlier)[lane]) for earlier in range(epoch))
        expected += [(lane, before + place) for place in range(len(slow_epoch(order, epoch)[lane]))]
    assert said == expected


@given(orders, st.integers(1, 4), st.integers(1, 5), st.integers(0, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_rows_are_lanes_side_by_side_at_every_split(order: Order, depth: int, step_count: int, first: int, data):
    """Whatever the micro batch and whoever asks, row i of a step is the same position of the same lane."""
    batch = depth * order.lanes
    divisors = [m for m in range(1, batch + 1) if batch % m == 0]
    for step in range(first, first + step_count):
        plain = [order.sample(i // depth, step * depth + i % depth) for i in range(batch)]
        for micro in {1, batch, data.draw(st.sampled_from(divisors))}:
            rows = [order.rows(step, j, batch, micro) for j in range(batch // micro)]
            assert all(numbers.dtype == np.int64 and len(numbers) == micro for _, numbers in rows)
            assert [(int(e), int(x)) for epochs, numbers in rows for e, x in zip(epochs, numbers)] == plain


@given(orders, st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_steps_in_a_row_lose_nothing_and_repeat_nothing(order: Order, depth: int):
    """No sample of an epoch comes twice, and when the epoch is over all have come."""
    batch = depth * order.lanes
    steps = 2 * order.samples // batch + 2
    pairs = Counter(
        (int(epoch), int(number)) for step in range(steps) for epoch, number in zip(*order.rows(step, 0, batch, batch))
    )
    assert set(pairs.values()) == {1}
    assert all(pairs[epoch, number] == 1 for epoch in range(2) for number in range(order.samples))


@given(st.integers(1, 10**10), st.integers(1, 5000), st.integers(1, 64), st.integers(0, 10**9))
@settings(max_examples=100, deadline=None)
def test_any_step_of_any_size_is_found_at_once(samples: int, block: int, lanes: int, step: int):
    order = Order(samples, block, lanes, 64, seed=7)
    epochs, numbers = order.rows(step, 0, 4 * lanes, 4 * lanes)
    assert ((numbers >= 0) & (numbers < samples)).all()
    assert len({*zip(epochs.tolist(), numbers.tolist())}) == 4 * lanes
    first = 4 * lanes * step
    assert set(epochs.tolist()) <= set(range(first // samples, (first + 4 * lanes - 1) // samples + 1))


def test_rows_of_several_data_sets_in_one_call_are_those_of_each():
    several = [Order(n, block, 5, 16, seed=3) for n, block in ((1003, 10), (2, 1), (1003, 7), (97, 200))]
    turn, position = np.tile(np.arange(4), 250), np.repeat(np.arange(250), 4)
    lane = position % 5
    samples, block = (np.array([getattr(order, name) for order in several]) for name in ("samples", "block"))
    epochs, numbers = places(samples[turn], block[turn], 5, several[0].window_blocks, 3, lane, position)
    for i, order in enumerate(several):
        alone = order.at(lane[turn == i], position[turn == i])
        assert [epochs[turn == i].tolist(), numbers[turn == i].tolist()] == [column.tolist() for column in alone]


def test_epochs_windows_and_seeds_differ():
    order = Order(samples=1000, block=10, lanes=2, shuffle_blocks=8, seed=0)
    first, second = (list(slow_epoch(order, epoch)[0]) for epoch in range(2))
    assert first != second
    other = Order(samples=1000, block=10, lanes=2, shuffle_blocks=8, seed=1)
    assert list(slow_epoch(other, 0)[0]) != first
    windows = [first[i : i + 40] for i in range(0, 400, 40)]
    assert all(sorted(window) != window for window in windows)


def test_small_permutations_are_even():
    """Each of the 24 orders of four blocks comes about equally often (chi-square, 23 degrees of freedom, p = 1e-6)."""
    order = Order(samples=4, block=1, lanes=1, shuffle_blocks=1, seed=3)
    epochs = 4800
    _, numbers = order.at(np.zeros(4 * epochs, np.int64), np.arange(4 * epochs))
    counts = Counter(map(tuple, numbers.reshape(epochs, 4).tolist()))
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 72


def test_the_order_of_a_seed_never_changes():
    """These numbers are in every checkpoint's future: if they differ, raise VERSION and keep the old arithmetic."""
    order = Order(samples=1003, block=10, lanes=4, shuffle_blocks=16, seed=42)
    assert [order.sample(lane, 600) for lane in range(4)] == [(2, 722), (2, 978), (2, 632), (2, 22)]
    big = Order(samples=10**10, block=512, lanes=64, shuffle_blocks=64, seed=1)
    epochs, numbers = big.rows(10**9, 63, 256, 4)
    assert (epochs.tolist(), numbers.tolist()) == ([25, 25, 25, 25], [6178104049, 4227084951, 6178104180, 4227085168])


def test_fingerprint_is_json_and_tells_orders_apart():
    order = Order(samples=100, block=10, lanes=4, shuffle_blocks=64, seed=1)
    assert json.loads(json.dumps(order.fingerprint)) == order.fingerprint
    others = [
        Order(101, 10, 4, 64, 1),
        Order(100, 11, 4, 64, 1),
        Order(100, 10, 5, 64, 1),
        Order(100, 10, 4, 68, 1),
        Order(100, 10, 4, 64, 2),
    ]
    assert all(other.fingerprint != order.fingerprint for other in others)
    same = Order(100, 10, 4, 63, 1)  # 63 and 64 blocks over 4 lanes are windows of 16 each
    assert same.fingerprint == order.fingerprint
    assert same.rows(3, 0, 16, 16)[1].tolist() == order.rows(3, 0, 16, 16)[1].tolist()


def test_block_samples():
    assert block_samples(samples=1000, data_bytes=1_000_000, block_bytes=1 << 20) == 1048
    assert block_samples(samples=10, data_bytes=1 << 30, block_bytes=1 << 20) == 1


@pytest.mark.parametrize("wrong", [{"block": 0}, {"lanes": 0}, {"shuffle_blocks": 0}])
def test_impossible_numbers_are_refused(wrong: dict[str, int]):
    name = next(iter(wrong))
    with pytest.raises(ConfigError, match=name):
        Order(**{"samples": 10, "block": 1, "lanes": 1, "shuffle_blocks": 1, "seed": 0, **wrong})


def test_impossible_batches_are_refused():
    with pytest.raises(DataError, match="no samples"):
        Order(samples=0, block=1, lanes=1, shuffle_blocks=1, seed=0)
    order = Order(samples=10, block=1, lanes=3, shuffle_blocks=1, seed=0)
    with pytest.raises(ConfigError, match=r"3 lanes .* divide the global batch of 8"):
        order.rows(0, 0, 8, 4)
    with pytest.raises(ConfigError, match="micro batches of 4"):
        order.rows(0, 0, 9, 4)
    with pytest.raises(IndexError):
        order.rows(0, 3, 9, 3)
    with pytest.raises(ConfigError, match="overflow"):
        Order(samples=2**40, block=1, lanes=1, shuffle_blocks=1, seed=0)
