"""The order of a run from one step on, and how the next one follows from it when a person asks for another.

A source's order is a chain of parts: a data set up to an epoch edge, from there the larger one that it has grown to.
A part is an `Order` whose epochs before the part's first are left out, so its lanes share each epoch exactly. A
segment records how far every lane had come in every chain before it: a lane's draws of a source follow the chain
without a gap, whatever the weights, and each epoch of each source holds every sample once.

What it gives up: with other lanes, windows, seed, data or blocks no lane can go on where it was. Then a source begins
anew, with an epoch that it has not had: samples of the epoch in hand may come again, or not at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from pipeline.data.draws import drawn, drawn_before
from pipeline.data.order import Order, places
from pipeline.errors import ConfigError

END = 2**63 - 1


class Part(NamedTuple):
    """A data set as a source's order has it from an epoch on, up to the next part's."""

    epoch: int
    samples: int
    block: int
    identity: str


class Chain(NamedTuple):
    """A source in a segment. bases: lane positions of each lane before the segment, counted from the first part on."""

    name: str
    weight: float
    parts: tuple[Part, ...]
    bases: tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """The order from a step on. draws: of each chain in a block of draws.py.

    Chains that the configuration no longer names stand last, with 0 draws: they go on if they come back.
    """

    step: int
    lanes: int
    shuffle_blocks: int
    seed: int
    global_batch: int
    draws: tuple[int, ...]
    chains: tuple[Chain, ...]

    def __post_init__(self) -> None:
        """Raises what `Order` raises for numbers that cannot work."""
        for chain in self.chains:
            for part in chain.parts:
                self.order(part)

    def order(self, part: Part) -> Order:
        """Of which the part takes the epochs from its first on."""
        return Order(part.samples, part.block, self.lanes, self.shuffle_blocks, self.seed)

    @cached_property
    def window_blocks(self) -> int:
        """w, blocks in one window of one lane."""
        return self.order(self.chains[0].parts[0]).window_blocks

    @property
    def depth(self) -> int:
        """Rows that a lane gives to each step."""
        return self.global_batch // self.lanes

    def rows(self, step: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(sources, epochs, numbers) of rows int64[k] of steps int64[k]. ConfigError when 64 bits do not hold them."""
        steps = step - self.step
        if (int(steps[-1]) + 1) * self.depth > self._most_draws:
            raise ConfigError(f"order: the numbers of step {step[-1]} overflow 64-bit arithmetic; end the run before")
        lane = row // self.depth
        source, position = drawn(self.draws, self.seed, lane, steps * self.depth + row % self.depth)
        part, position = self._along(source, lane, position + self._bases[source, lane])
        _, samples, block = self._parts[:, part if (part != part[0]).any() else part[:1]]
        return source, *places(samples, block, self.lanes, self.window_blocks, self.seed, lane, position)

    def about(self, source: int, epoch: int, number: int) -> tuple[int, float] | None:
        """The lane that has a sample of a source in an epoch, and about the step; None: another part of the chain."""
        chain, draws = self.chains[source], self.draws[source]
        part, *more = chain.parts
        if more or epoch < part.epoch or not draws:
            return None
        lane, position = self.order(part).about(epoch, number)
        rows = self.depth * draws / sum(self.draws)  # that the lane takes of this source in a step
        first = (part.epoch * part.samples + self.lanes - 1 - lane) // self.lanes
        return lane, self.step + (position - first - chain.bases[lane]) / rows

    def consumed(self, step: int) -> np.ndarray:
        """int64[S, L]: lane positions of each source and lane that lie before a step."""
        draws = (step - self.step) * self.depth
        lanes = [drawn_before(self.draws, self.seed, lane, draws) for lane in range(self.lanes)]
        return self._bases + np.stack(lanes, axis=1)

    def reached(self, source: int, consumed: np.ndarray) -> int:
        """The largest epoch that any lane has come to with `consumed` int64[L]; before the first one, one less."""
        lane = np.flatnonzero(consumed)
        if not lane.size:
            return self.chains[source].parts[0].epoch - 1
        part, position = self._along(np.full_like(lane, source), lane, consumed[lane] - 1)
        return int(((position * self.lanes + lane) // self._parts[1, part]).max())

    @cached_property
    def _bases(self) -> np.ndarray:
        return np.array([chain.bases for chain in self.chains], np.int64)

    @cached_property
    def _parts(self) -> np.ndarray:
        """int64[3, P]: first epoch, samples and block of all parts of all chains."""
        parts = [part[:3] for chain in self.chains for part in chain.parts]
        return np.array(parts, np.int64).T

    @cached_property
    def _ends(self) -> np.ndarray:
        """int64[P]: the epoch before which a part ends; -1: never."""
        ends = ((*(part.epoch for part in chain.parts[1:]), -1) for chain in self.chains)
        return np.array([*itertools.chain(*ends)], np.int64)

    @cached_property
    def _most_draws(self) -> int:
        """Draws of a lane that 64 bits hold, to the safe side; the largest number met is lanes * lane position."""
        parts = [part for chain in self.chains for part in chain.parts]
        ends = [max(part.epoch, end) * part.samples for part, end in zip(parts, self._ends.tolist())]
        room = END - max(ends) - 2 * max(part.samples for part in parts) - 4 * self.lanes
        return room // self.lanes - int(self._bases.max()) - sum(self.draws)

    def _along(self, source: np.ndarray, lane: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """From positions in lanes of chains to parts, and positions in the lanes of those parts' own orders."""
        if len(self._ends) == len(self.chains) and not self._parts[0].any():
            return source, position  # each chain is one part, from its first epoch on
        firsts = np.cumsum([0, *(len(chain.parts) for chain in self.chains)])
        part = firsts[source]
        while True:
            epoch, samples, _ = self._parts[:, part]
            begin = (epoch * samples + self.lanes - 1 - lane) // self.lanes
            end = self._ends[part]
            length = np.where(end < 0, END, (end * samples + self.lanes - 1 - lane) // self.lanes - begin)
            over = position >= length
            if not over.any():
                return part, begin + position
            position, part = position - np.where(over, length, 0), part + over


Grown = Callable[[int, int], str | None]
"""(index of a wanted source, samples) -> identity of its data set with only so many first samples; None: no such."""


def differences(old: Segment, new: Segment) -> list[str]:
    """What `new`, made from a configuration, asks for otherwise than `old`: "what: old -> new"; [] when the same."""
    lines = _moved(old, new)
    if old.global_batch != new.global_batch:
        lines.append(f"global batch: {old.global_batch} -> {new.global_batch}")
    same = _match(old, new)
    shares = [[draws for draws in segment.draws if draws] for segment in (old, new)]
    for chain, k in zip(new.chains, same):
        if k is None:
            lines.append(f"new source {chain.name}")
            continue
        before, now = old.chains[k].parts[-1], chain.parts[-1]
        if (before.identity, before.samples) != (now.identity, now.samples):
            identities = f"{before.identity[:12]}.. -> {now.identity[:12]}.."
            lines.append(f"data of {chain.name}: {identities} ({before.samples:,} -> {now.samples:,} samples)")
        elif before.block != now.block:
            lines.append(f"block of {chain.name}: {before.block:,} -> {now.block:,} samples")
        if shares[0] != shares[1] and old.chains[k].weight != chain.weight:
            lines.append(f"weight of {chain.name}: {old.chains[k].weight:g} -> {chain.weight:g}")
    kept = [k for k in same if k is not None]
    for k, (chain, draws) in enumerate(zip(old.chains, old.draws)):
        if k not in kept and (draws or k < max(kept, default=0)):
            lines.append(f"source {chain.name} is gone")
    if kept != sorted(kept):
        names = [", ".join(old.chains[k].name for k in indices) for indices in (sorted(kept), kept)]
        lines.append(f"order of sources: {names[0]} -> {names[1]}")
    if not lines and shares[0] != shares[1]:
        lines.append(f"draws: {shares[0]} -> {shares[1]}")
    return lines


def follow(old: Segment, step: int, new: Segment, grown: Grown) -> tuple[Segment, list[str]]:
    """The segment from `step` on that `new`, made from a configuration, asks for; and what it means, for a person."""
    if step < old.step:
        raise ValueError(f"the order of step {old.step} on cannot be changed from step {step} on")
    consumed = old.consumed(step)
    moved, same = _moved(old, new), _match(old, new)
    chains, notes = [], []
    for index, (chain, k) in enumerate(zip(new.chains, same)):
        if k is None:
            notes.append(f"{chain.name} is new: it begins with epoch {chain.parts[0].epoch}")
        else:
            chain, said = _next(old, k, consumed[k], chain, moved, lambda samples, i=index: grown(i, samples))
            notes += said
        chains.append(chain)
    for k, (chain, draws) in enumerate(zip(old.chains, old.draws)):
        if k not in same:
            resting = Chain(chain.name, 0.0, chain.parts[-1:], (0,) * new.lanes)
            chains.append(_next(old, k, consumed[k], resting, moved, lambda _: None)[0])
            notes += [f"{chain.name} is drawn no more; should it come back, it goes on where it was"] if draws else []
    if old.global_batch != new.global_batch and not moved:
        notes.append(
            f"a step has {new.global_batch} samples instead of {old.global_batch}; sources go on where they were"
        )
    draws = new.draws + (0,) * (len(chains) - len(new.draws))
    return replace(new, step=step, draws=draws, chains=tuple(chains)), notes


def _next(
    old: Segment, k: int, consumed: np.ndarray, new: Chain, moved: list[str], grown: Callable[[int], str | None]
) -> tuple[Chain, list[str]]:
    """Chain k of `old`, of which `consumed` int64[L] lane positions are over, with the data and weight of `new`."""
    before, reached, name = old.chains[k], old.reached(k, consumed), new.name
    wanted, newest = new.parts[0], before.parts[-1]
    begun = tuple(part for part in before.parts if part.epoch <= reached)  # a later one can still be taken back
    edge = wanted._replace(epoch=reached + 1)
    data, notes = wanted[1:], []
    if not moved and data == newest[1:]:
        parts = before.parts
    elif not moved and begun and data == begun[-1][1:]:
        parts = begun
        notes.append(
            f"{name} stays at {wanted.samples:,} samples: those that were to join at epoch {edge.epoch} do not"
        )
    elif not moved and begun and _has_grown(begun[-1], wanted, grown):
        parts = (*begun, edge)
        notes.append(
            f"{name} has grown from {begun[-1].samples:,} to {wanted.samples:,} samples: the new ones join at epoch "
            f"{edge.epoch}"
        )
    else:
        why = ", ".join(moved) or ("other blocks" if wanted.identity == newest.identity else "other data")
        lost = ": samples of the epoch in hand may come again, or not at all in it" if begun else ""
        notes.append(f"{name} begins anew with epoch {edge.epoch}, of {wanted.samples:,} samples ({why}){lost}")
        return Chain(name, new.weight, (edge,), new.bases), notes
    if before.weight != new.weight:
        notes.append(f"{name} has weight {new.weight:g} instead of {before.weight:g}, and goes on where it was")
    return Chain(name, new.weight, parts, tuple(consumed.tolist())), notes


def _has_grown(part: Part, wanted: Part, grown: Callable[[int], str | None]) -> bool:
    return wanted.samples > part.samples and grown(part.samples) == part.identity


def _moved(old: Segment, new: Segment) -> list[str]:
    """What no lane can go on with. Another number of blocks to shuffle may give the same windows."""
    windows = old.window_blocks != new.window_blocks
    pairs = {"lanes": (old.lanes, new.lanes), "seed": (old.seed, new.seed)}
    pairs |= {"shuffle_blocks": (old.shuffle_blocks, new.shuffle_blocks)} if windows else {}
    return [f"{what}: {before} -> {now}" for what, (before, now) in pairs.items() if before != now]


def _match(old: Segment, new: Segment) -> list[int | None]:
    """The index in `old` of each chain of `new`: that with the same data, whatever its name, else of the same name."""
    found: list[int | None] = [None] * len(new.chains)
    for same in (lambda a, b: a.parts[-1].identity == b.parts[-1].identity, lambda a, b: a.name == b.name):
        for index, chain in enumerate(new.chains):
            left = (k for k, before in enumerate(old.chains) if k not in found and same(before, chain))
            if found[index] is None:
                found[index] = next(left, None)
    return found
