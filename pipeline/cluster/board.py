"""Where the workers of one attempt and the driver meet: the journal is written here, a stop is asked for here.

Under Ray it is an actor on the driver's node (so the driver reads the journal as a plain local file); with `workers:
0` it is a plain object in the same process. It also keeps each rank's last heartbeat, which says where a worker was
when it was lost, and notes now and then how the ranks have spent their time.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pipeline.track.journal import HEAD, Journal, as_read, read

REMEMBERED = 1000  # records; more are never on their way at once
SPENT_SECONDS = 30.0  # how often it is noted how the ranks' time was spent: so much of it is lost with a driver


class Board:
    """The journal's only writer during an attempt, and the stop flag."""

    def __init__(self, journal: Path, attempt: int) -> None:
        self._journal = Journal(journal, attempt)
        self._stop = False
        self._known: list[dict[str, Any]] = []
        self._heartbeats: dict[int, tuple[float, dict[str, Any]]] = {}
        self._noted = time.monotonic()

    def remember(self) -> None:
        """Started anew within an attempt: what comes once more, since nobody had said that it was written, is known."""
        records = read(self._journal.path).records
        mine = [record for record in records if record["attempt"] == self._journal.attempt][-REMEMBERED:]
        self._known = [{key: value for key, value in record.items() if key not in HEAD} for record in mine]

    def deliver(self, rank: int, records: list[dict[str, Any]], where: dict[str, Any]) -> bool:
        """Append a worker's records durably, note its heartbeat, and answer whether it should stop."""
        self._heartbeats[rank] = (time.monotonic(), where)
        if time.monotonic() - self._noted > SPENT_SECONDS:
            self._note_spent()
        self._write(records)
        return self._stop

    def record(self, record: dict[str, Any]) -> None:
        """The driver's own records."""
        self._write([record])

    def request_stop(self) -> None:
        """Ask all workers to finish their step, commit and leave."""
        self._stop = True

    def heartbeats(self) -> dict[int, dict[str, Any]]:
        """By rank: `silent_seconds` since it was last heard, and what it said then (session.Phases.heartbeat)."""
        now = time.monotonic()
        return {rank: {"silent_seconds": now - at, **where} for rank, (at, where) in sorted(self._heartbeats.items())}

    def close(self) -> None:
        """Note how the time was spent, and close the journal."""
        self._note_spent()
        self._journal.close()

    def _write(self, records: list[dict[str, Any]]) -> None:
        new = [record for record in records if not self._known or as_read(record) not in self._known]
        if new:
            self._journal.write_many(new)
            self._journal.sync()

    def _note_spent(self) -> None:
        """By rank, since its worker began: seconds in each phase, and `silent`, since it was last heard."""
        self._noted = time.monotonic()
        ranks = {rank: beat["spent"] | {"silent": beat["silent_seconds"]} for rank, beat in self.heartbeats().items()}
        if ranks:
            self._journal.write({"kind": "time", "ranks": ranks})
