"""Files below a URL, whole or by ranges of bytes: http(s) by threads with connections that are kept, all else by fsspec.

    open_store("s3://bucket/photos") -> Store: list, info, read, fetch, write, put, remove

What may pass (5xx, a time-out, a cut or short body, a connection that was reset) is tried again with longer and longer
pauses; what will not (not there, not allowed, changed) is raised at once, with the URL and a way to mend it. Every
file has a version (its ETag, else its size and time of change), and a range of another version is refused. Credentials
and endpoints come from the environment, as the store's own library finds them.

What it gives up: http(s) knows no list of files and no writing; a redirect is followed anew for each request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import quote, urlsplit

from pipeline.errors import DataError

RETRY_SECONDS = (0.2, 1.0, 3.0, 8.0, 15.0)  # pauses before what failed is tried again
CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0  # without a sign of life
CHUNK_BYTES = 1 << 18  # read at a time
CONNECTIONS = 64  # kept, to one host
PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers that may be others the next time
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


def open_store(url: str) -> Store:
    """Raises StoreError for a kind of store that nobody knows, or whose package is missing."""
    return _Http(url) if url.startswith(("http://", "https://")) else _Files(url)


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it; StoreError when it cannot be had."""
    from fsspec.core import url_to_fs

    try:
        files, root = url_to_fs(url, **({"auto_mkdir": True} if url.startswith(("file:", "/")) else {}))
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


def tried(place: str, do: Callable[[], T], explain: Callable[[Exception], StoreError | None]) -> T:
    """`do()`, again after a pause when it fails with what `explain` has no final word for."""
    for pause in (*RETRY_SECONDS, None):
        try:
            return do()
        except StoreError:
            raise
        except Exception as error:  # each store has errors of its own, many of them no OSError
            final = explain(error)
            if final is not None:
                raise final from error
            if pause is None:
                times = f"tried {len(RETRY_SECONDS) + 1} times"
                raise StoreError(f"{place}: {said(error)}, {times}; {LATER}") from error
            time.sleep(pause)
    raise AssertionError


class _Http:
    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    @cached_property
    def _pool(self) -> Any:
        import urllib3

        timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS)
        return urllib3.PoolManager(
            8, maxsize=CONNECTIONS, block=False, retries=urllib3.Retry(0, redirect=5), timeout=timeout
        )

    def infos(self, below: str = "") -> None:
        return None

    def info(self, name: str) -> Info:
        def ask() -> Info:
            answer = self._asked("HEAD", name)
            answer.drain_conn()
            return Info(int(answer.headers["Content-Length"]), _version(answer.headers))

        return self._tried(name, ask)

    def read(self, name: str) -> bytes:
        def get() -> bytes:
            answer = self._asked("GET", name)
            try:
                return answer.read(decode_content=False)
            finally:
                answer.release_conn()

        return self._tried(name, get)

    def fetch(self, name: str, begin: int, end: int, into: memoryview) -> str:
        return self._tried(name, lambda: self._fetch(name, begin, end, into))

    def _fetch(self, name: str, begin: int, end: int, into: memoryview) -> str:
        answer = self._asked("GET", name, {"Range": f"bytes={begin}-{end - 1}"})
        whole = False
        try:
            if answer.status != 206 and begin:
                mend = "serve the shards by one that does (nginx, an object store), or copy them to a local folder"
                raise StoreError(f"{self._place(name)}: this server does not answer ranges of bytes; {mend}")
            got = 0
            while got < end - begin:
                chunk = answer.read(min(CHUNK_BYTES, end - begin - got), decode_content=False)
                if not chunk:
                    raise Passing(f"{got} bytes came instead of {end - begin}")
                into[got : got + len(chunk)] = chunk
                got += len(chunk)
            whole = answer.status == 206
            return _version(answer.headers)
        finally:
            if whole:
                answer.drain_conn()
                answer.release_conn()
            else:
                answer.close()

    def write(self, name: str, content: bytes) -> None:
        self._read_only()

    def put(self, file: Path, name: str) -> None:
        self._read_only()

    def remove(self, name: str) -> None:
        self._read_only()

    def _read_only(self) -> None:
        raise StoreError(f"{self.url}: http(s) is only read; write through the store's own URL, such as s3://")

    def _place(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _asked(self, method: str, name: str, headers: dict[str, str] | None = None) -> Any:
        """An answer whose body is not read yet. Raises Passing, or what is final."""
        place = f"{self.url}/{quote(name)}"
        plain = {"Accept-Encoding": "identity", **(headers or {})}
        answer = self._pool.request(method, place, headers=plain, preload_content=False)
        if answer.status < 300:
            return answer
        answer.close()
        raise _judged(place, answer.status, answer.reason) or Passing(f"HTTP {answer.status} {answer.reason}")

    def _tried(self, name: str, do: Callable[[], T]) -> T:
        return tried(self._place(name), do, lambda error: None)


def _judged(place: str, status: int, reason: str | None) -> StoreError | None:
    what = f"{place}: HTTP {status} {reason or ''}".rstrip()
    if status in (401, 403, 407):
        return Refused(f"{what}: access refused; check the credentials in the environment, and the rights of this file")
    if status in (404, 410):
        return Absent(f"{what}: not there; check the URL, or send the data set again (`millstream data send`)")
    if status in (412, 416):
        return Changed(f"{what}: is not the file that was indexed; send the data set again, under another name")
    return None if status in PASSING else StoreError(f"{what}; check the URL")


def _version(headers: Any) -> str:
    """Of an answer: the ETag, or when the file was changed."""
    return (headers.get("ETag") or headers.get("Last-Modified") or "").removeprefix("W/").strip('"')


class _Files:
    """Whatever fsspec knows."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._files, self._root = file_system(self.url)
        self._lock = threading.Lock()

    def infos(self, below: str = "") -> dict[str, Info]:
        self._files.invalidate_cache()
        try:
            found = self._tried(below, lambda: self._files.find(self._at(below).rstrip("/"), detail=True))
        except Absent:
            return {}
        return {path.removeprefix(f"{self._root}/"): _info(info) for path, info in found.items()}

    def info(self, name: str) -> Info:
        return _info(self._tried(name, lambda: self._files.info(self._at(name))))

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

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _tried(self, name: str, do: Callable[[], T]) -> T:
        return tried(f"{self.url}/{name}".rstrip("/"), do, self._explained)

    def _explained(self, error: Exception) -> StoreError | None:
        """What no retry will mend."""
        if isinstance(error, FileNotFoundError):
            return Absent(f"{self.url}: not there: {error}; check the URL, or send the data set again")
        if isinstance(error, PermissionError) or "redential" in type(error).__name__ + str(error):
            return Refused(f"{self.url}: {said(error)}")
        return None


def _info(found: dict[str, Any]) -> Info:
    version = found.get("ETag") or found.get("etag") or found.get("md5Hash")
    changed = found.get("LastModified") or found.get("mtime") or found.get("last_modified") or found.get("updated")
    return Info(found["size"], str(version or f"{found['size']} {changed}").strip('"'))


def host(url: str) -> str:
    """The server of a URL, for messages."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
