"""Who holds the others up: ranks and hosts that compute, or wait for data, longer than the rest, named once.

The ranks step together, so the slowest sets the pace of all. What tells them apart is the time before they first wait
for each other: the forward passes, and the wait for samples. Every rank's two figures come with the step's own gather.
Over a window of steps they become a record of the journal (kind: pace), and a rank that is behind in several windows
in a row is named with its host and the figures (kind: slow); a host when all its ranks are.

What it gives up: at ZeRO-3 a forward pass waits for the parameters that others hold, so that all ranks look alike
there; then only waits for data are told apart. What happens within a window is lost: its median (computing) or mean
(waiting) is what counts, so one long step is no slow rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from pipeline.data.loader import Loader
from pipeline.session import Session

WINDOW = 20, 10.0  # steps and seconds that a window has at least;
LONG_WINDOW = 5, 60.0  # or these, when the steps are long
PATIENCE = 5  # windows in a row in which a rank is behind before it is named
SLOWER = 1.3  # times the others' median is behind, in computing,
LEAST_SHARE = 0.05  # if it costs so much of a step;
WAITING_SHARE = 0.1  # in waiting for data: so much of a step longer than the others


T = TypeVar("T", float, np.ndarray)


class Figures(NamedTuple, Generic[T]):
    """What a rank tells the others of its step; or what all have told, each an array [R].

    waited: seconds for samples.  digest: of the rows it was trained on.  computed: seconds before any collective.
    host_bytes, gpu_bytes: what it holds.
    """

    waited: T
    digest: T
    computed: T
    host_bytes: T
    gpu_bytes: T


class Pace:
    """The figures of all ranks in one attempt; made by all ranks together, kept by rank 0."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._hosts: list[str] = session.world.gather_objects(session.host)
        self._steps: list[tuple[int, float, np.ndarray, np.ndarray]] = []
        self._behind: dict[tuple[str, int], list[int]] = defaultdict(list)  # (what, rank) -> first steps of windows
        self._named: set[tuple[str, int]] = set()
        self._memory = np.zeros(len(self._hosts))  # bytes that each rank holds, on host and GPU together

    def note(self, step: int, ranks: Figures[np.ndarray], seconds: float, loader: Loader) -> None:
        """A step of `seconds`, and the ranks' figures of it. A rank's own slow shards are recorded by itself."""
        for slow in loader.slow_shards():
            self._session.record("slow", what="shard", rank=self._session.world.rank, step=step, **slow._asdict())
        for said in loader.slow_links():
            self._session.record("slow", what="link", rank=self._session.world.rank, step=step, message=said)
        for said in loader.cache_troubles():
            self._session.record("warning", step=step, message=f"rank {self._session.world.rank}: {said}")
        if self._session.world.rank or not ranks.computed.any():
            return
        self._memory = ranks.host_bytes + ranks.gpu_bytes
        self._steps.append((step, seconds, ranks.computed, ranks.waited))
        spent = sum(seconds for _, seconds, *_ in self._steps)
        if any(len(self._steps) >= steps and spent >= least for steps, least in (WINDOW, LONG_WINDOW)):
            self._close()

    def _close(self) -> None:
        """End a window: record it, and name whom it shows to be behind once too often."""
        steps, seconds, computed, waited = zip(*self._steps)
        self._steps = []
        usual = median(seconds)
        computes, waits = np.median(computed, axis=0).tolist(), np.mean(waited, axis=0).tolist()
        figures = {"compute": [_short(s) for s in computes], "data": [_short(s) for s in waits]}
        figures["memory"] = self._memory.tolist()
        self._session.record("pace", step=steps[-1], steps=len(steps), seconds=_short(usual), **figures)
        for what, values in (("compute", computes), ("data", waits)):
            others = [median([*values[:r], *values[r + 1 :]] or [values[r]]) for r in range(len(values))]
            for rank, (own, rest) in enumerate(zip(values, others)):
                streak = self._behind[what, rank]
                streak.append(steps[0])
                if not _behind(what, own, rest, usual):
                    streak.clear()
            for ranks in self._blamed(what):
                self._name(what, ranks, steps[-1], values, others)

    def _blamed(self, what: str) -> list[list[int]]:
        """Ranks that have been behind long enough and are not named yet; those of a host together, if all of it is."""
        found = []
        for host in dict.fromkeys(self._hosts):
            ranks = [rank for rank, its in enumerate(self._hosts) if its == host]
            late = [r for r in ranks if len(self._behind[what, r]) >= PATIENCE and (what, r) not in self._named]
            together = 1 < len(ranks) < len(self._hosts) and all(self._behind[what, r] for r in ranks)
            if together and len(late) == len(ranks):
                found.append(ranks)
            elif not together:  # else the host's other ranks are on their way to be named with it
                found += [[rank] for rank in late]
        return found

    def _name(self, what: str, ranks: list[int], step: int, values: Sequence[float], others: Sequence[float]) -> None:
        self._named |= {(what, rank) for rank in ranks}
        since = max(self._behind[what, rank][0] for rank in ranks)
        own, rest = median(values[r] for r in ranks), median(others[r] for r in ranks)
        host = self._hosts[ranks[0]]
        whole = len(ranks) > 1
        who = f"host {host} (ranks {', '.join(map(str, ranks))})" if whole else f"rank {ranks[0]} on {host}"
        against = f"{own:.3g} s a step against {rest:.3g} s, since step {since}"
        if what == "compute":
            said = f"{who} computes {own / max(rest, 1e-9):.1f} x as long as the others ({against})"
        else:
            said = f"{who} waits longer for data than the others ({against})"
        facts = {"what": "host" if whole else "rank", "by": what, "ranks": ranks, "host": host, "since": since}
        self._session.record("slow", step=step, message=f"{said}: the run goes at its pace", **facts)


def _behind(what: str, own: float, rest: float, usual: float) -> bool:
    if what == "data":
        return own - rest >= WAITING_SHARE * usual
    return own >= SLOWER * rest and own - rest >= LEAST_SHARE * usual


def _short(seconds: float) -> float:
    """Four digits are enough."""
    return float(f"{seconds:.4g}")
