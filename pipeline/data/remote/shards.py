"""Shards at a URL: their index read at once, their tars by pieces that the node's cache keeps.

    piece asked for -> index of its shard, version of its tar (once, many at a time) -> bytes, from cache or store
                    -> mapped into the tar's span -> whoever needs its samples goes on

A tar is a `Span`: readers follow addresses in it as in a local one, after `RemoteTar.need`. Which pieces are asked for
before they are needed is foresight.py's. Bytes are checked where all samples are: by their digests, when they are read;
those of a piece that do not agree are fetched once more, past the cache, before a sample counts as bad.

What it gives up: a store that cannot be listed (http) is not compared with the index when it is opened, only tar by
tar; and a file that is changed at its place is noticed by its ETag where each answer has one, else by a digest.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from xxhash import xxh3_128_hexdigest

from pipeline.data.remote import cache_policy
from pipeline.data.remote.cache import Cache, Held, Place
from pipeline.data.remote.cache_policy import BLOCK_BYTES, IN_FLIGHT, Pieces
from pipeline.data.remote.crew import NOW, Crew, Wait
from pipeline.data.remote.span import PAGE, Span
from pipeline.data.root import Shard
from pipeline.data.segment import Segment
from pipeline.data.slow import Reads
from pipeline.errors import DataError
from pipeline.object_store import Absent, Changed, Info, Refused, open_store

TAR = ".tar"
LISTED = 5_000  # shards whose sizes are asked for when a data set is opened: a store lists 1,000 files a request


class Remote:
    """A URL as the storage of one data set. Threads may share it; closed, its threads end."""

    block_bytes = BLOCK_BYTES

    def __init__(self, url: str, place: Place | None = None) -> None:
        self.store, self.cache = open_store(url), Cache(place or Place())
        self.settings = place or Place()
        self.ahead_bytes = cache_policy.LEAST_AHEAD * BLOCK_BYTES
        self.reads: Reads = {}  # of each shard since `take_reads`
        self.fetched = 0  # bytes from the store
        self.maps = True  # what is asked for; else it is only brought into the cache, for other processes
        self.stopped = False  # nobody shall wait for anything now
        self._infos: dict[str, Info] | None = None
        self._lock, self._buffers = threading.Lock(), threading.local()
        self.heads, self.crew = Crew(2 * IN_FLIGHT, "head"), Crew(IN_FLIGHT, "fetch")

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the same for itself."""
        return Remote, (self.store.url, self.settings)

    @property
    def place(self) -> str:
        return self.store.url

    def map(self, name: str) -> memoryview:
        """A file as it is there now, past the cache: tars into a file without a name, all else into memory."""
        try:
            return self._whole(name) if name.endswith(TAR) else memoryview(self.store.read(name))
        except Absent as error:
            raise FileNotFoundError(str(error)) from error

    def sizes(self, expected: int = 0) -> dict[str, int] | None:
        if expected > LISTED:
            return None
        with suppress(Refused):  # files may be readable where lists are not
            self._infos = self.store.infos()
        infos = self._infos
        if infos is None:
            return None
        return {name: info.size for name, info in sorted(infos.items()) if name.endswith(TAR) and "/" not in name}

    def info(self, name: str) -> Info:
        """Size and version of a file; asked for once where files cannot be listed."""
        found = (self._infos or {}).get(name)
        return found or self.store.info(name)

    def segment(self, name: str, digest: str) -> memoryview:
        """The index of a tar, from the cache when it is there and good; else from the store."""
        kept = self.cache.small(digest)
        if kept is not None and xxh3_128_hexdigest(kept) == digest:
            return kept
        content = self.map(f"{name}.idx")
        self.cache.keep_small(digest, content)
        return content

    def ask_info(self, name: str) -> Wait:
        """`info`, by a thread."""
        wait, found = Wait(), (self._infos or {}).get(name)
        if found is not None or self._infos is not None:
            wait.do(lambda: found or self.info(name))
        else:
            self.crew.ask(wait, partial(self.info, name))
        return wait

    def fetch(self, name: str, version: str, begin: int, end: int) -> memoryview:
        """Bytes of a tar from the store, in memory that this thread's next call takes.

        Raises Changed when it is another one by now.
        """
        buffer = self._buffer(end - begin)
        began = time.perf_counter()
        found = self.store.fetch(name, begin, end, buffer)
        if found and version and found != version:
            raise Changed(
                f"{self.place}/{name}: was replaced at its place while it is read (ETag {version} -> {found}); what "
                "was trained on so far is the old one. Put it back, or start a new run on the new data"
            )
        with self._lock:
            self.fetched += end - begin
            read = self.reads.setdefault(f"{self.place}/{name}", [0, 0.0])
            read[0] += end - begin
            read[1] += time.perf_counter() - began
        return buffer

    def _buffer(self, size: int) -> memoryview:
        """Memory that is fresh costs a page fault for each 4 kB."""
        if size > 4 * BLOCK_BYTES:
            return memoryview(bytearray(size))
        kept = getattr(self._buffers, "kept", None)
        if kept is None or len(kept) < size:
            kept = self._buffers.kept = memoryview(bytearray(max(size, BLOCK_BYTES + (BLOCK_BYTES >> 1))))
        return kept[:size]

    def take_reads(self) -> Reads:
        """Bytes of each shard, and the seconds they took, since this was last asked."""
        with self._lock:
            reads, self.reads = self.reads, {}
        return reads

    def is_stopped(self) -> bool:
        return self.stopped

    def close(self) -> None:
        """Nothing more is fetched."""
        self.stopped = True
        self.heads.close()
        self.crew.close()
        self.store.close()

    def _whole(self, name: str) -> memoryview:
        info = self.store.info(name)
        try:
            with tempfile.TemporaryFile(dir=self.cache.folder) as file:
                os.posix_fallocate(file.fileno(), 0, max(info.size, 1))
                waiting: list[Wait] = []
                for begin in range(0, info.size, BLOCK_BYTES):
                    waiting.append(Wait())
                    end = min(begin + BLOCK_BYTES, info.size)
                    work = partial(self._part, file.fileno(), name, info.version, begin, end)
                    self.crew.ask(waiting[-1], work)
                for wait in waiting:
                    wait.result()
                if not info.size:
                    return memoryview(b"")
                return memoryview(mmap.mmap(file.fileno(), info.size, access=mmap.ACCESS_READ))
        except OSError as error:
            mend = "free some space there, or set data.cache (TMPDIR) to another folder"
            raise DataError(f"{self.cache.folder}: no room for a copy of {name} ({error.strerror}); {mend}") from error

    def _part(self, file: int, name: str, version: str, begin: int, end: int) -> None:
        os.pwrite(file, self.fetch(name, version, begin, end), begin)


class RemoteTar:
    """The tar of one shard, of which pieces come as they are needed. number: of the shard."""

    def __init__(self, remote: Remote, number: int, shard: Shard, found: Segment, version: str, pieces: Pieces) -> None:
        self.remote, self.number, self.shard, self.version = remote, number, shard, version
        self.span = Span(shard.bytes)
        self._key = remote.cache.key(f"{remote.place}/{shard.name}", f"{version} {shard.bytes}")
        self._block, self._start = pieces.block, int(pieces.starts[number])
        self._first = self._start // pieces.block
        self.extents = self._extents(found)
        self._lock = threading.Lock()
        self._waits: dict[int, Wait] = {}  # block -> under way
        self._here: dict[int, None] = {}  # in the order in which they came

    def need(self, rows: np.ndarray | int) -> None:
        """Wait until the bytes of samples, int64[k] rows, are here. Raises what kept them from coming."""
        blocks = (self._start + rows) // self._block - self._first
        wanted = [blocks] if isinstance(blocks, int) else np.unique(blocks).tolist()
        missing = [block for block in wanted if block not in self._here]
        for wait in [self.ask(block) for block in missing]:
            wait.result(self.remote.is_stopped)

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

    def is_settled(self, block: int) -> bool:
        """Whether a block that was asked for has come, or has failed."""
        wait = self._waits.get(block)
        return block in self._here or (wait is not None and wait.is_done)

    def again(self, row: int) -> None:
        """Fetch the piece of a sample past the cache: its bytes are not those that were indexed.

        Raises Changed when the tar is another one by now.
        """
        block = (self._start + row) // self._block - self._first
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
        if here and not any(self.extents[other] == (begin, end) for other in self._here):
            self.span.drop(begin, end)
        if next_use is not None:
            self.remote.cache.expect(self._key, begin, end, next_use)

    def _bring(self, block: int) -> None:
        begin, end = self.extents[block]
        held = self._get(begin, end)
        if self.remote.maps:
            self._map(begin, end, held)
            with self._lock:
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
        size = self.shard.bytes
        if cache_policy.is_scattered(begins, ends, size):
            return [(0, size)] * len(firsts)
        pairs = zip(begins.tolist(), ends.tolist())
        return [cache_policy.extent(begin, max(end, begin + 1), size, PAGE) for begin, end in pairs]
