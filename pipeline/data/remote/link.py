"""A node's link to the store, as a model: requests under way share its bandwidth.

A request waits `latency` and then shares the node's bandwidth evenly with all others under way, as connections of TCP
to one server about do.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import NamedTuple

from pipeline.data.remote.cache_policy import NEVER

Done = Callable[[], None]


class Link(NamedTuple):
    """Of one node to the store. latency: seconds until the first byte of a request comes.  bandwidth: bytes/s."""

    latency: float
    bandwidth: float


class Transfers:
    """Requests whose bytes are coming, sharing a bandwidth evenly.

    `_share` is how many bytes each of those under way has got since the beginning: virtual time of processor sharing
    (Demers, Keshav and Shenker, "Analysis and Simulation of a Fair Queueing Algorithm", SIGCOMM 1989).
    """

    def __init__(self, bandwidth: float) -> None:
        self._bandwidth, self._share, self._now = bandwidth, 0.0, 0.0
        self._ends: list[tuple[float, int, Done]] = []  # a heap, by the share at which each is whole
        self._count = itertools.count()

    def _forward(self, now: float) -> None:
        if self._ends:
            self._share += (now - self._now) * self._bandwidth / len(self._ends)
        self._now = now

    def begin(self, now: float, size: int, done: Done) -> None:
        self._forward(now)
        heapq.heappush(self._ends, (self._share + size, next(self._count), done))

    @property
    def next_end(self) -> float:
        """When the next one will be whole, if none begins before."""
        if not self._ends:
            return NEVER
        return self._now + max(0.0, self._ends[0][0] - self._share) * len(self._ends) / self._bandwidth

    def end(self) -> tuple[float, Done]:
        """Forward to the next end: when, and what to do then."""
        now = self.next_end
        self._forward(now)
        return now, heapq.heappop(self._ends)[2]
