"""The order of a run over one data set or several: which sample stands in which row, and all that this follows from.

Way of a number: (step, row) -> (lane, draw of the lane) -> source, and how often it was drawn in this lane before ->
lane position in that source's own order -> its epoch and sample number. Each source has epochs of its own. With one
source all of this is `Order.rows`.

A run's order is a list of segments (chains.py). The first begins at step 0; a person who asks for another order on
purpose begins the next one. `state` holds everything the order follows from, a few numbers per source and lane: it is
kept with every checkpoint, and compared with what the configuration asks for when the run goes on.

What it gives up: rows cannot be asked for by sample. Where a sample stood is found by computing the steps again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data import chains
from pipeline.data.chains import Chain, Grown, Part, Segment
from pipeline.data.draws import resolve
from pipeline.data.order import VERSION as ORDER_VERSION
from pipeline.errors import CheckpointError, ConfigError, DataError

VERSION = [ORDER_VERSION, 1]  # of the arithmetic of order.py, and of that of draws.py, chains.py and this file


@dataclass(frozen=True)
class Source:
    """What the configuration asks for. identity: of the data set.  samples: in it.  block: samples per block.

    weight: of its share of the draws, on any scale; 0: never drawn.
    """

    name: str
    identity: str
    samples: int
    block: int
    weight: float = 1.0


@dataclass(frozen=True)
class Mixture:
    """The order of a run: which source, epoch and sample stand in which row of which micro batch of which step."""

    segments: tuple[Segment, ...]

    @staticmethod
    def start(sources: Sequence[Source], *, lanes: int, shuffle_blocks: int, seed: int, global_batch: int) -> Mixture:
        """The order of a new run over `sources`, whose indices `rows` gives.

        lanes: independent streams; must divide `global_batch`.  shuffle_blocks: blocks of a source that are shuffled
        together, over all lanes.  seed: any integer.

        Raises ConfigError for numbers and weights that cannot work, and when two sources have one name or hold the
        same data; DataError for a source without samples.
        """
        if lanes < 1 or global_batch < 1 or global_batch % lanes:
            raise ConfigError(
                f"order: {lanes} lanes must divide the global batch of {global_batch}: change data.lanes or "
                "global_batch_size"
            )
        seen: dict[str, str] = {}
        for source in sources:
            if source.samples < 1:
                raise DataError(f"{source.name} has no samples: pack or index another folder")
            if source.identity in seen:
                raise ConfigError(
                    f"order: {seen[source.identity]} and {source.name} hold the same data; give one of them the "
                    "weight of both"
                )
            if source.name in seen.values():
                raise ConfigError(f"order: two sources are called {source.name}; rename one")
            seen[source.identity] = source.name
        begun = tuple(
            Chain(s.name, s.weight, (Part(0, s.samples, s.block, s.identity),), (0,) * lanes) for s in sources
        )
        draws = resolve({source.name: source.weight for source in sources})
        return Mixture((Segment(0, lanes, shuffle_blocks, seed, global_batch, draws, begun),))

    def rows(self, step: int, j: int, micro_batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(sources, epochs, numbers), int64[micro_batch] each, of micro batch j of a step.

        Row i of the global batch is lane i // (G/L), draw (step - segment's step) * (G/L) + i % (G/L) of that lane;
        micro batch j holds rows [j * m, (j + 1) * m). A source is an index into the segment's, a number counts inside
        its data set. Raises ConfigError when the micro batch does not divide the global batch, or 64 bits overflow.
        """
        columns = self.plan(range(step, step + 1), range(j, j + 1), micro_batch)
        sources, epochs, numbers = (column[0, 0] for column in columns)
        return sources, epochs, numbers

    def plan(self, steps: range, own: range, micro_batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`rows` of micro batches `own` of all `steps`, int64[steps, own, micro_batch] each: many at once cost less.

        Raises what `rows` raises, and IndexError when another order begins inside `steps`.
        """
        segment = next((segment for segment in reversed(self.segments) if segment.step <= steps[0]), self.segments[0])
        batch = segment.global_batch
        if micro_batch < 1 or batch % micro_batch:
            raise ConfigError(
                f"order: micro batches of {micro_batch} must divide the global batch of {batch}: change "
                "micro_batch_size or global_batch_size"
            )
        if steps[0] < 0 or own[0] < 0 or own[-1] >= batch // micro_batch:
            raise IndexError(f"no micro batch {own[-1]} in step {steps[0]}: {batch // micro_batch} per step, from 0")
        if any(steps[0] < later.step <= steps[-1] for later in self.segments):
            raise IndexError(f"another order begins inside steps {steps[0]} to {steps[-1]}")
        row = np.arange(own[0] * micro_batch, (own[-1] + 1) * micro_batch, dtype=np.int64)
        step = np.arange(steps[0], steps[-1] + 1, dtype=np.int64)
        found = segment.rows(np.repeat(step, len(row)), np.tile(row, len(step)))
        sources, epochs, numbers = (column.reshape(len(steps), len(own), micro_batch) for column in found)
        return sources, epochs, numbers

    def about(self, source: int, epoch: int, number: int) -> tuple[int, float] | None:
        """The lane that will have a sample of a source in an epoch, and about the step; None when it is not known."""
        return self.segments[-1].about(source, epoch, number)

    @property
    def depth(self) -> int:
        """Rows that a lane gives to each step, now."""
        return self.segments[-1].depth

    @property
    def shares(self) -> list[tuple[str, int, int]]:
        """(name, draws, D) of the sources that are drawn now: so many of each D samples of a lane."""
        newest = self.segments[-1]
        return [(chain.name, draws, sum(newest.draws)) for chain, draws in zip(newest.chains, newest.draws) if draws]

    @property
    def state(self) -> dict[str, Any]:
        """All that the order follows from, as plain JSON; see `Segment` and `Chain` for what the words mean."""
        segments = []
        for segment in self.segments:
            sources = [
                {
                    "name": chain.name,
                    "weight": chain.weight,
                    "draws": draws,
                    "parts": [part._asdict() for part in chain.parts],
                    "bases": list(chain.bases),
                }
                for chain, draws in zip(segment.chains, segment.draws)
            ]
            names = ("step", "lanes", "shuffle_blocks", "seed", "global_batch")
            segments.append({**{name: getattr(segment, name) for name in names}, "sources": sources})
        return {"version": VERSION, "segments": segments}

    @staticmethod
    def from_state(state: dict[str, Any]) -> Mixture:
        """The order that `state` was taken from. Raises CheckpointError when another version of Millstream made it."""
        if state.get("version") != VERSION:
            raise CheckpointError(
                f"the order was made by version {state.get('version')} of its arithmetic, this Millstream computes "
                f"{VERSION}: go on with the one that made it, or start another run"
            )
        segments = []
        for segment in state["segments"]:
            sources = segment["sources"]
            kept = tuple(
                Chain(s["name"], s["weight"], tuple(Part(**part) for part in s["parts"]), tuple(s["bases"]))
                for s in sources
            )
            draws = tuple(source["draws"] for source in sources)
            numbers = {name: value for name, value in segment.items() if name != "sources"}
            segments.append(Segment(**numbers, draws=draws, chains=kept))
        return Mixture(tuple(segments))

    def differences(self, state: dict[str, Any]) -> list[str]:
        """What this order, made from the configuration, asks for otherwise than the newest segment of `state`.

        Lines such as "lanes: 8 -> 16"; none when the orders are the same. Names of sources are not part of an order.
        """
        return chains.differences(Mixture.from_state(state).segments[-1], self.segments[-1])

    @staticmethod
    def continued(state: dict[str, Any], step: int, wanted: Mixture, grown: Grown) -> tuple[Mixture, list[str]]:
        """The order of `state` before `step` and that of `wanted` from there on; and sentences that say what it means.

        `grown(source, samples)` is the identity that the data set of a source of `wanted` would have with only its
        first `samples` samples, None when no shard ends there.

        - Other weights or global batch, sources more or less: every source goes on where it was, and one that comes
          back too. A new one begins with epoch 0.
        - A source has grown: its new samples join at the next epoch edge that no lane has passed.
        - Other lanes, windows or seed: every source begins anew, numbering its epochs on. Other data or blocks: that
          source alone does. Samples of the epoch in hand may come again, or not at all in it.
        """
        old = Mixture.from_state(state).segments
        newest, notes = chains.follow(old[-1], step, wanted.segments[-1], grown)
        return Mixture((*(segment for segment in old if segment.step < step), newest)), notes
