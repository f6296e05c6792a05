"""The tar of one shard at a URL, of which pieces come as they are needed.

    sample needed -> its piece asked for, by a thread -> bytes, from cache or store -> mapped into the tar's span

A tar is a `Span`: readers follow addresses in it as in a local one, after `RemoteTar.need`. Bytes are checked where all
samples are: by their digests, when they are read; those of a piece that do not agree are fetched once more, past the
cache, before a sample counts as bad. Samples that training waits for at its start come by themselves, before the piece
that has them: some kB instead of some MB each.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from functools import partial
from itertools import pairwise

import numpy as np

from pipeline.data.remote import cache_policy
from pipeline.data.remote.cache import Held
from pipeline.data.remote.cache_policy import Pieces
from pipeline.data.remote.crew import NOW, Wait
from pipeline.data.remote.shards import Remote
from pipeline.data.remote.span import PAGE, Span
from pipeline.data.root import Shard
from pipeline.data.segment import Segment
from pipeline.errors import DataError
from pipeline.object_store import Changed


class RemoteTar:
    """The tar of one shard, of which pieces come as they are needed. number: of the shard."""

    def __init__(self, remote: Remote, number: int, shard: Shard, found: Segment, version: str, pieces: Pieces) -> None:
        self.remote, self.number, self.shard, self.version = remote, number, shard, version
        self.span = Span(shard.bytes)
        self._key = remote.cache.key(f"{remote.place}/{shard.name}", f"{version} {shard.bytes}")
        self._block, self._start = pieces.block, int(pieces.starts[number])
        self._first, self._segment = self._start // pieces.block, found
        self.extents = self._extents(found)
        self._apart = all(begin >= end - PAGE for (_, end), (begin, _) in pairwise(self.extents))
        self._lock = threading.Lock()
        self._waits: dict[int, Wait] = {}  # block -> under way
        self._here: dict[int, None] = {}  # in the order in which they came
        self._laid: dict[int, Wait] = {}  # rows that come before their block

    def need(self, rows: np.ndarray | int) -> None:
        """Wait until the bytes of samples, int64[k] rows, are here. Raises what kept them from coming."""
        missing = {}
        for row in [rows] if isinstance(rows, int) else rows.tolist():
            block = self._block_of(row)
            if block not in self._here and not self._is_laid(row):
                missing[block] = None
        for wait in [self.ask(block) for block in missing]:
            wait.result(self.remote.is_stopped)

    def ask_rows(self, rows: np.ndarray) -> list[Wait]:
        """Have samples, int64[k] rows, fetched now: by themselves where they are a small part of their piece."""
        by_block: dict[int, list[int]] = {}
        for row in rows.tolist():
            by_block.setdefault(self._block_of(row), []).append(row)
        return [wait for block, mine in by_block.items() for wait in self._ask_rows(block, mine)]

    def _ask_rows(self, block: int, rows: list[int]) -> list[Wait]:
        first = (self._first + block) * self._block - self._start
        samples = min(first + self._block, self._segment.samples) - max(first, 0)
        alone = self._apart and cache_policy.by_themselves(len(rows), samples)
        if not alone or self._is_kept(*self.extents[block]):
            return [self.ask(block)]
        with self._lock:
            for row in rows:
                if row not in self._laid:
                    wait = self._laid[row] = Wait()
                    self.remote.heads.ask(wait, partial(self._lay, block, *self._pages_of(row)))
            return [self._laid[row] for row in rows]

    def _lay(self, block: int, begin: int, end: int) -> None:
        content = self.remote.fetch(self.shard.name, self.version, begin, end)
        with self._lock:
            if block not in self._here:
                self.span.lay(begin, end, content)

    def _is_kept(self, begin: int, end: int) -> bool:
        file = self.remote.cache.find(self._key, begin, end)
        if file is not None:
            os.close(file)
        return file is not None

    def _is_laid(self, row: int) -> bool:
        """Waits for a sample that was asked for by itself; False when it was not, or did not come."""
        wait = self._laid.get(row)
        with suppress(DataError):  # its piece is asked for then
            if wait is not None:
                wait.result(self.remote.is_stopped)
                return True
        return False

    def _block_of(self, row: int) -> int:
        return (self._start + row) // self._block - self._first

    def ask(self, block: int, turn: float = NOW) -> Wait:
        """Have a block (from 0, of those in this shard) fetched and mapped, before what has a later turn."""
        with self._lock:
            wait = self._waits.get(block)
            if wait is None or wait.error is not None:
                wait = self._waits[block] = Wait()
                self.remote.crew.ask(wait, partial(self._bring, block), turn)
            elif turn < wait.turn and not wait.begun:
                self.remote.crew.ask(wait, partial(self._bring, block), turn)
            return wait

    def again(self, row: int) -> None:
        """Fetch the piece of a sample past the cache: its bytes are not those that were indexed.

        Raises Changed when the tar is another one by now.
        """
        block = self._block_of(row)
        if block not in self._here:  # the sample came before it
            self.ask(block).result(self.remote.is_stopped)
        begin, end = self.extents[block]
        self.remote.cache.remove(self._key, begin, end)
        now = self.remote.store.info(self.shard.name)
        if now.version != self.version:
            raise Changed(
                f"{self.remote.place}/{self.shard.name}: was replaced at its place while it is read; put it back, or "
                "start a new run on the new data"
            )
        self._map(begin, end, self._get(begin, end), again=True)

    @property
    def blocks(self) -> list[int]:
        """Those that are here, the one that came first first."""
        return [*self._here]

    def release(self, block: int, next_use: float | None = None) -> None:
        """Nobody reads this block now; it is needed next at `next_use`, in seconds since 1970, None: unknown."""
        begin, end = self.extents[block]
        with self._lock:
            self._waits.pop(block, None)
            here = block in self._here
            self._here.pop(block, None)
            for row in [row for row in self._laid if self._block_of(row) == block]:
                del self._laid[row]
        if here and not any(self.extents[other] == (begin, end) for other in self._here):
            self.span.drop(begin, end)
        if next_use is not None:
            self.remote.cache.expect(self._key, begin, end, next_use)

    def _bring(self, block: int) -> None:
        begin, end = self.extents[block]
        held = self._get(begin, end)
        with self._lock:
            if self.remote.maps and block in self._waits:  # it was not let go of meanwhile
                self._map(begin, end, held)
                self._here[block] = None
            elif held.content is None:
                os.close(held.file)

    def _get(self, begin: int, end: int) -> Held:
        load = partial(self.remote.fetch, self.shard.name, self.version)
        return self.remote.cache.get(self._key, begin, end, load)

    def _map(self, begin: int, end: int, held: Held, again: bool = False) -> None:
        if held.content is not None:
            self.span.fill(begin, end, held.content, again)
            return
        try:
            self.span.map(begin, end, held.file, again)
        finally:
            os.close(held.file)

    def _extents(self, found: Segment) -> list[tuple[int, int]]:
        """The bytes of each block in this shard."""
        rows = np.arange(found.samples)
        firsts = np.flatnonzero(np.diff((self._start + rows) // self._block, prepend=-1))  # first row of each block
        fields = found.first_fields[firsts].astype(np.int64)
        offsets, lengths = (found.table[name].astype(np.int64) for name in ("offset", "length"))
        begins, ends = np.minimum.reduceat(offsets, fields), np.maximum.reduceat(offsets + lengths, fields)
        if cache_policy.is_scattered(begins, ends, self.shard.bytes):
            return [(0, self.shard.bytes)] * len(firsts)
        return [self._extent(*pair) for pair in zip(begins.tolist(), ends.tolist())]

    def _pages_of(self, row: int) -> tuple[int, int]:
        """The bytes of all fields of a sample, in whole pages."""
        fields = self._segment.table[self._segment.first_fields[row] : self._segment.first_fields[row + 1]]
        offsets, lengths = (fields[name].astype(np.int64) for name in ("offset", "length"))
        return self._extent(int(offsets.min()), int((offsets + lengths).max()))

    def _extent(self, begin: int, end: int) -> tuple[int, int]:
        return cache_policy.extent(begin, max(end, begin + 1), self.shard.bytes, PAGE)
