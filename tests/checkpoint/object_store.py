"""A real S3 server on loopback (moto), in a process of its own that can be killed, stopped and made to refuse."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence

from s3fs import S3FileSystem

BUCKET = "shelf"
SERVER = (
    "import ctypes, signal, sys\n"
    "if sys.platform == 'linux': ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"  # no orphan when the test is killed
    "from moto.server import main; main(sys.argv[1:])\n"
)


class ObjectStore:
    """One server; what it holds is lost when it is killed. `environment`: what a client needs to reach it.

    server: the program that is the server, with its first arguments.
    """

    def __init__(self, server: Sequence[str] = ("-c", SERVER)) -> None:
        self._server = server
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.port = listening.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, or start again, empty but for the bucket."""
        command = [sys.executable, *self._server, "-H", "127.0.0.1", "-p", str(self.port)]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, env={**os.environ, **self.environment}, stdout=quiet, stderr=quiet)
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
                break
            except OSError:
                assert self._process.poll() is None, "the S3 server did not start"
                time.sleep(0.05)
        S3FileSystem.clear_instance_cache()  # it keeps clients, of servers that are no more among them
        self._ask("PUT", f"/{BUCKET}")

    def refuse(self, refusing: bool) -> None:
        """Ask for credentials that nobody has, from now on, or take any again."""
        self._ask("POST", "/moto-api/reset-auth", b"0" if refusing else b"inf")

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _ask(self, method: str, path: str, body: bytes | None = None) -> None:
        plain = {"Content-Type": "text/plain"}
        request = urllib.request.Request(self.endpoint + path, data=body, method=method, headers=plain)
        urllib.request.urlopen(request, timeout=10).close()
