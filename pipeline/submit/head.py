"""The door of a Ray cluster: who answers at its address, whether it asks for a token, whether ours opens it.

Whoever reaches the jobs API of a head without token authentication runs any code there, as its user (CVE-2023-48022).
So a head that is not on loopback is asked once without a token, and one that answers is refused: what is wrong there is
for its owner to mend, before a job with a way to data goes to it. The token comes from RAY_AUTH_TOKEN, or the file that
RAY_AUTH_TOKEN_PATH names; it is sent in a header to that address alone, never after a redirect, and shown nowhere.
"""

from __future__ import annotations

import ipaddress
import os
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from pipeline.errors import ConfigError, RunError

ANSWER_SECONDS = 10.0
TOKEN = "set RAY_AUTH_TOKEN_PATH to the file that holds the cluster's token"
OPEN = (401, 403)  # the answers of a door that is shut


def address(given: str | None) -> str:
    """The head's URL, such as http://127.0.0.1:8265. Raises ConfigError with what it should look like."""
    if not given:
        mend = "name the head: --address http://HOST:8265, or RAY_ADDRESS (its dashboard's port, through an SSH tunnel)"
        raise ConfigError(f"which Ray cluster? {mend}")
    parts = urlsplit(given)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
        mend = f"jobs go to the dashboard, such as http://{parts.hostname or 'HOST'}:8265"
        raise ConfigError(f"{_shown(given)} is no address for jobs: {mend}")
    if parts.username or parts.password:
        raise ConfigError(f"the address holds a password, and addresses are shown: {TOKEN} instead")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ConfigError(f"{given} goes on after the port: give the address alone, {parts.scheme}://{parts.netloc}")
    return f"{parts.scheme}://{parts.netloc}"


def token() -> str | None:
    """The cluster's token, None when there is none here. Raises ConfigError for a file that cannot be read."""
    if value := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return value
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not path:
        return None
    try:
        value = Path(path).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH names {path}, which cannot be read: {error}") from None
    if not value:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH names {path}, which is empty")
    return value


def on_loopback(url: str) -> bool:
    """Whether only processes of this machine can be at that address."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_shut(url: str, *, insecure: bool = False) -> list[str]:
    """Knock without a token, then with it. What should be known though it may go on, as lines.

    Raises RunError when nobody answers, and ConfigError when anybody may come in or we may not.
    """
    notes, loopback = [], on_loopback(url)
    without = _answer(url, None)
    if without in OPEN:
        if (key := token()) is None:
            raise ConfigError(f"{url} asks for a token, and there is none here: {TOKEN}")
        code = _answer(url, key)
        if code in OPEN:
            raise ConfigError(f"{url} does not know this token ({code}): {TOKEN}")
        if code != 200:
            raise RunError(f"{url}/api/jobs/ answers {code}: is that the dashboard of a Ray head?")
        if not loopback and url.startswith("http:"):
            notes.append(f"{url} is not encrypted: the token can be read on its way. Safer is an SSH tunnel, or https")
        return notes
    if without != 200:
        raise RunError(f"{url}/api/jobs/ answers {without}: is that the dashboard of a Ray head?")
    if loopback:
        return [f"{url} asks for no token: every user of this machine may run code there (RAY_AUTH_MODE=token)"]
    if not insecure:
        raise ConfigError(
            f"{url} asks for no token: whoever reaches it runs any code there. Start its head with RAY_AUTH_MODE=token "
            "and RAY_AUTH_TOKEN_PATH=FILE, or send the job on purpose with --insecure"
        )
    return [f"{url} asks for no token: whoever reaches it runs any code there"]


class _Stay(urllib.request.HTTPRedirectHandler):
    """A token does not follow where a server points."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def _answer(url: str, key: str | None) -> int:
    request = urllib.request.Request(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {key}"} if key else {})
    opener = urllib.request.build_opener(_Stay())
    try:
        with opener.open(request, timeout=ANSWER_SECONDS) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise RunError(f"nobody answers at {url}: {reason}. Is the head up, and the tunnel open?") from None


def _shown(given: str) -> str:
    """An address without what may be a password in it."""
    return given.rpartition("@")[2]
