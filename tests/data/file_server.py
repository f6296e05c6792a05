"""A plain HTTP server over a folder, with ranges, keep-alive and ETags, a pause before each answer, and faults.

As a program it serves a folder from a process of its own, for benchmarks, and says its port:

    python -m tests.data.file_server FOLDER PAUSE_SECONDS [BYTES_PER_SECOND [OF_EACH_CONNECTION]]
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import unquote, urlsplit


class Asked(NamedTuple):
    """One request. begin, end: the bytes of the file that were asked for."""

    method: str
    name: str
    begin: int
    end: int


SLICE_SECONDS = 0.002  # of the bandwidth, that an answer sends before others have their turn
RATE_SECONDS = 0.01  # the same, of the rate of one connection

Fault = Callable[[Asked, int], "Answer | None"]
"""(request, how many came before it) -> what to answer instead of the truth."""


class Answer(NamedTuple):
    """status: 0: close the connection without a word.  cut: bytes after which it is closed.

    pause: seconds before the answer.  rate: bytes per second.  content: instead of the file's.  location: redirects.
    """

    status: int = 206
    cut: int | None = None
    pause: float = 0.0
    rate: float | None = None
    content: Callable[[bytes], bytes] | None = None
    location: str = ""


class FileServer(ThreadingHTTPServer):
    """Serves `folder` until it is closed. asked: all requests so far.  keeps: connections, after an answer.

    bandwidth: bytes per second, which all answers share.  rate: bytes per second of each connection, as object stores
    limit them.
    """

    daemon_threads, request_queue_size = True, 256

    def __init__(
        self,
        folder: Path,
        pause: float = 0.0,
        fault: Fault | None = None,
        bandwidth: float = 1e12,
        rate: float = 1e12,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.pause, self.fault, self.bandwidth = folder, pause, fault, bandwidth
        self.rate = rate
        self._free, self._turn = 0.0, threading.Lock()  # when the link has sent all that it was given
        self.asked: list[Asked] = []
        self.keeps = True
        self.etag: Callable[[os.stat_result], str] | None = lambda info: f'"{info.st_size:x}-{info.st_mtime_ns:x}"'
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def slice(self, left: int) -> int:
        """Wait until some of the `left` bytes of an answer may be sent: how many."""
        size = min(left, max(1, int(self.bandwidth * SLICE_SECONDS)), max(1, int(self.rate * RATE_SECONDS)))
        with self._turn:
            now = time.monotonic()
            self._free = max(self._free, now) + size / self.bandwidth
            wait = self._free - now
        if wait > 0.001:
            time.sleep(wait)
        return size

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are no news."""

    def refusal(self, method: str, target: str, headers: Message) -> int | None:
        """With which status a request is refused. target: as it stands in the request, path and query."""

    def tar_bytes(self) -> int:
        """Bytes of tars that were asked for."""
        return sum(each.end - each.begin for each in self.asked if each.name.endswith(".tar") and each.method == "GET")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FileServer

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def _answer(self, method: str) -> None:
        refused = self.server.refusal(method, self.path, self.headers)
        if refused is not None:
            self._refuse(refused)
            return
        name = unquote(urlsplit(self.path).path).lstrip("/")
        path = self.server.folder / name
        if not path.is_file():
            self._refuse(404)
            return
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            begin, end = self._range(info.st_size)
            asked = Asked(method, name, begin, end)
            fault = self.server.fault(asked, len(self.server.asked)) if self.server.fault else None
            self.server.asked.append(asked)
            time.sleep(self.server.pause + (fault.pause if fault else 0.0))
            if fault and fault.status != 206:
                self._refuse(fault.status, fault.location)
                return
            partly = "Range" in self.headers
            self.send_response(206 if partly else 200)
            self.send_header("Content-Length", str(end - begin))
            if partly:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{info.st_size}")
            if not self.server.keeps:
                self.send_header("Connection", "close")
            if self.server.etag is not None:
                self.send_header("ETag", self.server.etag(info))
            self.end_headers()
            self.wfile.flush()
            if method == "GET" and fault:
                file.seek(begin)
                self._badly(file.read(end - begin), fault)
            elif method == "GET":
                due = time.monotonic()  # of what comes next, at this connection's rate
                while begin < end:
                    size = os.sendfile(self.connection.fileno(), file.fileno(), begin, self.server.slice(end - begin))
                    begin, due = begin + size, due + size / self.server.rate
                    time.sleep(max(0.0, due - time.monotonic()))

    def _badly(self, content: bytes, fault: Answer) -> None:
        content = fault.content(content) if fault.content else content
        content = content[: fault.cut] if fault.cut is not None else content
        piece = max(1, int(fault.rate / 20)) if fault.rate else len(content) or 1
        for at in range(0, len(content), piece):
            self.wfile.write(content[at : at + piece])
            time.sleep(0.05 if fault.rate else 0)
        if fault.cut is not None:
            self.close_connection = True

    def _refuse(self, status: int, location: str = "") -> None:
        if status == 0:
            self.close_connection = True
            return
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _range(self, size: int) -> tuple[int, int]:
        asked = self.headers.get("Range")
        if not asked:
            return 0, size
        begin, _, end = asked.removeprefix("bytes=").partition("-")
        return int(begin), min(int(end) + 1, size)


if __name__ == "__main__":
    pause, bandwidth, rate = (float(each) for each in [*sys.argv[2:], "1e12", "1e12"][:3])
    with FileServer(Path(sys.argv[1]), pause, bandwidth=bandwidth, rate=rate) as server:
        print(server.server_port, flush=True)
        threading.Event().wait()
