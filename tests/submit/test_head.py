"""Whether the door of a Ray head is shut, and whether our token opens it: a small server in place of the head."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, RunError
from pipeline.submit import head, jobs

KEY = "canary-5be1d2a9"


class Door(http.server.BaseHTTPRequestHandler):
    """/api/jobs/ as a head answers it; `server.token` None: anybody may come in."""

    def do_GET(self) -> None:
        server: Any = self.server
        given = self.headers.get("Authorization")
        server.seen.append(given)
        if server.elsewhere:
            self.send_response(302)
            self.send_header("Location", server.elsewhere)
        elif server.token is None or given == f"Bearer {server.token}":
            self.send_response(200)
        else:
            self.send_response(403 if given else 401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Door)
    server.token, server.elsewhere, server.seen = KEY, None, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_right_token_opens_it(door: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{KEY}\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert head.require_shut(door.url) == []
    assert door.seen == [None, f"Bearer {KEY}"]  # first without
    monkeypatch.setattr(head, "on_loopback", lambda url: False)
    assert "is not encrypted" in head.require_shut(door.url)[0]


def test_no_token_and_a_wrong_one_are_refused(door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="asks for a token, and there is none here: set RAY_AUTH_TOKEN_PATH"):
        head.require_shut(door.url)
    monkeypatch.setenv("RAY_AUTH_TOKEN", f"{KEY}-wrong")
    with pytest.raises(ConfigError, match="does not know this token") as caught:
        head.require_shut(door.url)
    assert KEY not in str(caught.value)


def test_an_open_head_gets_no_job_but_on_purpose(door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    door.token = None
    monkeypatch.setenv("RAY_AUTH_TOKEN", KEY)
    assert "every user of this machine" in head.require_shut(door.url)[0]
    monkeypatch.setattr(head, "on_loopback", lambda url: False)
    with pytest.raises(ConfigError, match="whoever reaches it runs any code there"):
        head.require_shut(door.url)
    assert "whoever reaches it" in head.require_shut(door.url, insecure=True)[0]
    assert door.seen == [None, None, None]  # a head that asks for no token is not told ours


def test_the_token_does_not_follow_a_redirect(door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", KEY)
    door.elsewhere = f"{door.url}/elsewhere"
    with pytest.raises(RunError, match="answers 302"):
        head.require_shut(door.url)
    assert door.seen == [None]


def test_nobody_answers(door: Any) -> None:
    door.shutdown()
    door.server_close()
    with pytest.raises(RunError, match="nobody answers"):
        head.require_shut(door.url)


@pytest.mark.parametrize("content, says", [("", "which is empty"), (None, "cannot be read")])
def test_a_token_file_that_holds_none(
    content: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    if content is not None:
        (tmp_path / "token").write_text(content)
    with pytest.raises(ConfigError, match=says):
        head.token()


@pytest.mark.parametrize("given", ["http://127.0.0.1:8265", "https://ray.lab.example", "http://[::1]:8265/"])
def test_addresses(given: str) -> None:
    assert head.address(given) == given.rstrip("/")


@pytest.mark.parametrize(
    "given, says",
    [
        (None, "which Ray cluster"),
        ("auto", "is no address for jobs"),
        ("10.0.0.1:6379", "is no address for jobs"),
        ("ray://10.0.0.1:10001", "such as http://10.0.0.1:8265"),
        ("http://:8265", "is no address for jobs"),
        ("http://host:port", "is no address for jobs"),
        ("http://me:hunter2@host:8265", "holds a password"),
        ("http://host:8265/#/jobs", "goes on after the port"),
    ],
)
def test_addresses_that_are_none(given: str | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        head.address(given)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "[::1]", "localhost"])
def test_on_loopback(host: str) -> None:
    assert head.on_loopback(f"http://{host}:8265")


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "localhost.example.com", "127.0.0.1.example.com"])
def test_not_on_loopback(host: str) -> None:
    assert not head.on_loopback(f"http://{host}:8265")


@pytest.mark.parametrize(
    "id", ["digits", "http://h:1/#/jobs/", "http://h:1/#/jobs/a/../b", "file:///#/jobs/a", "/x/12"]
)
def test_ids_that_are_none(id: str) -> None:
    with pytest.raises(RunError, match="is no job of a Ray cluster"):
        jobs.status(id)
