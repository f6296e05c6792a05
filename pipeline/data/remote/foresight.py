"""Asks for the bytes of coming micro batches before they are needed, where data sets lie at a URL.

    plans -> rows, far ahead --(pieces, in the order of their first use)--> fetched by threads
                |-> the same rows, to whoever prepares micro batches (ahead.py)

The order is a pure function, so what is needed is known as far ahead as one likes; cache_policy.Ahead says how far that
is. When a micro batch has been used up, the pieces that no coming one needs are let go of, with the time at which the
next epoch comes to them. Nothing here changes what is in a micro batch.

Data that fit into what is asked for ahead are planned for one epoch: what follows needs the same pieces again.

The first step comes alone, its samples by themselves: whole pieces would share the link with them, and training would
begin so much later. Their pieces follow; bytes that come twice are those of one step.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipeline.data.remote.cache_policy import BLOCK_BYTES, LEAST_AHEAD, Ahead

if TYPE_CHECKING:
    from pipeline.data.fill import MicroBatch, Rows
    from pipeline.data.reader import Dataset

MOST_ROWS = 1 << 20  # that are planned ahead, 24 bytes each
SOURCE = 1 << 48  # pieces of source s are numbered from s * SOURCE

Plan = Callable[[], "Rows"]


class Prepared(Protocol):
    """Micro batches that ahead.py prepares."""

    def take(self) -> MicroBatch: ...

    def give_back(self) -> None: ...

    def close(self) -> None: ...


class Foresight:
    """An iterator over plans that has looked far ahead of who takes them. Close it.

    first: micro batches of the first step; 0 when other processes read, each for itself.
    """

    def __init__(self, datasets: Sequence[Dataset], plans: Iterator[Plan], again: Again | None, first: int) -> None:
        self._datasets, self._plans, self._again = datasets, plans, again
        self._remotes = [dataset.remote for dataset in datasets if dataset.remote is not None]
        self._first = first  # micro batches of the first step, until they are planned
        for each in self._remotes:
            each.remote.stopped, each.remote.maps = False, bool(first)
        self._ahead = Ahead(sum(each.remote.ahead_bytes for each in self._remotes))
        self._sizes = [dataset.block * dataset.index.bytes // max(1, len(dataset)) for dataset in datasets]
        self._most_rows = min(MOST_ROWS, sum(len(dataset) for dataset in datasets))
        self._known: deque[Plan] = deque()
        self._epochs: dict[int, int] = {}  # piece -> epoch that needs it
        self._rows, self._taken, self._began = 0, 0, time.monotonic()
        self._ended = self._closed = False
        self._wake = threading.Condition()
        threading.Thread(target=self._look, name="foresight", daemon=True).start()

    def __iter__(self) -> Foresight:
        return self

    def __next__(self) -> Plan:
        with self._wake:
            self._wake.wait_for(lambda: self._known or self._ended or self._closed)
            if not self._known:
                raise StopIteration
            self._wake.notify_all()  # whoever looks ahead may have waited for room here
            return self._known.popleft()

    def take(self) -> None:
        """A micro batch was taken by who trains on it."""
        with self._wake:
            self._ahead.take(self._taken)
            self._taken += 1
            self._wake.notify_all()

    def give_back(self) -> None:
        """Those that were taken are not looked at any more."""
        with self._wake:  # until they are let go of, or a piece that is asked for again meanwhile would be lost
            pace = (time.monotonic() - self._began) / max(1, self._taken)
            for planned in self._ahead.passed(self._taken):
                epoch = self._epochs.pop(planned, 0)
                source, piece = divmod(planned, SOURCE)
                fetching = self._datasets[source].remote
                if fetching is not None:
                    turns = self._again(source, epoch, fetching.pieces.first_sample(piece)) if self._again else None
                    later = None if turns is None else time.time() + pace * max(0.0, turns - self._taken)
                    fetching.release(piece, later)

    def close(self) -> None:
        """Nobody waits for bytes any more."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for each in self._remotes:
            each.remote.stopped = True

    def _look(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(self._may_look)
                if self._closed:
                    return
            try:
                plan = next(self._plans, None)
                if plan is None:
                    self._put(None, True)
                    return
                if self._first:
                    self._begin([plan(), *(each() for each in islice(self._plans, self._first - 1))])
                    continue
                rows = plan()
                self._ask(rows)
                self._put(lambda rows=rows: rows, False)
            except BaseException as error:  # for who would have taken it
                self._put(_raising(error), True)
                return

    def _may_look(self) -> bool:
        if self._closed or not self._known:
            return True
        if any(each.remote.cache.is_off() for each in self._remotes):  # what comes ahead stays in memory
            self._ahead.most = min(self._ahead.most, LEAST_AHEAD * BLOCK_BYTES)
        return self._ahead.has_room and self._rows * (1 + len(self._known)) < self._most_rows

    def _begin(self, first: list[Rows]) -> None:
        """Have the first step's samples fetched, and then their pieces."""
        self._first = 0
        for source, dataset in enumerate(self._datasets):
            if dataset.remote is not None:
                dataset.remote.begin(np.concatenate([rows.numbers[rows.sources == source] for rows in first]))
        for rows in first:
            self._put(lambda rows=rows: rows, False)
        for each in self._remotes:
            each.wait_begun()
        for rows in first:
            self._ask(rows)

    def _put(self, plan: Plan | None, last: bool) -> None:
        with self._wake:
            if plan is not None:
                self._known.append(plan)
            self._ended = last
            self._wake.notify_all()

    def _ask(self, rows: Rows) -> None:
        needed, new_epochs = dict[int, int](), dict[int, int]()
        for source, dataset in enumerate(self._datasets):
            if dataset.remote is not None:
                mine = rows.sources == source
                pieces = dataset.remote.pieces.of(rows.numbers[mine])
                distinct, first = np.unique(pieces, return_index=True)
                order = np.argsort(first)
                epochs = rows.epochs[mine][first[order]].tolist()
                for piece, epoch in zip((source * SOURCE + distinct[order]).tolist(), epochs):
                    needed[piece], new_epochs[piece] = self._sizes[source], epoch
        with self._wake:
            self._epochs |= new_epochs
            turn, new = self._ahead.planned, self._ahead.plan(needed)
            self._rows = len(rows.numbers)
        for piece in new:
            fetching = self._datasets[piece // SOURCE].remote
            if fetching is not None:
                fetching.ask(piece % SOURCE, turn)


Again = Callable[[int, int, int], float | None]
"""(source, epoch, sample) -> the turn of this worker in which the next epoch has about this sample; None: unknown."""


class Foreseen:
    """Micro batches whose bytes were asked for ahead."""

    def __init__(self, prepared: Prepared, foresight: Foresight) -> None:
        self._prepared, self._foresight = prepared, foresight

    def take(self) -> MicroBatch:
        micro = self._prepared.take()
        self._foresight.take()
        return micro

    def give_back(self) -> None:
        self._prepared.give_back()
        self._foresight.give_back()

    def close(self) -> None:
        self._foresight.close()
        self._prepared.close()


def _raising(error: BaseException) -> Plan:
    def plan() -> Rows:
        raise error

    return plan
