"""Watches one attempt while it runs: passes on a stop, ends it when a worker has stalled, and asks it to commit and
leave when another number of workers is better: a host is about to go, or hosts have come back.
"""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

from pipeline.cluster import watchdog
from pipeline.cluster.attempt import Attempt, Solo
from pipeline.config import Config


class Ended(NamedTuple):
    """What ended an attempt, if it failed, and why it was asked to leave, if not by a person."""

    error: BaseException | None
    resize: str = ""


def supervise(attempt: Attempt, stop: threading.Event, config: Config) -> Ended:
    """Run an attempt to its end."""
    if isinstance(attempt, Solo):  # stays in the main thread, where a debugger is at home
        watcher = threading.Thread(target=lambda: stop.wait() and attempt.request_stop(), daemon=True)
        watcher.start()
        return Ended(attempt.run())
    ended: list[BaseException | None] = []
    fit = threading.Thread(target=lambda: ended.append(attempt.run()), name="fit", daemon=True)
    fit.start()
    told = stalled = False
    resize, room_since = "", None
    look_at = time.monotonic() + watchdog.LOOK_SECONDS
    while fit.is_alive():
        now = time.monotonic()
        if now > look_at and not stalled:
            stalled = watchdog.look(attempt, config.guard.stall)
            room_since = (room_since or now) if attempt.capacity() > attempt.workers else None
            if leaving := attempt.leaving():
                resize = f"{' and '.join(leaving)} is about to leave"
            elif room_since and now - room_since >= config.cluster.grow_seconds:
                resize = f"there is room for {attempt.capacity()} workers"
            look_at = now + watchdog.LOOK_SECONDS  # however long this one took
        if (stop.is_set() or resize) and not told:
            if resize and not stop.is_set():
                attempt.record({"kind": "resize", "message": f"{resize}: finishing the step and saving"})
            attempt.request_stop()
            told = True
        fit.join(timeout=0.1)
    return Ended(ended[0], resize)
