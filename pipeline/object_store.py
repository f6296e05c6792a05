"""Files below a URL, whole or by ranges of bytes: http(s) by http_store.py, s3 by s3_store.py, all else by fsspec.

    open_store("s3://bucket/photos") -> Store: list, info, read, fetch, write, put, remove

What may pass (5xx, a time-out, a cut or short body, a connection that was reset) is tried again with longer and longer
pauses; what will not (not there, not allowed, changed) is raised at once, with the URL and a way to mend it. Every
file has a version (its ETag, else its size and time of change), and a range of another version is refused. Credentials
and endpoints come from the environment, as the store's own library finds them.

What it gives up: through fsspec a range does not say which version it is of; that is asked for once, beforehand. Ranges
by http_store.py and s3_store.py say it.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from pipeline.errors import DataError

RETRY_SECONDS = (0.2, 1.0, 3.0, 8.0, 15.0)  # pauses before what failed is tried again
LATER = "check network and endpoint; the same command goes on"

T = TypeVar("T")


class StoreError(DataError):
    """A store cannot be reached, or does not do what is asked, after all retries."""


class Absent(StoreError):
    """What was asked for is not there."""


class Refused(StoreError):
    """The store does not let us."""


class Changed(StoreError):
    """A file is not the one that it was."""


class GivenUp(StoreError):
    """What may pass did not: a network, a server, after all retries."""


class Passing(Exception):
    """An answer that may be another one the next time."""


class Info(NamedTuple):
    """version: what changes when the file does."""

    size: int
    version: str


class Store(Protocol):
    """The files below a URL. Threads may share it. Every failure is a StoreError that names the file's URL."""

    url: str

    def infos(self, below: str = "") -> dict[str, Info] | None:
        """All files, by name; None when they cannot be listed."""
        ...

    def info(self, name: str) -> Info: ...

    def read(self, name: str) -> bytes: ...

    def fetch(self, name: str, begin: int, end: int, into: memoryview) -> str:
        """Bytes from `begin` to `end` of a file into a buffer of that length; the version of the file, "" if untold."""
        ...

    def write(self, name: str, content: bytes) -> None: ...

    def put(self, file: Path, name: str) -> None: ...

    def remove(self, name: str) -> None: ...

    def close(self) -> None: ...


def open_store(url: str, pauses: Sequence[float] | None = None) -> Store:
    """pauses: seconds before what failed is tried again, one for each time; None: RETRY_SECONDS.

    Raises StoreError for a kind of store that nobody knows, or whose package is missing.
    """
    pauses = RETRY_SECONDS if pauses is None else pauses
    if url.startswith(("http://", "https://")):
        from pipeline.http_store import HttpStore

        return HttpStore(url, pauses)
    if url.startswith(("s3://", "s3a://")):
        from pipeline.s3_store import S3Store

        return S3Store(url, pauses)
    return FsspecStore(url, pauses)


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it; StoreError when it cannot be had."""
    from fsspec.core import url_to_fs

    try:
        is_local = url.startswith("file:") or not ("://" in url or "::" in url)
        files, root = url_to_fs(url, **({"auto_mkdir": True} if is_local else {}))
    except (ImportError, ValueError) as error:
        raise StoreError(f"{url}: {error}; install what this kind of store needs") from error
    return files, root.rstrip("/")


def said(error: BaseException) -> str:
    """What a store's own library raised, in words, with what to look at."""
    text, kind = str(error) or type(error).__name__, type(error).__name__
    if isinstance(error, PermissionError) or "redential" in kind + text:
        return f"access refused ({text}): check this store's credentials in the environment, and its rights"
    if isinstance(error, ConnectionError | TimeoutError) or "onnect" in kind + text:
        return f"cannot be reached ({text}): check the network and this store's endpoint"
    return text


def tried(
    place: str, pauses: Sequence[float], do: Callable[[], T], explain: Callable[[Exception], Exception | None]
) -> T:
    """`do()`, again after a pause when it fails with what `explain` has no final word for."""
    for pause in (*pauses, None):
        try:
            return do()
        except StoreError:
            raise
        except Exception as error:  # each store has errors of its own, many of them no OSError
            final = explain(error)
            if final is not None:
                raise final from error
            if pause is None:
                times = f", tried {len(pauses) + 1} times" if pauses else ""
                raise GivenUp(f"{place}: {said(error)}{times}; {LATER}") from error
            time.sleep(pause)
    raise AssertionError


def etag(told: str) -> str:
    """An ETag without its quotes, weak or not (RFC 9110, 8.8.3): headers and lists of files write it differently."""
    return told.removeprefix("W/").strip('"')


class FsspecStore:
    """Whatever fsspec knows."""

    def __init__(self, url: str, pauses: Sequence[float]) -> None:
        self.url, self._pauses = url.rstrip("/"), pauses
        self._files, self._root = file_system(self.url)

    def infos(self, below: str = "") -> dict[str, Info]:
        self._files.invalidate_cache()
        try:
            found = self._tried(below, lambda: self._files.find(self._at(below).rstrip("/"), detail=True))
        except Absent:
            return {}
        return {path.removeprefix(f"{self._root}/"): _info(info) for path, info in found.items()}

    def info(self, name: str) -> Info:
        def ask() -> Info:
            self._files.invalidate_cache()
            return _info(self._files.info(self._at(name)))

        return self._tried(name, ask)

    def read(self, name: str) -> bytes:
        return self._tried(name, lambda: self._files.cat_file(self._at(name)))

    def fetch(self, name: str, begin: int, end: int, into: memoryview) -> str:
        def get() -> bytes:
            content = self._files.cat_file(self._at(name), start=begin, end=end)
            if len(content) != end - begin:
                raise Passing(f"{len(content)} bytes came instead of {end - begin}")
            return content

        into[:] = self._tried(name, get)
        return ""

    def write(self, name: str, content: bytes) -> None:
        self._tried(name, lambda: self._files.pipe_file(self._at(name), content))

    def put(self, file: Path, name: str) -> None:
        self._tried(name, lambda: self._files.put_file(str(file), self._at(name)))

    def remove(self, name: str) -> None:
        self._tried(name, lambda: self._files.rm_file(self._at(name)))

    def close(self) -> None:
        """Only what is our own: fsspec keeps its connections, for all that ask."""

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _tried(self, name: str, do: Callable[[], T]) -> T:
        return tried(f"{self.url}/{name}".rstrip("/"), self._pauses, do, self._explained)

    def _explained(self, error: Exception) -> StoreError | None:
        """What no retry will mend."""
        if isinstance(error, FileNotFoundError):
            return Absent(f"{self.url}: not there: {error}; check the URL, or send the data set again")
        if isinstance(error, PermissionError) or "redential" in type(error).__name__ + str(error):
            return Refused(f"{self.url}: {said(error)}")
        if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.ENOTDIR):
            return StoreError(f"{self.url}: {said(error)}; choose another folder")
        return None


def _info(found: dict[str, Any]) -> Info:
    version = found.get("ETag") or found.get("etag") or found.get("md5Hash")
    changed = found.get("LastModified") or found.get("mtime") or found.get("last_modified") or found.get("updated")
    return Info(found["size"], etag(str(version or f"{found['size']} {changed}")))
