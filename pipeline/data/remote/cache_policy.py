"""What of a remote data set is fetched when, in which pieces, and what a full cache lets go of: arithmetic, no reading.

A **piece** is what one block of the order has in one shard: the bytes from the first field of its first sample to the
last of its last, rounded out to whole pages. It is fetched by one request, is one file of the cache, and is named by a
number that follows from sample numbers alone (`Pieces`), so nothing has to be read to know what will be needed.

**Ahead** goes along the coming micro batches of a worker and asks for pieces in the order of their first use, until
`most` bytes of them are waiting to be used. A window of the order is needed almost at once when a lane comes to it, so
the best is to have the next window while this one is read: that is `ahead_bytes`, where the cache has room for both.

**Eviction** follows the known future (Belady, "A study of replacement algorithms", IBM Systems Journal 1966): each
piece is in one window of an epoch, so when it is read out the time of its next use can be computed, and what is needed
last goes first. A piece whose time is over and that nobody asked for is of a job that has ended or is late: the longer
it is overdue, the less it is worth.

What it gives up: times of use are estimates (the pace of the last steps); they decide only what is fetched twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np

BLOCK_BYTES = 4 << 20  # of a block of a remote data set, on average: smaller requests are ruled by latency
IN_FLIGHT = 16  # requests of one worker
SMALL_IN_FLIGHT = 4 * IN_FLIGHT  # requests that are ruled by latency: indexes, looks at a tar, single samples
BY_THEMSELVES = 4  # one in so many samples of a piece, or fewer: those of the first step come before it
LEAST_AHEAD = 2 * IN_FLIGHT  # pieces: so many are under way, and as many wait to be used
SCATTERED = 1.5  # times its bytes that the blocks of a tar would be: its members are not in the order of its samples
FILLED = 0.95  # of the cache, after eviction
NEVER = float("inf")  # the time of a next use that will not come


class Pieces:
    """The pieces of a data set. starts: int64[shards + 1], number of the first sample of each.  block: samples."""

    def __init__(self, starts: np.ndarray, block: int) -> None:
        self.starts, self.block = starts, block
        self._firsts = starts[:-1] // block + np.arange(len(starts) - 1)  # number of the first piece of each shard

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """int64[k], the pieces of samples int64[k]. It grows from block to block and from shard to shard."""
        return numbers // self.block + self.starts.searchsorted(numbers, "right") - 1

    def rows(self, piece: int) -> tuple[int, int, int]:
        """Shard, first row in it, and the row after the last."""
        shard = int(self._firsts.searchsorted(piece, "right")) - 1
        first, start, end = (piece - shard) * self.block, int(self.starts[shard]), int(self.starts[shard + 1])
        return shard, max(first, start) - start, min(first + self.block, end) - start

    def block_in(self, piece: int) -> int:
        """Which it is, from 0, of the pieces of its shard."""
        return piece - int(self._firsts[int(self._firsts.searchsorted(piece, "right")) - 1])

    def first_sample(self, piece: int) -> int:
        """The number of its first sample."""
        shard, row, _ = self.rows(piece)
        return int(self.starts[shard]) + row


def extent(begin: int, end: int, tar_bytes: int, page: int) -> tuple[int, int]:
    """The bytes that are fetched for fields between two bytes of a tar: whole pages, so that files can be mapped."""
    return begin // page * page, min(-(-end // page) * page, tar_bytes)


def by_themselves(wanted: int, samples: int) -> bool:
    """Whether samples that the first step wants are fetched before the piece that has them, and again with it."""
    return BY_THEMSELVES * wanted <= samples


def is_scattered(begins: np.ndarray, ends: np.ndarray, tar_bytes: int) -> bool:
    """Whether the blocks of a tar, int64[k] each, overlap so much that the whole tar is fetched as one piece."""
    return int((ends - begins).sum()) > SCATTERED * tar_bytes


def least_bytes(window_bytes: int, block_bytes: int) -> int:
    """What a cache must hold for one worker: the windows of its lanes, and what is under way."""
    return window_bytes + LEAST_AHEAD * block_bytes


def ahead_bytes(window_bytes: int, block_bytes: int, share: int) -> int:
    """What a worker asks for before it is used, with a `share` of the cache in bytes."""
    return max(LEAST_AHEAD * block_bytes, min(window_bytes, share - window_bytes))


class Ahead:
    """Which pieces of a worker are asked for next, and which are used up. Turns are its micro batches, from 0.

    most: bytes that may wait for their first use.  planned: turns so far.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._last: dict[int, int] = {}  # piece -> last turn known to need it
        self._first: deque[tuple[int, int]] = deque()  # (turn, bytes) of first uses that are still to come
        self._needed: deque[list[int]] = deque()  # pieces of each turn that has not passed
        self._waiting, self.planned, self._passed = 0, 0, 0

    @property
    def has_room(self) -> bool:
        """Whether the next turn shall be planned."""
        return self._waiting < self.most

    def plan(self, needed: Mapping[int, int]) -> list[int]:
        """The next turn needs these pieces (-> about their bytes): those of them that are to be asked for now."""
        turn, new = self.planned, []
        for piece, size in needed.items():
            if piece not in self._last:
                new.append(piece)
                self._first.append((turn, size))
                self._waiting += size
            self._last[piece] = turn
        self._needed.append([*needed])
        self.planned += 1
        return new

    def take(self, turn: int) -> None:
        """A turn is being read: its pieces wait no more."""
        while self._first and self._first[0][0] <= turn:
            self._waiting -= self._first.popleft()[1]

    def passed(self, turns: int) -> list[int]:
        """The first `turns` turns are over: the pieces that no planned one needs any more."""
        over = []
        while self._passed < min(turns, self.planned):
            for piece in self._needed.popleft():
                if self._last.get(piece) == self._passed:
                    del self._last[piece]
                    over.append(piece)
            self._passed += 1
        return over


def evicted(next_uses: np.ndarray, sizes: np.ndarray, now: float, too_much: int) -> np.ndarray:
    """Which files go, the least useful first, so that `too_much` bytes are free.

    next_uses: float64[k], times of their next use in the unit of `now`, NEVER included.  sizes: int64[k], bytes.
    """
    order = np.argsort(-np.abs(next_uses - now), kind="stable")
    return order[: int(np.searchsorted(np.cumsum(sizes[order]), too_much)) + 1] if too_much > 0 else order[:0]
