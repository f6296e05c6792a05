"""Who may write to the terminal: the console, and nobody else.

Libraries print and log what a person at the terminal cannot act on. Their output, also that of native code, goes to a
file in the run's `logs`; what a person should see goes through the journal to the console.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


def rank_log(folder: Path, attempt: int, rank: int) -> Path:
    """Where a worker's output goes."""
    return folder / "logs" / f"attempt-{attempt:04d}-rank-{rank}.log"


def to_file(path: Path) -> None:
    """Send all further output of this process to `path`: for a worker, which has no terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _redirect(path)


@contextmanager
def apart(path: Path) -> Iterator[TextIO]:
    """Keep the terminal for whoever holds the stream that this yields; all other output goes to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = os.dup(1), os.dup(2)
    with os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as terminal:
        _redirect(path)
        try:
            yield terminal
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, file in zip(saved, (1, 2), strict=True):
                os.dup2(stream, file)
                os.close(stream)


@contextmanager
def shared(path: Path) -> Iterator[TextIO]:
    """Send only what libraries log or warn to `path`: for a process whose prints and breakpoints are its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler, root = logging.FileHandler(path, delay=True), logging.getLogger()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    before, root.handlers[:] = list(root.handlers), [handler]
    logging.captureWarnings(True)
    try:
        yield sys.stdout
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = before
        handler.close()


def _redirect(path: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
