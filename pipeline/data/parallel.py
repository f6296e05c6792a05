"""Do one thing to many items, in several processes or threads, and have the results in the order of the items.

Whoever works through shards takes a Mapping: Python's own `map`, `processes(n)`, `threads(n)`, or one that runs on
other machines.
Only a few items are under way at a time, so a million of them need no memory.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from pipeline.errors import DataError

Mapping = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""Called with (function, items), yields function(item) in the order of the items; both can be pickled."""

AHEAD = 4  # items under way for each worker


def processes(workers: int) -> Mapping:
    """A Mapping over so many processes; this one alone when `workers` is 1. DataError when one of them is killed."""
    return map if workers <= 1 else partial(_over_processes, workers)


def threads(count: int) -> Mapping:
    """A Mapping over so many threads, for functions that mostly wait or do without the GIL; this one when it is 1."""
    return map if count <= 1 else partial(_over_threads, count)


def ahead(submit: Callable[[Any], Any], items: Iterable[Any], depth: int) -> Iterator[Any]:
    """`submit(item)` of every item, in order, the next `depth` of them submitted already."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(submit(item))
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting


def _over_threads(count: int, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    pool = ThreadPoolExecutor(count)
    try:
        futures: Iterator[Future[Any]] = ahead(partial(pool.submit, function), items, count)
        for future in futures:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _over_processes(workers: int, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    items = list(items)
    if len(items) < 2:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")  # no fork: the caller may have threads
    pool = ProcessPoolExecutor(min(workers, len(items)), context, initializer=_end_with_parent)
    try:
        futures: Iterator[Future[Any]] = ahead(partial(pool.submit, function), items, AHEAD * workers)
        for future in futures:
            yield future.result()
    except BrokenProcessPool:
        raise DataError(
            "a process that read shards was ended by the system, often because memory ran out or a file was cut "
            "while it was read; try again with --workers 1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Ctrl-C is the parent's to handle; and when the parent is killed, nobody else would end its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
