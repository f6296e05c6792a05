"""A URL as the storage of a data set: indexes read at once, tars by pieces that the node's cache keeps.

    piece asked for -> index of its shard, version of its tar (once, many at a time: fetching.py)
                    -> bytes, from cache or store (tar.py) -> whoever needs its samples goes on

Which pieces are asked for before they are needed is foresight.py's.

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
from pipeline.data.remote.cache import Cache, Place
from pipeline.data.remote.cache_policy import BLOCK_BYTES, IN_FLIGHT, SMALL_IN_FLIGHT
from pipeline.data.remote.crew import Crew, Wait
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
        self.heads, self.looks = (Crew(SMALL_IN_FLIGHT, name) for name in ("head", "look"))
        self.crew = Crew(IN_FLIGHT, "fetch")

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
            self.looks.ask(wait, partial(self.info, name))  # by other threads than `heads`, which wait for it
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
        if not BLOCK_BYTES >> 3 < size <= 4 * BLOCK_BYTES:  # one sample; or what is not worth keeping for the next
            return np.empty(size, np.uint8).data
        kept = getattr(self._buffers, "kept", None)
        if kept is None or len(kept) < size:
            room = max(size, BLOCK_BYTES + (BLOCK_BYTES >> 1))
            kept = self._buffers.kept = np.empty(room, np.uint8).data
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
        for crew in (self.heads, self.looks, self.crew):
            crew.close()
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
