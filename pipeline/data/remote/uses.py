"""What a node reads of a remote data set, micro batch by micro batch, and how well the order mixes: only arithmetic.

    mixture -> rows of the micro batches of a node -> pieces (cache_policy.py), each with the micro batches that need it

Worker r of R has the micro batches [r * M // R, (r + 1) * M // R) of each step, and the workers of a node stand
together. Nothing is read but the table of shards.

What it gives up: the bytes of a shard are taken to be spread evenly over its samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.data.mixture import Mixture
from pipeline.data.remote.cache_policy import Pieces, by_themselves
from pipeline.data.root import Shards

ROWS = 1 << 18  # of the order that are computed at a time
QUALITY_STEPS = (16, 256)  # that are looked at for the quality of the shuffle: at least, at most
QUALITY_ROWS = 1 << 20  # of the order that are computed for it, about
PAGE = 4096  # bytes, of a file that is mapped
HEADER = 512  # bytes of a tar's member before its data


class Remote:
    """A data set as its table of shards tells of it.

    block: samples of a block of the order.  block_bytes: of one, as a configuration says it.  index_bytes: of a sample
    in its shard's index.
    """

    def __init__(self, shards: Shards, block: int, block_bytes: int, index_bytes: float = 0.0) -> None:
        self.block_bytes, self.index_bytes = block_bytes, index_bytes
        self.counts, self.tars = (shards.records[name].astype(np.int64) for name in ("samples", "bytes"))
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])  # int64[shards + 1]
        self.samples, self.bytes, self.block = int(self.starts[-1]), int(self.tars.sum()), block
        self.pieces = Pieces(self.starts, block)

    def size(self, piece: int) -> int:
        """Bytes that are fetched for a piece, about."""
        shard, first, end = self.pieces.rows(piece)
        of_sample = self.tars[shard] / self.counts[shard]
        begin, last = int(first * of_sample) + HEADER, int(end * of_sample)
        return min(-(-last // PAGE) * PAGE, int(self.tars[shard])) - begin // PAGE * PAGE

    def size_alone(self, piece: int, samples: int) -> int:
        """Bytes that are fetched for samples of a piece by themselves, about; 0 when the whole piece is."""
        shard, first, end = self.pieces.rows(piece)
        size = int(self.tars[shard] / self.counts[shard]) + PAGE
        return samples * size if by_themselves(samples, end - first) else 0


class Uses(NamedTuple):
    """Which pieces a worker's micro batches need, by their turn (from 0), in the order of their rows.

    turns: int64[k].  sources, pieces: int64[k], in the mixture and in the source's data set.  samples: int64[k], how
    many the micro batch has of the piece.
    """

    turns: np.ndarray
    sources: np.ndarray
    pieces: np.ndarray
    samples: np.ndarray


class Quality(NamedTuple):
    """Of the shuffle. spread: of the batches' mean sample numbers, by what independent draws would give (1 is ideal).

    shards, pieces: in a batch, mean.
    """

    spread: float
    shards: float
    pieces: float


def own(rank: int, world: int, micro_batches: int) -> range:
    """The micro batches of a worker."""
    return range(rank * micro_batches // world, (rank + 1) * micro_batches // world)


def uses(mixture: Mixture, sets: Sequence[Remote], mine: range, micro_batch: int, steps: range) -> Uses:
    """What the worker with the micro batches `mine` reads in `steps`."""
    per = max(1, ROWS // (len(mine) * micro_batch))
    columns: list[tuple[np.ndarray, ...]] = []
    for first in range(steps.start, steps.stop, per):
        part = range(first, min(first + per, steps.stop))
        sources, _, numbers = (column.reshape(-1, micro_batch) for column in mixture.plan(part, mine, micro_batch))
        pieces = np.empty_like(numbers)
        for source, each in enumerate(sets):
            pieces[sources == source] = each.pieces.of(numbers[sources == source])
        known = sources * (pieces.max() + 1) + pieces  # [turns, rows]
        distinct, back = np.unique(known, return_inverse=True)
        key = np.arange(len(known))[:, None] * len(distinct) + back.reshape(known.shape)
        _, at, counts = np.unique(key, return_index=True, return_counts=True)
        order = np.argsort(at)
        at = at[order]
        turn = (part.start - steps.start) * len(mine) + at // micro_batch
        columns.append((turn, sources.ravel()[at], pieces.ravel()[at], counts[order]))
    return Uses(*map(np.concatenate, zip(*columns)))


def quality(mixture: Mixture, sets: Sequence[Remote], source: int, micro_batch: int, steps: int) -> Quality:
    """Of one source, over some of the first `steps` steps, spread evenly over them."""
    here, batch = sets[source], mixture.segments[-1].global_batch
    looked = min(steps, max(QUALITY_STEPS[0], min(QUALITY_STEPS[1], QUALITY_ROWS // batch)))
    squares, shards, pieces = [], [], []
    for step in np.unique(np.linspace(0, steps - 1, looked).astype(int)).tolist():
        sources, _, numbers = mixture.plan(range(step, step + 1), range(batch // micro_batch), micro_batch)
        drawn = numbers.ravel()[sources.ravel() == source]
        if len(drawn):
            squares.append((drawn.mean() - (here.samples - 1) / 2) ** 2 * len(drawn))
            shards.append(len(np.unique(here.starts.searchsorted(drawn, "right"))))
            pieces.append(len(np.unique(here.pieces.of(drawn))))
    variance = max(here.samples**2 - 1, 1) / 12
    return Quality(float(np.sqrt(np.mean(squares) / variance)), float(np.mean(shards)), float(np.mean(pieces)))
