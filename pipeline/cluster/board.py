"""Where the workers of one attempt and the driver meet: the journal is written here, a stop is asked for here.

Under Ray it is an actor on the driver's node (so the driver reads the journal as a plain local file); with `workers:
0` it is a plain object in the same process. It also keeps each rank's last heartbeat, which says where a worker was
when it was lost.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pipeline.track.journal import Journal


class Board:
    """The journal's only writer during an attempt, and the stop flag."""

    def __init__(self, journal: Path, attempt: int) -> None:
        self._journal = Journal(journal, attempt)
        self._stop = False
        self._heartbeats: dict[int, tuple[float, dict[str, Any]]] = {}

    def deliver(self, rank: int, records: list[dict[str, Any]], where: dict[str, Any]) -> bool:
        """Append a worker's records durably, note its heartbeat, and answer whether it should stop."""
        self._heartbeats[rank] = (time.monotonic(), where)
        if records:
            self._journal.write_many(records)
            self._journal.sync()
        return self._stop

    def record(self, record: dict[str, Any]) -> None:
        """The driver's own records."""
        self._journal.write(record)
        self._journal.sync()

    def request_stop(self) -> None:
        """Ask all workers to finish their step, commit and leave."""
        self._stop = True

    def heartbeats(self) -> dict[int, dict[str, Any]]:
        """By rank: seconds since it was last heard, and its phase and step then."""
        now = time.monotonic()
        return {rank: {"silent_seconds": now - at, **where} for rank, (at, where) in sorted(self._heartbeats.items())}

    def close(self) -> None:
        self._journal.close()
