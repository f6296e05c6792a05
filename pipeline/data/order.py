"""Which sample stands in which row of which micro batch: pure arithmetic, no list of samples, no state.

Way of a number: (step, row) -> (lane, lane position) -> epoch and place inside the lane -> place in the permuted epoch
-> block and offset -> sample number. Blocks of consecutive samples are permuted, the permuted epoch is cut into lanes,
and samples are permuted inside windows of a few blocks of a lane: reading stays sequential by block, one lane needs
one window of blocks at a time. Epochs are joined end to end in every lane, so each sample comes exactly once per
epoch, all ranks have equal steps, and any step is found at once. World size, threads and prefetching are not in the
formulas.

Permutations are keyed bijections, computed and never stored: a generalised Feistel network with cycle walking (Black
and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, section 5) whose round function is the core of
SplitMix64's output function (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014).

What it gives up: a shuffle within windows is not a shuffle of everything. Samples that lie together in the shards come
within one window of each other, so shards should be shuffled when they are packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.errors import ConfigError, DataError

VERSION = 1  # of the arithmetic: another value would mean another order for the same numbers
ROUNDS = 12  # of the Feistel network: with 8, some orders of six blocks came 1.4 times as often as others
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: SplitMix64's increment, and below its two multipliers
MULTIPLIER_1, MULTIPLIER_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
STEPS = np.arange(ROUNDS, dtype=np.uint64)[:, None] * GOLDEN  # uint64[ROUNDS, 1]: what tells the rounds' keys apart
HALF = np.uint64(32)
BLOCKS, WINDOWS = 1, 2  # what a key is for


def block_samples(samples: int, data_bytes: int, block_bytes: int) -> int:
    """Samples in a block of about `block_bytes` bytes, at least 1, for `samples` samples in `data_bytes` bytes."""
    return max(1, block_bytes * samples // max(1, data_bytes))


@dataclass(frozen=True)
class Order:
    """The order of `samples` samples, for ever.

    samples: n, in the data set.  block: B, consecutive samples in a block.  lanes: L, independent streams; must divide
    the global batch.  shuffle_blocks: blocks shuffled together, over all lanes.  seed: any integer.

    Raises DataError for an empty data set, ConfigError for numbers that cannot work.
    """

    samples: int
    block: int
    lanes: int
    shuffle_blocks: int
    seed: int

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise DataError("the data set has no samples: pack or index another folder")
        for name in ("block", "lanes", "shuffle_blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"order: {name} is {getattr(self, name)}, must be at least 1")
        longest = -(-self.samples // self.lanes)
        windows = longest // (self.window_blocks * self.block) + 2
        if (windows * self.lanes + self.lanes) * longest >= 2**63:
            raise ConfigError(
                f"order: {self.samples} samples in windows of {self.window_blocks} blocks of {self.block} overflow "
                "64-bit arithmetic: raise data.block_bytes or data.shuffle_blocks"
            )

    @property
    def window_blocks(self) -> int:
        """w, blocks in one window of one lane."""
        return max(2, -(-self.shuffle_blocks // self.lanes))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """All that the order follows from, apart from the data themselves; equal fingerprints mean equal orders."""
        return {
            "version": VERSION,
            "samples": self.samples,
            "block": self.block,
            "lanes": self.lanes,
            "window_blocks": self.window_blocks,
            "seed": self.seed,
        }

    def rows(self, step: int, j: int, global_batch: int, micro_batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and sample numbers, int64[micro_batch] each, of micro batch j of a step.

        Row i of the global batch is lane i // (G/L), lane position step * (G/L) + i % (G/L); micro batch j holds rows
        [j * m, (j + 1) * m). Raises ConfigError when lanes or micro batch do not divide the global batch.
        """
        if global_batch % self.lanes or global_batch % micro_batch:
            raise ConfigError(
                f"order: {self.lanes} lanes and micro batches of {micro_batch} must both divide the global batch of "
                f"{global_batch}: change data.lanes, micro_batch_size or global_batch_size"
            )
        if step < 0 or not 0 <= j < global_batch // micro_batch:
            raise IndexError(f"no micro batch {j} in step {step}: {global_batch // micro_batch} per step, from 0")
        depth = global_batch // self.lanes  # rows that a lane gives to each step
        row = np.arange(j * micro_batch, (j + 1) * micro_batch, dtype=np.int64)
        return self.at(row // depth, step * depth + row % depth)

    def sample(self, lane: int, position: int) -> tuple[int, int]:
        """Epoch and sample number at one position (from 0) of one lane."""
        epochs, numbers = self.at(np.array([lane], np.int64), np.array([position], np.int64))
        return int(epochs[0]), int(numbers[0])

    def about(self, epoch: int, number: int) -> tuple[int, int]:
        """The lane that has a sample in an epoch, and the lane position to within a window: `sample` the other way."""
        n, blocks = self.samples, -(-self.samples // self.block)
        key, q = _last_block(self.seed, blocks, epoch)
        block, short = number // self.block, n - (blocks - 1) * self.block
        rank = int(_unpermute(np.array([block]), np.array([blocks]), np.array([key]))[0])
        place = rank * self.block - (self.block - short if rank > q else 0) + number % self.block
        starts = np.arange(self.lanes, dtype=np.int64)
        starts = _before((epoch + 1) * n, starts, self.lanes) - _before(epoch * n, starts, self.lanes)
        lane = int(starts.searchsorted(place, "right")) - 1
        return lane, (epoch * n + self.lanes - 1 - lane) // self.lanes + place - int(starts[lane])

    def at(self, lane: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and sample numbers, int64[k] each, at positions int64[k] of lanes int64[k]."""
        return places(
            np.array([self.samples]), np.array([self.block]), self.lanes, self.window_blocks, self.seed, lane, position
        )


def places(
    samples: np.ndarray,
    block: np.ndarray,
    lanes: int,
    window_blocks: int,
    seed: int,
    lane: np.ndarray,
    position: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """`Order.at` where every row may be of another data set: int64[k] each but for the three that orders share.

    `samples` and `block` are int64[1] when all rows are of one data set; dividing by one number is much faster.
    """
    epoch = (position * lanes + lane) // samples
    first = (epoch * samples + lanes - 1 - lane) // lanes  # the lane's first position in this epoch
    count = ((epoch + 1) * samples + lanes - 1 - lane) // lanes - first
    start = _before((epoch + 1) * samples, lane, lanes) - _before(epoch * samples, lane, lanes)
    place = start + _shuffled(window_blocks * block, lanes, seed, epoch, lane, position - first, count)
    return epoch, _number(samples, block, seed, epoch, place)


def _shuffled(
    size: np.ndarray,
    lanes: int,
    seed: int,
    epoch: np.ndarray,
    lane: np.ndarray,
    offset: np.ndarray,
    count: np.ndarray,
) -> np.ndarray:
    """Offsets in a lane of `count` samples after each of its windows, of about `size` samples, is permuted.

    The edges are 0, floor((i * L + lane + 1) * count / (W * L)) for i in 0..W-1, and count: staggered from lane to
    lane, so that lanes do not come to new blocks all at once.
    """
    windows = np.maximum(1, (2 * count + size) // (2 * size))  # W = count / size, rounded
    edges = windows * lanes
    # How many edges are <= offset, without the first: edge i is, when i*L + lane + 1 < (offset + 1) * W*L / count.
    window = (-(-(offset + 1) * edges // count) - 2 - lane) // lanes + 1
    low = np.maximum(0, ((window - 1) * lanes + lane + 1) * count // edges)
    high = np.minimum(count, (window * lanes + lane + 1) * count // edges)
    return low + permute(offset - low, high - low, key_of(seed, WINDOWS, epoch, lane, window))


def _number(samples: np.ndarray, block: np.ndarray, seed: int, epoch: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Sample numbers at places of the permuted epoch. Only the last block may be short; its new place is q."""
    blocks = -(-samples // block)
    short = samples - (blocks - 1) * block
    which, key, q = _last_blocks(seed, blocks, epoch)
    after = place >= q * block + short
    rank = np.where(after, (place - short) // block + 1, np.minimum(place // block, q))
    start = np.where(after, (rank - 1) * block + short, rank * block)
    # Rows that lie near each other are of a few blocks, which are permuted once each.
    order, first = grouped(which * blocks.max() + rank)
    of = order[first]
    moved = permute(rank[of], np.broadcast_to(blocks, rank.shape)[of], key[of])
    blocks_of = np.empty_like(place)  # int64[k], the block that each row is in
    blocks_of[order] = np.repeat(moved, np.diff(first, append=len(order)))
    return blocks_of * block + place - start


def grouped(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order int64[k] that sorts values of 0 or more, and from where in it each distinct one comes, first 0."""
    small = values.size and values.max() < 2**16  # numpy sorts 16 bits by radix, several times faster
    order = np.argsort(values.astype(np.uint16) if small else values, kind="stable")
    ordered = values[order]
    return order, np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(order)])


def _last_blocks(seed: int, blocks: np.ndarray, epoch: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The number of each row's pair of `blocks` and `epoch`, and `_last_block` of it, looked up once for each pair."""
    if not epoch.size or ((blocks[0] == blocks).all() and (epoch[0] == epoch).all()):
        found = [_last_block(seed, int(blocks[0]), int(epoch[0]))] if epoch.size else []
        back = np.zeros_like(epoch)
    else:
        blocks, epoch = np.broadcast_arrays(blocks, epoch)
        pairs, back = np.unique(np.stack([blocks, epoch]), axis=1, return_inverse=True)
        found = [_last_block(seed, int(pair[0]), int(pair[1])) for pair in pairs.T]
    key, q = np.array([key for key, _ in found], np.uint64), np.array([q for _, q in found], np.int64)
    return back, key[back], q[back]


@lru_cache(maxsize=1024)  # only to save time: a micro batch needs one or two epochs, again and again
def _last_block(seed: int, blocks: int, epoch: int) -> tuple[np.uint64, int]:
    """The key of an epoch's permutation of blocks, and the new place q of the last block."""
    key = key_of(seed, BLOCKS, np.array([epoch]))
    return key[0], int(_unpermute(np.array([blocks - 1]), np.array([blocks]), key)[0])


def _before(total: np.ndarray | int, lane: np.ndarray, lanes: int) -> np.ndarray:
    """How many of the first `total` samples, dealt to the lanes in turn, went to lanes below `lane`."""
    return lane * (total // lanes) + np.minimum(lane, total % lanes)


def permute(x: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A keyed bijection of [0, size), elementwise: int64[k], int64[k], uint64[k] -> int64[k]."""
    return _walk(_encrypt, x, size, key)


def _unpermute(y: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The inverse of `permute`."""
    return _walk(_decrypt, y, size, key)


def _walk(cipher: Any, x: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Cycle walking: the cipher permutes a rectangle a*b >= size; go on until the value lies inside [0, size)."""
    unsigned = size.astype(np.uint64)
    a = np.ceil(np.sqrt(unsigned)).astype(np.uint64)  # IEEE square root: the same on every machine
    b = (unsigned + a - np.uint64(1)) // a
    y = cipher(x.astype(np.uint64), a, b, key)
    outside = np.flatnonzero(y >= unsigned)
    if outside.size:
        unsigned, a, b, key = (np.broadcast_to(each, y.shape) for each in (unsigned, a, b, key))
    while outside.size:
        y[outside] = cipher(y[outside], a[outside], b[outside], key[outside])
        outside = outside[y[outside] >= unsigned[outside]]
    return y.astype(np.int64)


def _encrypt(x: np.ndarray, a: np.ndarray, b: np.ndarray, key: np.ndarray) -> np.ndarray:
    right, left = np.divmod(x, a)
    keys = key + STEPS
    for i in range(0, ROUNDS, 2):
        left += _round(right, keys[i], a)
        _wrap(left, a)
        right += _round(left, keys[i + 1], b)
        _wrap(right, b)
    return right * a + left


def _decrypt(y: np.ndarray, a: np.ndarray, b: np.ndarray, key: np.ndarray) -> np.ndarray:
    right, left = np.divmod(y, a)
    keys = key + STEPS
    for i in range(ROUNDS - 2, -1, -2):
        right += b - _round(left, keys[i + 1], b)
        _wrap(right, b)
        left += a - _round(right, keys[i], a)
        _wrap(left, a)
    return right * a + left


def _wrap(x: np.ndarray, size: np.ndarray) -> None:
    """x modulo `size` in place, x being below twice that: below zero unsigned numbers are large. Division is slow."""
    np.minimum(x, x - size, out=x)


def _round(x: np.ndarray, key: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Pseudo-random values in [0, below), below < 2**32: multiply, xor-shift, multiply, scale the upper half."""
    bits = x + key
    bits *= MULTIPLIER_1
    bits ^= bits >> HALF
    bits *= MULTIPLIER_2
    bits >>= HALF
    bits *= below
    bits >>= HALF
    return bits


def key_of(seed: int, purpose: int, *parts: np.ndarray) -> np.ndarray:
    """uint64[k] keys from the seed, what they are for, and int64[k] numbers: each is absorbed by a SplitMix64 step."""
    key = np.array([seed % 2**64], np.uint64)
    for part in (np.array([purpose]), *parts):
        z = (key ^ part.astype(np.uint64)) + GOLDEN
        z = (z ^ (z >> np.uint64(30))) * MULTIPLIER_1
        z = (z ^ (z >> np.uint64(27))) * MULTIPLIER_2
        key = z ^ (z >> np.uint64(31))
    return key
