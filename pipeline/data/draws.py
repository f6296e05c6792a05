"""Which source each sample of a lane comes from, in a mixture by weight: pure arithmetic, no state.

Every lane has a draw sequence of its own, in blocks of D draws that hold exactly counts[s] draws of source s. D is
4,096, doubled until each share is within 1 % of the one that was asked for; remainders go to the largest.

Order inside a block: its D tickets, which lie sorted by source, are dealt to D / 1,024 hands in turn (in van der
Corput's order, Niederreiter 1992, section 3.1, begun elsewhere in each block and lane), and each hand is shuffled by
the keyed bijection of order.py. So each hand holds each source's share to within a few tickets, a rare source comes
evenly over the block, and how often a source came in the hands before is known without looking at them.

The i-th draw of a source is the source's i-th lane position, in true order: reading a source stays sequential and
needs one window of blocks per lane, as without a mixture. That takes a table of a hand (6 KiB, 0.3 ms), whatever D
is; a table of a block of 2^20 draws in each of 64 lanes would be 400 MB and half a minute. The last 4,096 are kept.

What it gives up: draws are not independent of each other. Shares are exact in every block, which is what is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import numpy as np

from pipeline.data.order import key_of, permute
from pipeline.errors import ConfigError

DRAWS, MOST_DRAWS = 4096, 1 << 20  # in a block: at least and at most
HAND = 1024  # draws that are shuffled together; divides DRAWS
TOLERANCE = Fraction(1, 100)  # of a share, relative
HANDS, DEALS = 3, 4  # what a key is for, beside order.py's


def resolve(weights: Mapping[str, float]) -> tuple[int, ...]:
    """Draws of each source in a block, whose sum is D: name -> weight, any scale; weight 0 is never drawn.

    Raises ConfigError for weights that are no weights, or so small that 2^20 draws do not meet them within 1 %.
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"order: the weight of {name} is {weight}, must be a number from 0 up")
    total = sum(map(Fraction, weights.values()))
    if not total:
        raise ConfigError("order: no source has a weight above 0; give one to at least one source")
    shares = [Fraction(weight) / total for weight in weights.values()]
    draws = DRAWS
    while True:
        counts = _largest_remainders(shares, draws)
        off = [abs(count - share * draws) > TOLERANCE * share * draws for count, share in zip(counts, shares)]
        if not any(off):
            return counts
        if draws == MOST_DRAWS:
            break
        draws *= 2
    found = zip(weights.items(), shares, counts, off)
    wrong = [
        f"{name} (weight {weight:g}) asks for {float(share * draws):.2f} and would get {count}"
        for (name, weight), share, count, bad in found
        if bad
    ]
    raise ConfigError(
        f"order: of {draws:,} draws, the most that a block can have, {'; '.join(wrong)}, more than 1 % off: raise such "
        f"weights to at least {100 / draws:.1e} of their sum, or leave the sources out"
    )


def _largest_remainders(shares: list[Fraction], draws: int) -> tuple[int, ...]:
    counts = [math.floor(share * draws) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda s: counts[s] - shares[s] * draws)  # ties: the first one
    for s in by_remainder[: draws - sum(counts)]:
        counts[s] += 1
    return tuple(counts)


def drawn(counts: tuple[int, ...], seed: int, lane: np.ndarray, draw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(source, i): draw int64[k] of lane int64[k] is the i-th draw, from 0, of that source in that lane."""
    if max(counts) == sum(counts):
        return np.full_like(draw, counts.index(max(counts))), draw
    hand, place = np.divmod(draw, HAND)
    source, rank = np.empty_like(draw), np.empty_like(draw)
    turns = np.flatnonzero((np.diff(hand) != 0) | (np.diff(lane) != 0)) + 1
    for low, high in pairwise([0, *turns.tolist(), len(draw)]):
        sources, ranks = _hand(counts, seed, int(lane[low]), int(hand[low]))
        source[low:high], rank[low:high] = sources[place[low:high]], ranks[place[low:high]]
    return source, draw // sum(counts) * np.array(counts)[source] + rank


def drawn_before(counts: tuple[int, ...], seed: int, lane: int, draws: int) -> np.ndarray:
    """int64[S]: how often each source comes among the first `draws` draws of a lane."""
    if max(counts) == sum(counts):
        return np.array(counts) // sum(counts) * draws
    block, hand = draws // sum(counts), draws // HAND
    sources, _ = _hand(counts, seed, lane, hand)
    inside = np.bincount(sources[: draws % HAND], minlength=len(counts))
    return block * np.array(counts) + _in_hands_before(counts, seed, lane, hand) + inside


@lru_cache(maxsize=4096)  # a step needs one hand of each lane, again and again; 25 MB when full
def _hand(counts: tuple[int, ...], seed: int, lane: int, hand: int) -> tuple[np.ndarray, np.ndarray]:
    """(sources uint16[1024], ranks int32[1024]) of one hand, hands being counted through all blocks of a lane.

    A rank says how many draws of the same source came before, in this block.
    """
    hands, key = sum(counts) // HAND, key_of(seed, HANDS, np.array([lane]), np.array([hand]))
    card = permute(np.arange(HAND), np.full(HAND, HAND), np.repeat(key, HAND))
    ticket = card * hands + _reversed(hand % hands ^ _turn(seed, lane, hand // hands, hands), hands)
    source = np.searchsorted(np.cumsum(counts), ticket, side="right")
    by_source = np.argsort(source, kind="stable")
    inside = np.bincount(source, minlength=len(counts))
    rank = np.empty(HAND, np.int64)
    rank[by_source] = np.arange(HAND) - np.repeat(np.cumsum(inside) - inside, inside)
    rank += _in_hands_before(counts, seed, lane, hand)[source]
    return source.astype(np.uint16), rank.astype(np.int32)


def _in_hands_before(counts: tuple[int, ...], seed: int, lane: int, hand: int) -> np.ndarray:
    """int64[S]: tickets of each source in the hands of the same block that come before this one.

    Ticket v goes to hand reversed(v mod K) ^ turn. The hands below h fall, by the bits of h that are 1, into ranges
    with the same upper bits; the tickets of such a range are those with certain lower bits.
    """
    hands = sum(counts) // HAND
    turn, h = _turn(seed, lane, hand // hands, hands), hand % hands
    edges = np.concatenate([[0], np.cumsum(counts)])
    rounds, rest = np.divmod(edges, hands)
    below = rounds * h
    for bit in range(hands.bit_length() - 1):
        if h >> bit & 1:
            step = hands >> bit  # these tickets are `step` apart
            lowest = _reversed((h >> bit ^ 1) ^ turn >> bit, step)
            below += (rest - lowest - 1) // step + 1
    return np.diff(below)


def _turn(seed: int, lane: int, block: int, hands: int) -> int:
    """Where in van der Corput's order the dealing of a block begins."""
    return int(key_of(seed, DEALS, np.array([lane]), np.array([block]))[0]) % hands


def _reversed(x: int, size: int) -> int:
    """x < size with its bits in reversed order; size is a power of two."""
    return int(f"{x:b}".zfill(size.bit_length() - 1)[::-1], 2) if size > 1 else 0
