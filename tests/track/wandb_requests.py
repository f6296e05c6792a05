"""The requests of wandb_server.py, and its manners: when it answers, and how it does not."""

from __future__ import annotations

import base64
import gzip
import json
import re
import socket
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    from tests.track.wandb_server import Server

KEY = "0123456789" * 4


class Handler(BaseHTTPRequestHandler):
    owner: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        body = self._body()
        stream = re.fullmatch(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream", self.path)
        if not self._may_answer(bool(stream)):
            return
        if self.headers.get("Authorization", "") != "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode():
            self._answer(401, {"errors": [{"message": "wrong key"}]})
        elif self.path == "/graphql":
            asked = json.loads(body)
            self._answer(200, self.owner.graphql(asked["query"], asked.get("variables") or {}))
        elif stream:
            self.owner.stream(self.owner.runs[unquote(stream[3])], json.loads(body))
            self._answer(200, {})
        else:
            self._answer(404, {})

    def do_PUT(self) -> None:
        body = self._body()
        if self._may_answer(False):
            self.owner.store(unquote(self.path), body)
            self._answer(200, {})

    def do_GET(self) -> None:
        if self._may_answer(False):
            self._answer(404, {})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _may_answer(self, streamed: bool) -> bool:
        owner = self.owner
        if streamed and owner.hang_up_after is not None:
            owner.hang_up_after -= 1
            if owner.hang_up_after < 0:
                owner.behave = "hang up"
        if owner.delay:
            owner.closing.wait(owner.delay)
        if owner.behave in ("refuse", "fail"):
            self._answer(403 if owner.behave == "refuse" else 500, {"errors": [{"message": owner.behave}]})
        elif owner.behave == "silent":
            owner.closing.wait()
        if owner.behave == "answer":
            return True
        if owner.behave in ("hang up", "silent"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        return False

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
