"""Threads that fetch: what is wanted at once comes before what is asked for ahead, and nobody waits for their end.

They end with their process (daemon threads), so a request that hangs holds up nothing.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from typing import Any

NOW = -1.0  # the turn of what somebody waits for
STOP_SECONDS = 0.2  # how often who waits looks whether it still shall


class Wait:
    """Something that a thread does, and others wait for."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._value: Any = None
        self._then: list[Callable[[Any], Any]] = []
        self._lock = threading.Lock()
        self.error: BaseException | None = None
        self.turn, self.begun = NOW, False  # its place in a crew's work

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def do(self, work: Callable[[], Any]) -> None:
        try:
            self._value = work()
            while True:
                with self._lock:
                    if not self._then:
                        self._done.set()
                        return
                    then = self._then.pop(0)
                then(self._value)
        except BaseException as error:  # who waits raises it
            self.error = error
            with self._lock:
                self._done.set()

    def afterwards(self, then: Callable[[Any], Any]) -> None:
        """Call this with the value, once it is there and before anybody goes on; not at all when it does not come."""
        with self._lock:
            if not self._done.is_set():
                self._then.append(then)
                return
        if self.error is None:
            then(self._value)

    def result(self, stopped: Callable[[], bool] = lambda: False) -> Any:
        """What came of it. Raises what it raised, and RuntimeError when it shall not be waited for any more."""
        while not self._done.wait(STOP_SECONDS):
            if stopped():
                raise RuntimeError("the loader is closed")
        if self.error is not None:
            raise self.error
        return self._value


class Crew:
    """So many threads, started when there is work for them."""

    def __init__(self, threads: int, name: str) -> None:
        self._most, self._name = threads, name
        self._asked: list[tuple[float, int, Wait, Callable[[], Any]]] = []  # a heap
        self._count = itertools.count()
        self._wake = threading.Condition()
        self._threads, self._idle, self._closed = 0, 0, False

    def ask(self, wait: Wait, work: Callable[[], Any], turn: float = NOW) -> None:
        """Have something done that others wait for, in the order of turns. RuntimeError once closed.

        Asked again with an earlier turn, it comes then, and is done once.
        """
        with self._wake:
            if self._closed:
                raise RuntimeError("the data set is closed")
            heapq.heappush(self._asked, (turn, next(self._count), wait, work))
            wait.turn = turn
            if self._idle < len(self._asked) and self._threads < self._most:
                self._threads += 1
                threading.Thread(target=self._work, name=f"{self._name} {self._threads}", daemon=True).start()
            self._wake.notify()

    def close(self) -> None:
        """What has not begun is not done; what is under way ends by itself."""
        with self._wake:
            self._closed = True
            self._asked.clear()
            self._wake.notify_all()

    def _work(self) -> None:
        while True:
            with self._wake:
                self._idle += 1
                self._wake.wait_for(lambda: self._asked or self._closed)
                self._idle -= 1
                if self._closed:
                    return
                _, _, wait, work = heapq.heappop(self._asked)
                if wait.begun:
                    continue
                wait.begun = True
            wait.do(work)
