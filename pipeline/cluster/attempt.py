"""What the driver knows of an attempt, and the plainest one: in the driver's own process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pipeline.cluster import worker
from pipeline.cluster.board import Board
from pipeline.config import Config


class Attempt(Protocol):
    """One fit of fixed world size: under Ray, or in this process.

    signal: to the worker of a heartbeat; its state before.  fate: what became of a worker that is gone, from its last
    heartbeat and what ended the attempt.  capacity: workers that could be held now.  leaving: hosts of its workers that
    are about to go.
    """

    number: int
    folder: Path
    workers: int

    def run(self) -> BaseException | None: ...
    def record(self, record: dict[str, Any]) -> None: ...
    def request_stop(self) -> None: ...
    def heartbeats(self) -> dict[int, dict[str, Any]]: ...
    def signal(self, beat: Mapping[str, Any], number: int) -> str: ...
    def fate(self, rank: int, beat: Mapping[str, Any], error: BaseException) -> str: ...
    def capacity(self) -> int: ...
    def leaving(self) -> list[str]: ...
    def close(self) -> None: ...


class Solo:
    """An attempt in this very process, for debugging: no Ray, one rank; breakpoints work."""

    def __init__(self, config: Config, folder: Path, number: int, new_order: bool) -> None:
        self.config, self.folder, self.number, self.new_order = config, folder, number, new_order
        self.workers = 0
        self.board = Board(folder / "journal.jsonl", number)
        self.record, self.close = self.board.record, self.board.close
        self.request_stop, self.heartbeats = self.board.request_stop, self.board.heartbeats

    def signal(self, beat: Mapping[str, Any], number: int) -> str:
        raise NotImplementedError("one process alone is not watched: it may stand at a breakpoint")

    def fate(self, rank: int, beat: Mapping[str, Any], error: BaseException) -> str:
        raise NotImplementedError("one process alone is not lost without its driver")

    def capacity(self) -> int:
        return 0

    def leaving(self) -> list[str]:
        return []

    def run(self) -> BaseException | None:
        try:
            worker.run(self.config, self.folder, self.number, self.board.deliver, self.new_order)
        except Exception as error:
            return error
        return None
