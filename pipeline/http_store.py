"""Files below an http(s) URL: each thread has a connection of its own that it keeps, and bytes go straight to a buffer.

The standard library's client, because it reads into memory that is there already: urllib3 and fsspec make bytes of each
piece first, and took 1.3 to 3 times the processor time for a byte here.

What it gives up: no list of files, no writing, no proxies; a redirect is followed anew for each request.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote, urljoin, urlsplit

from pipeline.object_store import Absent, Changed, Info, Passing, Refused, StoreError, etag, tried

CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0  # without a sign of life
CHUNK_BYTES = 1 << 20  # read at a time, at most
LEAST_BYTES = 64 << 10  # in READ_SECONDS: what comes more slowly is given up, or a byte now and then would never end
REDIRECTS = 5
PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers that may be others the next time
STALE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)  # of a connection that was kept

T = TypeVar("T")


class _Answer(http.client.HTTPResponse):
    """Its `readinto` gives what has come and does not wait for the rest, so that bytes which trickle are noticed."""

    def readinto(self, buffer: Any) -> int:
        if self.fp is None or self.chunked or self.length is None:
            return super().readinto(buffer)
        count = self.fp.readinto1(memoryview(buffer)[: self.length])
        self.length -= count
        return count


class HttpStore:
    """An object_store.Store that is only read. Threads may share it.

    address: where a file is, by its name, when that is not just below `url`; it may be secret, so no message shows it.
    headers: of each request.  trust: whose certificates are trusted, None: those of the system.
    """

    def __init__(
        self,
        url: str,
        pauses: Sequence[float],
        address: Callable[[str], str] | None = None,
        headers: Mapping[str, str] | None = None,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        self.url, self._pauses, self._address = url.rstrip("/"), pauses, address
        self._headers, self._trust = {"Accept-Encoding": "identity", **(headers or {})}, trust
        self._kept = threading.local()  # connections: {(scheme, host): connection}
        self._open: dict[http.client.HTTPConnection, socket.socket] = {}  # of all threads
        self._lock, self._closed = threading.Lock(), False

    def infos(self, below: str = "") -> None:
        return None

    def info(self, name: str) -> Info:
        def ask() -> Info:
            answer = self._asked("HEAD", name)
            answer.read()
            size = answer.headers["Content-Length"]
            if size is None:
                raise StoreError(f"{self.url}/{name}: this server does not say how long a file is; use another one")
            return Info(int(size), self._version(answer))

        return self._tried(name, ask)

    def read(self, name: str) -> bytes:
        def get() -> bytes:
            answer = self._asked("GET", name)
            if answer.length is None:  # it is told piece by piece
                return answer.read()
            content = bytearray(answer.length)
            self._fill(answer, memoryview(content))
            return bytes(content)

        return self._tried(name, get)

    def fetch(self, name: str, begin: int, end: int, into: memoryview) -> str:
        return self._tried(name, lambda: self._fetch(name, begin, end, into))

    def _fetch(self, name: str, begin: int, end: int, into: memoryview) -> str:
        answer = self._asked("GET", name, {"Range": f"bytes={begin}-{end - 1}"})
        if answer.status != 206 and begin:
            self._hang_up()
            mend = "serve the shards by one that does (nginx, an object store), or copy them to a local folder"
            raise StoreError(f"{self.url}/{name}: this server does not answer ranges of bytes; {mend}")
        self._fill(answer, into[: end - begin])
        return self._version(answer)

    def _version(self, answer: http.client.HTTPResponse) -> str:
        """The ETag, or when the file was changed; "" where others, who know only ETags, say which version there is."""
        changed = "" if self._address else answer.headers["Last-Modified"] or ""
        return etag(answer.headers["ETag"] or changed)

    def _fill(self, answer: http.client.HTTPResponse, into: memoryview) -> None:
        """The body of an answer into memory of its length. Raises Passing when it is cut, or trickles."""
        got, counted, since = 0, 0, time.monotonic()
        while got < len(into):
            count = answer.readinto(into[got : got + CHUNK_BYTES])
            if not count:
                raise Passing(f"{got} bytes came instead of {len(into)}")
            got, now = got + count, time.monotonic()
            if got - counted >= LEAST_BYTES:
                counted, since = got, now
            elif now - since > READ_SECONDS and got < len(into):
                raise Passing(f"only {got - counted} bytes came in {now - since:.0f} s")
        if answer.read(1):  # more than was asked for
            self._hang_up()

    def write(self, name: str, content: bytes) -> None:
        self._read_only()

    def put(self, file: Path, name: str) -> None:
        self._read_only()

    def remove(self, name: str) -> None:
        self._read_only()

    def close(self) -> None:
        """Hang up; who waits for bytes gets a RuntimeError."""
        with self._lock:
            self._closed = True
            for connection, reads_from in self._open.items():
                with suppress(OSError):  # a thread may be reading: closing alone would not wake it
                    reads_from.shutdown(socket.SHUT_RDWR)
                connection.close()
            self._open.clear()

    def _read_only(self) -> NoReturn:
        raise StoreError(f"{self.url}: http(s) is only read; write through the store's own URL, such as s3://")

    def _tried(self, name: str, do: Callable[[], T]) -> T:
        def once() -> T:
            try:
                return do()
            except BaseException:
                self._hang_up()  # what is left of an answer must not be taken for the next one
                if self._closed:
                    raise RuntimeError("the data set is closed") from None
                raise

        return tried(f"{self.url}/{name}", self._pauses, once, lambda error: error if self._closed else None)

    def _asked(self, method: str, name: str, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
        """A good answer, whose body is not read yet. Raises Passing, or what is final."""
        place = self._address(name) if self._address else f"{self.url}/{quote(name)}"
        for _ in range(REDIRECTS + 1):
            try:
                answer = self._answer(method, place, {**self._headers, **(headers or {})})
            except (http.client.InvalidURL, ValueError):  # its words may hold the address
                raise StoreError(f"{self.url}/{name}: leads to an address that is none; check the URL") from None
            if answer.status < 300:
                return answer
            answer.read()
            location = answer.headers["Location"]
            if answer.status not in (301, 302, 303, 307, 308) or not location:
                shown = f"{self.url}/{name}" if self._address else place
                raise _judged(shown, answer) or Passing(f"HTTP {answer.status} {answer.reason}")
            place = urljoin(place, location)
        raise StoreError(f"{self.url}/{name}: more than {REDIRECTS} redirects; check the URL")

    def _answer(self, method: str, place: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        parts = urlsplit(place)
        target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        connection = self._connections.get(parts[:2])
        was_kept = connection is not None and connection.sock is not None  # else the last answer was the server's last
        if connection is None or not was_kept:
            connection = self._connect(*parts[:2])
        try:
            connection.request(method, target, headers=headers)
            return connection.getresponse()
        except STALE:
            self._hang_up()
            if not was_kept:
                raise
        return self._answer(method, place, headers)  # the server has closed it meanwhile

    def _connect(self, scheme: str, host: str) -> http.client.HTTPConnection:
        if scheme == "https":
            connection = http.client.HTTPSConnection(host, timeout=CONNECT_SECONDS, context=self._trust)
        else:
            connection = http.client.HTTPConnection(host, timeout=CONNECT_SECONDS)
        connection.response_class = _Answer
        connection.connect()
        connection.sock.settimeout(READ_SECONDS)
        with self._lock:
            if self._closed:
                connection.close()
                raise RuntimeError("the data set is closed")
            self._open.pop(self._connections.get((scheme, host), connection), None)
            self._open[connection] = connection.sock
        self._connections[scheme, host] = connection
        return connection

    @property
    def _connections(self) -> dict[tuple[str, str], http.client.HTTPConnection]:
        if not hasattr(self._kept, "connections"):
            self._kept.connections = {}
        return self._kept.connections

    def _hang_up(self) -> None:
        """Close this thread's connections."""
        for connection in self._connections.values():
            with suppress(OSError):
                connection.close()
            with self._lock:
                self._open.pop(connection, None)
        self._connections.clear()


def _judged(place: str, answer: http.client.HTTPResponse) -> StoreError | None:
    what = f"{place}: HTTP {answer.status} {answer.reason}".rstrip()
    if answer.status in (401, 403, 407):
        return Refused(f"{what}: access refused; check the credentials in the environment, and the rights of this file")
    if answer.status in (404, 410):
        return Absent(f"{what}: not there; check the URL, or send the data set again (`millstream data send`)")
    if answer.status in (412, 416):
        return Changed(f"{what}: is not the file that was indexed; send the data set again, under another name")
    return None if answer.status in PASSING else StoreError(f"{what}; check the URL")
