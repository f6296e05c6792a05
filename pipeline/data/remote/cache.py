"""Pieces of remote files on the disk of a node, shared by all its processes and jobs, and bounded in bytes.

    FOLDER/v1/<hash of URL and version>/<begin>-<end>      bytes begin to end of that file; whole or absent

A piece is written beside its place and renamed, so what is there is whole; who dies while writing leaves a `.part` that
the next one takes over. Its writer holds a lock on that (flock), which the kernel frees with the process: others wait
for the piece instead of fetching it too, but never for one that does not move. A removed piece stays readable for those
that have it mapped. The time of a file (mtime) is the time at which its next use is expected; when the cache is full,
those go first whose time is farthest (cache_policy.py). The count of bytes is in one file, and is set right at every
eviction.

A disk that is full, or cannot be written to, is told once; then pieces are kept in memory by who reads them, and
nothing is lost. What it gives up: nothing waits for the disk (no fsync), so after a power failure a piece may hold
other bytes. The digest of each sample tells, and the piece is fetched again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.data.remote import cache_policy
from pipeline.errors import DataError

BYTES = 32 << 30  # of a cache, by default
VERSION, SMALL = "v1", "index"  # folders: of all, and in it of small files
USED = struct.Struct("<q")
WAIT_SECONDS = 10.0  # for another process's piece that does not grow
POLL_SECONDS = 0.005
WRITE_BYTES = 256 << 10  # at a time: of more, Linux 6.18 on a virtual machine made twice the system time
AGAIN_SECONDS = 30.0  # until a cache that took no more is tried again
LEFT_SECONDS = 3600.0  # after which a piece that was not finished is nobody's
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
LATEST = 2**33  # seconds since 1970: the time of what is not needed again

Load = Callable[[int, int], memoryview]  # (begin, end) -> the bytes of a file


class Place(NamedTuple):
    """Where a node keeps pieces, and how many bytes of them at most. folder: None: below the system's temporary one."""

    folder: Path | None = None
    bytes: int = BYTES


class Held(NamedTuple):
    """A piece: an open file (its reader closes it), or, where it could not be kept, its bytes. loaded: just now."""

    file: int
    content: memoryview | None
    loaded: bool


class Cache:
    """The pieces of one node. Threads and processes share it."""

    def __init__(self, place: Place) -> None:
        base = place.folder or Path(tempfile.gettempdir()) / f"millstream-cache-{os.getuid()}"
        self.folder, self.bytes = base / VERSION, place.bytes
        self.trouble: str | None = None  # why pieces are not kept, in words, until somebody has taken it
        self._told, self._again = False, 0.0
        self._lock = threading.Lock()
        try:
            base.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.folder.mkdir(exist_ok=True)
            if place.folder is None and base.stat().st_uid != os.getuid():
                raise DataError(f"{base} is another user's: set data.cache to a folder of your own")
        except OSError as error:
            self._tell(error)

    def is_off(self) -> bool:
        """Whether pieces are kept in memory only, for now."""
        return time.monotonic() < self._again

    def take_trouble(self) -> str | None:
        """Why pieces are not kept, in words; once."""
        trouble, self.trouble = self.trouble, None
        return trouble

    def key(self, url: str, version: str) -> str:
        """The folder of a file's pieces."""
        return hashlib.sha256(f"{url}\n{version}".encode()).hexdigest()[:32]

    def find(self, key: str, begin: int, end: int) -> int | None:
        """An open file with these bytes; None when they are not here, or not all of them."""
        path = self.folder / key / f"{begin}-{end}"
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        if os.fstat(file).st_size == end - begin:
            return file
        os.close(file)
        self.remove(key, begin, end)
        return None

    def get(self, key: str, begin: int, end: int, load: Load, next_use: float = 0.0) -> Held:
        """These bytes of a file, from here or loaded. next_use: seconds since 1970, 0: now.

        Raises what `load` raises.
        """
        file = self.find(key, begin, end)
        if file is not None:
            return Held(file, None, False)
        with self._claim(key, begin, end) as claim:
            file = self.find(key, begin, end)  # another one has just been faster
            if file is not None:
                return Held(file, None, False)
            content = load(begin, end)
            if claim is not None:
                try:
                    return Held(self._keep(claim, key, begin, end, content, next_use or time.time()), None, True)
                except OSError as error:
                    self._tell(error)
            return Held(-1, memoryview(bytes(content)), True)

    def small(self, name: str) -> memoryview | None:
        """A whole file that was kept by a name that follows from its content."""
        with suppress(OSError):
            return memoryview((self.folder / SMALL / name).read_bytes())

    def keep_small(self, name: str, content: memoryview) -> None:
        """Keep a whole file, if there is room."""
        path = self.folder / SMALL / name
        part = path.with_name(f"{name}.{os.getpid()}-{threading.get_ident()}.part")
        with suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            try:
                part.write_bytes(content)
                part.rename(path)
                self._count(len(content))
            except OSError:
                part.unlink()

    def remove(self, key: str, begin: int, end: int) -> None:
        """Forget a piece, such as one that is damaged."""
        with suppress(OSError):
            path = self.folder / key / f"{begin}-{end}"
            size = path.stat().st_size
            path.unlink()
            self._count(-size)

    def expect(self, key: str, begin: int, end: int, next_use: float) -> None:
        """Say when a piece is needed next, in seconds since 1970."""
        with suppress(OSError):
            os.utime(self.folder / key / f"{begin}-{end}", (time.time(), min(next_use, LATEST)))

    @contextmanager
    def _claim(self, key: str, begin: int, end: int) -> Iterator[int | None]:
        """An open, locked, empty file to write a piece to; None when the piece is not to be kept.

        Waits for another process that is at it; not for one that does not get on.
        """
        path, file = self.folder / key / f"{begin}-{end}.part", None
        seen, since = -1, time.monotonic()
        try:
            while file is None and time.monotonic() >= self._again:
                if (file := self._locked(path)) is not None:
                    break
                with suppress(OSError):
                    size = path.stat().st_size
                    seen, since = (size, time.monotonic()) if size != seen else (seen, since)
                if time.monotonic() - since > WAIT_SECONDS or (path.parent / f"{begin}-{end}").exists():
                    break
                time.sleep(POLL_SECONDS)
            yield file
        finally:
            if file is not None:
                with suppress(OSError):
                    if os.path.samestat(os.stat(path), os.fstat(file)):  # nobody put it in its place
                        path.unlink()
                os.close(file)

    def _locked(self, path: Path) -> int | None:
        try:
            path.parent.mkdir(exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            return None  # its folder was removed meanwhile
        except OSError as error:
            self._tell(error)
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(path).st_ino == os.fstat(file).st_ino:
                return file
        except (BlockingIOError, FileNotFoundError):  # another is at it, or has just put it in its place
            pass
        except OSError:  # a file system without locks: whoever is first puts it in its place
            return file
        os.close(file)
        return None

    def _keep(self, file: int, key: str, begin: int, end: int, content: memoryview, next_use: float) -> int:
        """Write a piece to its claim, and put it in its place; a new descriptor of it."""
        path = self.folder / key / f"{begin}-{end}"
        part = path.with_name(f"{path.name}.part")
        try:
            os.ftruncate(file, 0)
            self._write(file, content)
            os.utime(file, (time.time(), min(next_use, LATEST)))
            part.rename(path)
        except OSError:
            with suppress(OSError):
                part.unlink()
            if not path.exists():
                raise
        if self._count(end - begin) > self.bytes:
            self.evict()
        return os.dup(file)

    def _write(self, file: int, content: memoryview) -> None:
        """Once more after an eviction when the disk is full: others may fill it too."""
        for again in (True, False):
            try:
                done = 0
                while done < len(content):
                    done += os.pwrite(file, content[done : done + WRITE_BYTES], done)
                return
            except OSError as error:
                if not again or error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self.evict(4 * len(content)):
                    raise

    def evict(self, spare: int = 0) -> int:
        """Remove the least useful pieces until the cache is not full, and `spare` bytes more; how many bytes went."""
        with self._counting() as counter:
            found = list(self._pieces())
            sizes = np.array([info.st_size for _, info in found], np.int64)
            used = int(sizes.sum())
            too_much = max(used - int(self.bytes * cache_policy.FILLED) if used > self.bytes else 0, spare)
            uses = np.array([info.st_mtime if info.st_mtime < LATEST else cache_policy.NEVER for _, info in found])
            gone = 0
            for number in cache_policy.evicted(uses, sizes, time.time(), too_much).tolist():
                with suppress(OSError):
                    os.unlink(found[number][0])
                    gone += int(sizes[number])
            if counter is not None:
                os.pwrite(counter, USED.pack(used - gone), 0)
        return gone

    def _pieces(self) -> Iterator[tuple[str, os.stat_result]]:
        with suppress(OSError), os.scandir(self.folder) as folders:
            for folder in folders:
                if folder.is_dir():
                    with suppress(OSError), os.scandir(folder.path) as pieces:
                        for piece in pieces:
                            with suppress(OSError):
                                info = piece.stat()
                                if not piece.name.endswith(".part") or info.st_mtime < time.time() - LEFT_SECONDS:
                                    yield piece.path, info

    def _count(self, change: int) -> int:
        """Bytes in the cache, after a change."""
        with self._counting() as counter:
            if counter is None:
                return 0
            before = os.pread(counter, USED.size, 0)
            used = sum(info.st_size for _, info in self._pieces()) if len(before) < USED.size else 0
            used = used or max(0, USED.unpack(before)[0] + change if before else 0)
            os.pwrite(counter, USED.pack(used), 0)
            return used

    @contextmanager
    def _counting(self) -> Iterator[int | None]:
        """The file with the count, locked against threads and processes."""
        with self._lock:
            try:
                file = os.open(self.folder / "used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError:
                yield None
                return
            try:
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
                yield file
            finally:
                os.close(file)

    def _tell(self, error: OSError) -> None:
        """Pieces are not kept for now: say why, once."""
        self._again = time.monotonic() + AGAIN_SECONDS
        if not self._told:
            self._told = True
            what = f"the cache {self.folder} takes no more ({error.strerror})"
            mend = "free some space there, or set data.cache to another folder, or data.cache_bytes to less"
            self.trouble = (
                f"{what}: what is read is kept in memory only, and fetched anew when it is needed again; {mend}"
            )
