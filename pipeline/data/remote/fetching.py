"""The shards of a data set at a URL that are open: their indexes here, their tars coming in pieces.

Shards are opened many at a time (each costs a request or two), and pieces are asked for as soon as their shard is open.
What a reader needs at once goes before what was asked for ahead.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from functools import cached_property, partial

import numpy as np

from pipeline.data.index import Index
from pipeline.data.remote.cache_policy import Pieces
from pipeline.data.remote.crew import NOW, Wait
from pipeline.data.remote.shards import Remote
from pipeline.data.remote.tar import RemoteTar
from pipeline.data.segment import Segment
from pipeline.errors import DataError


class Fetching:
    """What has been asked for of one data set. Threads share it. block: samples that are fetched in one piece."""

    def __init__(self, index: Index, remote: Remote, block: int) -> None:
        self.remote = remote
        self._index, self._block = index, block
        self._shards: dict[int, Wait] = {}
        self._begun: list[tuple[Wait, np.ndarray]] = []  # shards and rows in them that come by themselves
        self._first = np.empty(0, np.int64)  # those samples
        self._lock = threading.Lock()

    @cached_property
    def pieces(self) -> Pieces:
        return Pieces(self._index.starts, self._block)

    def open(self, shard: int) -> tuple[Segment, RemoteTar]:
        """Wait until a shard is open. Raises StoreError when the store fails, another DataError for a bad shard."""
        return self._asked(shard, NOW).result(self.remote.is_stopped)

    def open_ahead(self, shards: list[int]) -> None:
        """Have shards opened that are needed together now."""
        for shard in shards:
            self._asked(shard, NOW)

    def ask(self, piece: int, turn: float = NOW) -> None:
        """Have a piece fetched, before what has a later turn; errors are for who needs it."""
        block = self.pieces.block_in(piece)

        def ask(opened: tuple[Segment, RemoteTar]) -> None:
            with suppress(RuntimeError):  # closed meanwhile
                opened[1].ask(block, turn)

        self._asked(self.pieces.rows(piece)[0], turn).afterwards(ask)

    def begin(self, numbers: np.ndarray) -> None:
        """Have samples int64[k] fetched before all others, by themselves where their pieces are much larger."""
        self._first = numbers
        shards, rows = self._index.places(numbers)
        self._begun = [(self._asked(shard, NOW), rows[shards == shard]) for shard in np.unique(shards).tolist()]
        for wait, mine in self._begun:
            wait.afterwards(partial(self._ask_rows, mine))  # as soon as it is open

    def wait_begun(self) -> None:
        """Wait until they are here, or cannot be had: whoever needs them is told. RuntimeError once closed."""
        for wait, rows in self._begun:
            with suppress(DataError):
                for each in wait.result(self.remote.is_stopped)[1].ask_rows(rows):
                    with suppress(DataError):
                        each.result(self.remote.is_stopped)
        self._begun = []

    def _ask_rows(self, rows: np.ndarray, opened: tuple[Segment, RemoteTar]) -> None:
        with suppress(RuntimeError):  # closed meanwhile
            opened[1].ask_rows(rows)

    def ask_all(self, numbers: np.ndarray) -> None:
        """Have all samples int64[k] fetched now."""
        for piece in np.unique(self.pieces.of(numbers[~np.isin(numbers, self._first)])).tolist():
            self.ask(piece)

    def release(self, piece: int, next_use: float | None = None) -> None:
        """Nobody reads a piece now; it is needed next at `next_use`, in seconds since 1970, None: unknown."""
        tar = self._tar(self.pieces.rows(piece)[0])
        if tar is not None:
            tar.release(self.pieces.block_in(piece), next_use)

    def settle(self, most: int) -> None:
        """Let go of all pieces but the `most` that were opened last. Nobody may be reading."""
        tars = [tar for shard in list(self._shards) if (tar := self._tar(shard))]
        there = [(tar, block) for tar in tars for block in tar.blocks]
        for tar, block in there[: max(0, len(there) - most)]:
            tar.release(block)

    def forget(self, shard: int) -> None:
        """Let go of a shard; what is still looked at stays as long as somebody does."""
        with self._lock:
            self._shards.pop(shard, None)

    def _tar(self, shard: int) -> RemoteTar | None:
        wait = self._shards.get(shard)
        return wait.result()[1] if wait is not None and wait.is_done and wait.error is None else None

    def _asked(self, shard: int, turn: float) -> Wait:
        with self._lock:
            wait = self._shards.get(shard)
            if wait is None or wait.error is not None:
                wait = self._shards[shard] = Wait()
                self.remote.heads.ask(wait, partial(self._open, shard), turn)
            elif turn < wait.turn and not wait.begun:
                self.remote.heads.ask(wait, partial(self._open, shard), turn)
            return wait

    def _open(self, shard: int) -> tuple[Segment, RemoteTar]:
        noted = self._index.shards[shard]
        asked = self.remote.ask_info(noted.name)
        segment = self._index.segment(shard)
        info = asked.result(self.remote.is_stopped)
        if info.size != noted.bytes:
            place = self._index.tar_path(shard)
            raise DataError(f"{place}: had {noted.bytes} bytes when it was indexed, has {info.size}; send it again")
        return segment, RemoteTar(self.remote, shard, noted, segment, info.version, self.pieces)
