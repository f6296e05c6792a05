"""One node's reading of remote shards, event by event, in a model of its link: what is requested, when it is there.

    training asks -> Worker reads micro batches, plans ahead -> requests -> Transfers on the link -> the node's cache

What is read, ahead and evicted is what a run does: the pieces of cache_policy.py, its `Ahead`, its eviction; a shard is
opened (its index, and a look at its tar) before its first piece; the first step has the link alone. What is a
model is the link (link.py) and the loader: a worker reads its micro batches one after the other, as many before they
are asked for as a run's loader does.

What it gives up: failures, retries, stores that get slower under load, and what was in the cache before.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from pipeline.data.remote.cache_policy import FILLED, IN_FLIGHT, NEVER, Ahead, evicted
from pipeline.data.remote.link import Done, Link, Transfers


class Piece(NamedTuple):
    """bytes: of it.  block: bytes that it is planned with.  shard: any number that tells its shard from others.  index:
    bytes of the shard's index.
    """

    bytes: int
    block: int
    shard: int
    index: int


class Wanted(NamedTuple):
    """A piece, or `alone` bytes of samples in it, which go first; else in the order in which they were wanted."""

    whole: bool
    number: int
    piece: int
    alone: int


@dataclass(eq=False)
class Worker:
    """One worker's loader. turns: the pieces of each of its micro batches.  per_step: of its micro batches.

    counted: turns whose bytes are of the steps that are looked at; those behind them are only looked ahead to.  depth:
    micro batches that are read before they are asked for.  most: turns that are planned ahead of those.  first: bytes
    of the first step's samples in each piece from which they come by themselves.
    """

    turns: Sequence[list[int]]
    counted: int
    per_step: int
    depth: int
    ahead: Ahead
    most: int = 1 << 60
    first: Mapping[int, int] = field(default_factory=dict)
    planned: int = 0
    asked: int = 0  # micro batches that training has asked for
    loaded: int = 0
    taken: int = 0
    reading: bool = False
    coming: set[int] = field(default_factory=set)  # pieces that the first step still waits for
    came: set[int] = field(default_factory=set)  # pieces whose samples of the first step are here
    missing: set[int] = field(default_factory=set)  # of the one that is being read
    queue: list[Wanted] = field(default_factory=list)  # a heap of what is to be requested
    open: dict[int, list[Wanted] | None] = field(default_factory=dict)  # shard -> what waits; None: open
    in_flight: int = 0

    def plans(self, begun: int) -> bool:
        """Whether to plan one turn more, when `begun` have been begun."""
        ahead = self.planned - begun
        return ahead <= 0 or (self.ahead.has_room and ahead < self.most)


class Node:
    """Workers that share a cache and a link. pieces: all that they use.

    capacity: of the cache, bytes.  decode: seconds for a micro batch.  listed: the store can be listed, so that a
    shard's index is all that is requested before its first piece.

    fetched, beyond: bytes, of indexes too, for the turns that count and for others.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        pieces: Mapping[int, Piece],
        link: Link,
        capacity: int,
        decode: float = 0.0,
        listed: bool = False,
    ) -> None:
        self.workers, self.pieces, self.link, self.capacity = workers, pieces, link, capacity
        self.decode, self.listed = decode, listed
        self.fetched, self.beyond, self.requests, self.held, self.most_held, self.now = 0, 0, 0, 0, 0, 0.0
        self._early: dict[int, int] = {}  # pieces that no turn that counts has needed -> their bytes in `beyond`
        self._there: dict[int, int] = {}  # pieces in the cache, with their bytes
        self._requested: set[int] = set()
        self._indexes: set[int] = set()  # of shards, in the cache
        self._pins: dict[int, int] = {}  # workers that have planned a piece and not passed it
        self._transfers, self._count = Transfers(link.bandwidth), itertools.count()
        self._events: list[tuple[float, int, Done]] = []
        self._later = self._uses() if sum(piece.bytes for piece in pieces.values()) > capacity else {}

    def ask(self, step: int, now: float) -> None:
        """Training asks for the micro batches of a step; its time must not lie before `now`."""
        self._at(now, partial(self._asked, step))

    def ready(self, step: int) -> float:
        """When every worker has read the micro batches of a step, for which it was asked."""
        while any(worker.loaded < (step + 1) * worker.per_step for worker in self.workers):
            if self._transfers.next_end <= (self._events[0][0] if self._events else NEVER):
                self.now, done = self._transfers.end()
            else:
                self.now, _, done = heapq.heappop(self._events)
            done()
        return self.now

    def _at(self, time: float, done: Done) -> None:
        heapq.heappush(self._events, (time, next(self._count), done))

    def _asked(self, step: int) -> None:
        for worker in self.workers:
            for piece in worker.ahead.passed(worker.taken):  # those of the step before are not looked at any more
                self._pins[piece] -= 1
            worker.asked = (step + 1) * worker.per_step
            self._take(worker)
            self._go_on(worker)

    def _take(self, worker: Worker) -> None:
        while worker.taken < min(worker.asked, worker.loaded):
            worker.ahead.take(worker.taken)
            worker.taken += 1

    def _go_on(self, worker: Worker) -> None:
        """Read the next micro batch if it may be read, plan what there is room for, request what is planned."""
        turn = worker.loaded
        if not worker.reading and turn < min(len(worker.turns), worker.asked + worker.depth):
            worker.reading = True
            first = worker.turns[: worker.per_step] if not turn else ()
            for piece in dict.fromkeys(itertools.chain.from_iterable(first)):
                if piece not in self._there:
                    worker.coming.add(piece)
                    self._want(worker, piece, worker.first.get(piece, 0))
            have = self._there.keys() | (worker.came if turn < worker.per_step else set())
            worker.missing = {piece for piece in worker.turns[turn] if piece not in have}
            if not worker.missing:
                self._at(self.now + self.decode, partial(self._decoded, worker))
        if not worker.coming:
            self._plan(worker, turn + worker.reading)
        self._request(worker)

    def _plan(self, worker: Worker, begun: int) -> None:
        while worker.planned < len(worker.turns) and worker.plans(begun):
            needed = {piece: self.pieces[piece].block for piece in worker.turns[worker.planned]}
            if worker.planned < worker.counted:
                for piece in needed:  # another worker may have looked ahead to it
                    size = self._early.pop(piece, 0)
                    self.fetched, self.beyond = self.fetched + size, self.beyond - size
            else:
                self._early |= dict.fromkeys(needed.keys() - self._pins.keys() - self._early.keys(), 0)
            for piece in worker.ahead.plan(needed):
                self._pins[piece] = self._pins.get(piece, 0) + 1
                self._want(worker, piece)
            worker.planned += 1

    def _want(self, worker: Worker, piece: int, alone: int = 0) -> None:
        """Have a piece, or samples in it, requested in its turn, its shard opened before."""
        shard, index = self.pieces[piece].shard, self.pieces[piece].index
        wanted = Wanted(not alone, next(self._count), piece, alone)
        if shard not in worker.open:
            worker.open[shard] = [wanted]
            size = 0 if shard in self._indexes else index
            requests = (shard not in self._indexes) + (not self.listed)  # at the same time
            self._indexes.add(shard)
            self._count_bytes(piece, size)
            self.requests += requests
            begin = partial(self._first_byte, size, partial(self._opened, worker, shard))
            self._at(self.now + (self.link.latency if requests else 0.0), begin)
        elif (waiting := worker.open[shard]) is not None:
            waiting.append(wanted)
        else:
            heapq.heappush(worker.queue, wanted)

    def _opened(self, worker: Worker, shard: int) -> None:
        for wanted in worker.open[shard] or ():
            heapq.heappush(worker.queue, wanted)
        worker.open[shard] = None
        self._request(worker)

    def _request(self, worker: Worker) -> None:
        while worker.queue and (worker.queue[0].alone or worker.in_flight < IN_FLIGHT):
            _, _, piece, alone = heapq.heappop(worker.queue)
            if piece in self._there or piece in self._requested:
                continue
            if alone:  # by other threads than those of whole pieces
                self._count_bytes(piece, alone)
                self.requests += 1
                begin = partial(self._first_byte, alone, partial(self._has, worker, piece))
                self._at(self.now + self.link.latency, begin)
                continue
            size, whole = self.pieces[piece].bytes, partial(self._arrived, worker, piece)
            worker.in_flight += 1
            self._requested.add(piece)
            self._count_bytes(piece, size)
            self.requests += 1
            self._at(self.now + self.link.latency, partial(self._first_byte, size, whole))

    def _count_bytes(self, piece: int, size: int) -> None:
        if piece in self._early:
            self.beyond += size
            self._early[piece] += size
        else:
            self.fetched += size

    def _first_byte(self, size: int, whole: Done) -> None:
        self._transfers.begin(self.now, size, whole)

    def _arrived(self, requester: Worker, piece: int) -> None:
        requester.in_flight -= 1
        self._requested.discard(piece)
        self._there[piece] = self.pieces[piece].bytes
        self.held += self.pieces[piece].bytes
        self.most_held = max(self.most_held, self.held)
        if self.held > self.capacity:
            self._evict()
        for worker in self.workers:
            self._has(worker, piece)
        self._request(requester)

    def _has(self, worker: Worker, piece: int) -> None:
        """A worker has what it needs of a piece for the micro batch that it reads, or for the first step."""
        ready = piece in worker.missing and len(worker.missing) == 1
        first = piece in worker.coming
        worker.missing.discard(piece)
        worker.coming.discard(piece)
        if first:
            worker.came.add(piece)
        if ready:
            self._at(self.now + self.decode, partial(self._decoded, worker))
        if ready or first:
            self._go_on(worker)

    def _decoded(self, worker: Worker) -> None:
        worker.loaded += 1
        worker.reading = False
        self._take(worker)
        self._go_on(worker)

    def _evict(self) -> None:
        """As the run's cache does, with the true times of next uses where it has estimates."""
        free = [piece for piece in self._there if not self._pins.get(piece)]
        turn = max(worker.taken for worker in self.workers)
        later = [self._later[piece] for piece in free]
        uses = np.array([next(iter(turns[bisect_right(turns, turn) :]), NEVER) for turns in later])
        sizes = np.array([self._there[piece] for piece in free], np.int64)
        for at in evicted(uses, sizes, turn, self.held - int(FILLED * self.capacity)).tolist():
            self.held -= self._there.pop(free[at])

    def _uses(self) -> dict[int, list[int]]:
        """The turns that need each piece, of all workers."""
        found: dict[int, list[int]] = {}
        for turn in range(max(len(worker.turns) for worker in self.workers)):
            for worker in self.workers:
                for piece in worker.turns[turn] if turn < len(worker.turns) else ():
                    found.setdefault(piece, []).append(turn)
        return found
