"""Looks for secrets in what is about to leave: a job's files are read by more people than its owner.

Two ways to see one: its value is known here (an environment variable that is called a key, a token, a password; a token
file; W&B's entry in ~/.netrc), or it has the form of one (an access key, a private key, a password in a URL). What is
found is told by its kind and never shown. What it gives up: a secret of no known form whose value is not known here.
"""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pipeline.problems import Problem

SHORTEST = 10  # a shorter value stands in any text by chance
CALLED = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL)S?(_ID)?$", re.IGNORECASE)
FORMS = {
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "an access key of AWS": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a token of GitHub": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36}\b"),
    "a token of Hugging Face": re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    "a password in a URL": re.compile(r"\w://[^/\s:@'\"]*:[^/\s:@'\"{$]+@"),
}
# name: value, name=value and "name": "value", where the name says what it is; a path or a variable is no secret.
NAMED = re.compile(
    r"(?i)(?:api_?key|secret(?:_?access)?_?key|client_secret|password|auth_token|access_token)"
    r"[\"']?\s*[=:]\s*[\"']?(?![\"'/$~<{]|null\b|none\b|os\.|get)[^\s\"',}]{8,}"
)
MEND = "keep it in a file or an environment variable at the target (launch/README.md, Secrets), and take it out here"


def known() -> dict[str, str]:
    """What is called a secret on this machine: where it is kept -> its value. For comparison only."""
    found = {f"the value of {name}": value for name, value in os.environ.items() if CALLED.search(name)}
    with suppress(OSError, netrc.NetrcParseError):
        for host, (_, _, password) in netrc.netrc().hosts.items():
            found[f"the password of {host} in ~/.netrc"] = password or ""
    for path in (os.environ.get("RAY_AUTH_TOKEN_PATH"), "~/.ray/auth_token"):
        with suppress(OSError, UnicodeDecodeError):
            found[f"the token in {path}"] = Path(path or "").expanduser().read_text().strip()
    return {where: value for where, value in found.items() if len(value) >= SHORTEST and not os.path.exists(value)}


def find(text: str, secrets: Mapping[str, str], *, code: bool = False) -> list[tuple[int, str]]:
    """(line from 1, kind) of every secret in `text`. `code`: names such as password= are not taken for one."""
    forms = FORMS if code else {**FORMS, "what is called a secret": NAMED}
    found = [(text.index(value), where) for where, value in secrets.items() if value in text]
    found += [(match.start(), kind) for kind, form in forms.items() for match in form.finditer(text)]
    return sorted({(text.count("\n", 0, at) + 1, kind) for at, kind in found})


def problems(files: Mapping[str, str], *, code: bool = False) -> list[Problem]:
    """A problem for every secret in files (name -> text)."""
    secrets = known()
    return [
        Problem(name, f"holds {kind}", line, MEND)
        for name, text in files.items()
        for line, kind in find(text, secrets, code=code)
    ]
