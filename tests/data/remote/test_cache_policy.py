"""What is fetched when, and what goes: against plain lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.remote.cache_policy import (
    NEVER,
    Ahead,
    Pieces,
    ahead_bytes,
    evicted,
    extent,
    is_scattered,
    least_bytes,
)


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 12))
def test_pieces_are_what_blocks_have_in_shards(samples: list[int], block: int) -> None:
    starts = np.concatenate([[0], np.cumsum(samples)])
    pieces = Pieces(starts, block)
    pairs = [(number // block, shard) for shard, count in enumerate(samples) for number in _run(starts[shard], count)]
    found = pieces.of(np.arange(len(pairs)))
    assert len(set(found.tolist())) == len(set(pairs)) and (np.diff(found) >= 0).all()
    for piece in set(found.tolist()):
        shard, first, end = pieces.rows(piece)
        mine = [number for number in range(len(pairs)) if found[number] == piece]
        assert [number - starts[shard] for number in mine] == list(range(first, end))
        assert pieces.first_sample(piece) == mine[0] and {pairs[number][1] for number in mine} == {shard}


def _run(start: int, count: int) -> range:
    return range(int(start), int(start) + count)


def test_extents_are_whole_pages() -> None:
    assert extent(5000, 9000, 100_000, 4096) == (4096, 12288)
    assert extent(4096, 8192, 100_000, 4096) == (4096, 8192)
    assert extent(98_000, 99_000, 99_500, 4096) == (94_208, 99_500)
    begins = np.array([0, 100, 200])
    assert not is_scattered(begins, begins + 100, 300)
    assert is_scattered(begins, begins + 300, 500)


@settings(deadline=None)
@given(
    turns=st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=4), max_size=30),
    most=st.integers(1, 50),
    size=st.integers(1, 9),
)
def test_asked_once_in_order_and_given_up_after_the_last_use(turns: list[list[int]], most: int, size: int) -> None:
    ahead, taken, held, waiting = Ahead(most), 0, set(), []
    planned = 0
    while taken < len(turns):
        while planned < len(turns) and (ahead.has_room or planned == taken):
            assert ahead.has_room == (len(waiting) * size < most)
            new = ahead.plan(dict.fromkeys(turns[planned], size))
            assert new == [piece for piece in dict.fromkeys(turns[planned]) if piece not in held]
            held |= {*new}
            waiting += [planned] * len(new)
            planned += 1
        assert {*turns[taken]} <= held
        ahead.take(taken)
        waiting = [turn for turn in waiting if turn > taken]
        taken += 1
        over = {*ahead.passed(taken)}
        assert over == held - {piece for turn in turns[taken:planned] for piece in turn}
        held -= over
    assert not held


def test_ahead_is_a_window_where_the_cache_has_room() -> None:
    block = 10
    assert ahead_bytes(1000, block, 5000) == 1000  # the next window, while this one is read
    assert ahead_bytes(1000, block, 1600) == 600
    assert ahead_bytes(1000, block, least_bytes(1000, block)) == least_bytes(1000, block) - 1000 == 320
    assert ahead_bytes(100, block, 5000) == 320  # never fewer than keep the requests in flight


def test_what_is_needed_last_goes_first() -> None:
    uses, sizes = np.array([5.0, NEVER, 30.0, -40.0, 11.0]), np.array([10, 10, 10, 10, 10])
    assert evicted(uses, sizes, 10.0, 0).tolist() == []
    assert evicted(uses, sizes, 10.0, 25).tolist() == [1, 3, 2]
    assert evicted(uses, sizes, 10.0, 20).tolist() == [1, 3]
    assert sorted(evicted(uses, sizes, 10.0, 50)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("capacity", [12, 24])
def test_the_known_future_beats_the_recent_past(capacity: int) -> None:
    """Epochs in changing orders over 40 pieces: hits of this policy, and of the least recently used."""
    rng = np.random.default_rng(1)
    uses = np.concatenate([rng.permutation(40) for _ in range(30)]).tolist()
    ours, recent = _hits(uses, capacity, known=True), _hits(uses, capacity, known=False)
    assert ours > 1.3 * recent


def _hits(uses: list[int], capacity: int, known: bool) -> int:
    held: dict[int, float] = {}
    hits = 0
    for now, piece in enumerate(uses):
        hits += piece in held
        later = next((at for at in range(now + 1, len(uses)) if uses[at] == piece), NEVER)
        held.pop(piece, None)
        held[piece] = later
        if len(held) > capacity:
            names = list(held)
            gone = evicted(np.array([held[name] for name in names]), np.ones(len(names), np.int64), float(now), 1)
            held.pop(names[gone[0]] if known else names[0])
    return hits
