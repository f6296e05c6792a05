"""A plain HTTP server that asks for signatures as S3 does: enough of S3 for s3fs to look at objects and to read them.

It computes each signature of an address by itself, as Amazon's "Authenticating Requests: Using Query Parameters (AWS
Signature Version 4)" has it; of other requests it looks at the id of the key only.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from datetime import UTC, datetime, timedelta
from email.message import Message
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from tests.data.file_server import FileServer

BUCKET, KEY, SECRET = "shelf", "AKIDMILLSTREAM", "not/so+secret"


class SignedServer(FileServer):
    """keys: {id: secret} of those that are served.  anybody: is, too.  signs: whether signed addresses are taken.

    targets: of all requests so far, with how each was signed: "address", "header", "not".
    """

    def __init__(self, folder: Path, **options) -> None:
        super().__init__(folder, **options)
        self.keys, self.signs, self.anybody = {KEY: SECRET}, True, False
        self.targets: list[tuple[str, str, str]] = []

    def refusal(self, method: str, target: str, headers: Message) -> int | None:
        query = dict(parse_qsl(urlsplit(target).query))
        asked = headers.get("Authorization", "")
        way = "address" if "X-Amz-Signature" in query else "header" if asked else "not"
        self.targets.append((way, method, target))
        if way == "not":
            return None if self.anybody else 403
        if way == "address":
            return None if self.signs and self._is_signed(method, target, headers, query) else 403
        key = re.search(r"Credential=([^/]+)/", asked)
        return None if key and key[1] in self.keys else 403

    def reads(self, way: str) -> int:
        """How many GETs were signed in this way."""
        return sum((found, method) == (way, "GET") for found, method, _ in self.targets)

    def _is_signed(self, method: str, target: str, headers: Message, query: dict[str, str]) -> bool:
        key, *scope = query["X-Amz-Credential"].split("/")
        signed_at = datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        until = signed_at + timedelta(seconds=int(query["X-Amz-Expires"]))
        if key not in self.keys or datetime.now(UTC) > until:
            return False
        names = query["X-Amz-SignedHeaders"]
        pairs = sorted(
            (quote(k, safe="-_.~"), quote(v, safe="-_.~")) for k, v in query.items() if k != "X-Amz-Signature"
        )
        canonical = [
            method,
            quote(unquote(urlsplit(target).path), safe="/-_.~"),
            "&".join(f"{name}={value}" for name, value in pairs),
            *(f"{name}:{headers.get(name, '').strip()}" for name in names.split(";")),
            "",
            names,
            "UNSIGNED-PAYLOAD",
        ]
        digest = hashlib.sha256("\n".join(canonical).encode()).hexdigest()
        secret = f"AWS4{self.keys[key]}".encode()
        for part in scope:
            secret = hmac.digest(secret, part.encode(), "sha256")
        text = "\n".join([query["X-Amz-Algorithm"], query["X-Amz-Date"], "/".join(scope), digest])
        return hmac.digest(secret, text.encode(), "sha256").hex() == query["X-Amz-Signature"]


def give_keys(file: Path, key: str, secret: str) -> None:
    """What a `credential_process` prints: keys that end so soon that botocore asks for others before it signs again."""
    ends = datetime.now(UTC) + timedelta(minutes=5)
    told = {"Version": 1, "AccessKeyId": key, "SecretAccessKey": secret, "Expiration": ends.isoformat()}
    file.write_text(json.dumps(told))
