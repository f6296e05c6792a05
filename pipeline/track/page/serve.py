"""The page live: a small server for all runs of a folder, that reads and never writes.

One thread reads the journals as they grow, those last heard of first; requests are answered from what it has read. A
run is found by its name among those that are listed, never by a path that was sent, and a link that leads out of the
folder is no run. On loopback only requests that name this machine as their host are answered, so that no web page can
read through a name that it lets point here (DNS rebinding).

    GET /            the page           GET /api/runs   the list
    GET /api/run     one run, from the step on that the page has: name, width, begin, generation, events
    GET /api/picture a picture of its samples: name, file

What it gives up: no password and no encryption. On another address than loopback everybody who reaches it may read.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pipeline.errors import RunError
from pipeline.track import pictures
from pipeline.track.page import document, model
from pipeline.track.page.reading import Reading

PAUSE_SECONDS = 0.5  # between two looks at the journals when nothing was new
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Shelf:
    """The runs of a folder, read as they grow. Close it when done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.runs: dict[str, Reading] = {}
        self._rows: dict[str, tuple[Any, dict[str, Any]]] = {}
        self._closing = threading.Event()
        self._scan()
        self._thread = threading.Thread(target=self._read, name="journals", daemon=True)
        self._thread.start()

    def rows(self) -> list[dict[str, Any]]:
        """The list, the run last heard of first."""
        runs = list(self.runs.items())
        rows = [model.listed(name, reading, _size(reading.folder)) for name, reading in runs]
        return sorted(rows, key=lambda row: row["heard"] or 0.0, reverse=True)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _scan(self) -> None:
        """Look which runs there are: folders with a configuration, in the folder or the folder itself."""
        found = {path.parent.name: path.parent for path in self.folder.glob("*/config.yaml")}
        if (self.folder / "config.yaml").is_file():
            found = {self.folder.name: self.folder}
        within = {name: path for name, path in found.items() if path.resolve().is_relative_to(self.folder)}
        self.runs = {name: self.runs.get(name) or Reading(path) for name, path in within.items()}

    def _read(self) -> None:
        while not self._closing.is_set():
            newest = sorted(self.runs.values(), key=lambda reading: -_written(reading.folder))
            if not any([reading.advance() for reading in newest]):
                self._closing.wait(PAUSE_SECONDS)
                self._scan()


class Server(ThreadingHTTPServer):
    """The server of one folder, bound when it is made. Raises RunError when the port cannot be had."""

    daemon_threads = True

    def __init__(self, folder: Path, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.shelf = Shelf(folder)
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            mend = "choose another port with --port, 0 for any, or another address with --host"
            raise RunError(f"{host}:{port} cannot be served: {error.strerror or error}; {mend}") from error
        told = {"live": True, "title": self.shelf.folder.name, "list": [], "runs": []}
        page, policy = document.document(f"{self.shelf.folder.name} - millstream", told, "'self'", "'self' data:")
        self.page, self.policy = page.encode(), f"{policy}; frame-ancestors 'none'"
        self.loopback = ipaddress.ip_address(str(self.server_address[0])).is_loopback

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://[{host!s}]:{port}/" if ":" in str(host) else f"http://{host!s}:{port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # whoever asked has gone away
            super().handle_error(request, client_address)

    def server_close(self) -> None:  # also called by the constructor when the port cannot be had
        super().server_close()
        self.shelf.close()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "millstream", ""
    timeout = 60

    def do_GET(self) -> None:
        try:
            asked, host = urlsplit(self.path), urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        except ValueError:
            self._answer(HTTPStatus.BAD_REQUEST, b"this is no address", "text/plain")
            return
        if self.server.loopback and host not in ("localhost", "127.0.0.1", "::1", self.server.server_address[0]):
            self._answer(HTTPStatus.FORBIDDEN, b"ask by the address that the command printed", "text/plain")
            return
        query = {key: values[-1] for key, values in parse_qs(asked.query).items()}
        match asked.path:
            case "/":
                self._answer(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
            case "/api/runs":
                self._json({"runs": self.server.shelf.rows()})
            case "/api/run" if query.get("name") in self.server.shelf.runs:
                try:
                    width, begin, generation, events = (int(query.get(key, least)) for key, least in _NUMBERS.items())
                except ValueError:
                    self._answer(HTTPStatus.BAD_REQUEST, b"width, begin, generation, events are integers", "text/plain")
                    return
                width = 1 << max(0, min(width, 1 << 40).bit_length() - 1)
                reading = self.server.shelf.runs[query["name"]]
                self._json(model.run(query["name"], reading, width, max(begin, 0), generation, max(events, 0)))
            case "/api/picture" if path := self._picture(query):
                self._answer(HTTPStatus.OK, path.read_bytes(), pictures.MEDIA[path.suffix])
            case _:
                self._answer(HTTPStatus.NOT_FOUND, b"nothing is here under that name", "text/plain")

    do_HEAD = do_GET

    def _picture(self, query: dict[str, str]) -> Path | None:
        run = self.server.shelf.runs.get(query.get("name", ""))
        return pictures.find(run.folder, query.get("file")) if run else None

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal says where the page is, and that is all."""

    def _json(self, told: Any) -> None:
        self._answer(HTTPStatus.OK, model.text(told).encode(), "application/json")

    def _answer(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Security-Policy": self.server.policy}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


_NUMBERS = {"width": 1, "begin": 0, "generation": -1, "events": 0}


def _size(folder: Path) -> int:
    try:
        return (folder / "journal.jsonl").stat().st_size
    except OSError:
        return 0


def _written(folder: Path) -> float:
    try:
        return (folder / "journal.jsonl").stat().st_mtime
    except OSError:
        return 0.0
