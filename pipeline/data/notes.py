"""What a scan has done so far, one line for each shard, so that a scan that was killed goes on where it was.

FOLDER/.index.partial is there while a scan is unfinished. A note is believed only if nothing says that its tar has
changed since (size, times, inode), and if the segment beside the tar has the digest of the note. The file is locked
while a scan writes to it, so two scans of one folder cannot mix.

What it gives up: the tar of a note is not read again; who changes its bytes and sets the kernel's clock back is
believed until `millstream data verify`.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pipeline.data.root import Shard
from pipeline.errors import DataError

NAME = ".index.partial"
SETTLED_NS = 1_000_000_000  # a tar that was written to so shortly before can change again and keep its times


class Stamp(NamedTuple):
    """What the system knows of a file, and changes when it is written to. Times in ns."""

    size: int
    modified: int
    changed: int
    inode: int


class Note(NamedTuple):
    """One scanned shard, and the tar as it was then; `stamp` None: too young for its times to tell."""

    shard: Shard
    stamp: Stamp | None


def stamp(path: Path) -> Stamp:
    """Of a file as it is now; OSError when it is gone."""
    found = os.stat(path)
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def settled(found: Stamp) -> Stamp | None:
    """The stamp, if a change from now on would show in it."""
    return found if max(found.modified, found.changed) + SETTLED_NS < time.time_ns() else None


def read(folder: Path) -> dict[str, Note]:
    """The notes of an unfinished scan by the name of the shard; none when there was none."""
    notes: dict[str, Note] = {}
    try:
        lines = (folder / NAME).read_bytes().split(b"\n")[:-1]  # what follows the last line feed was cut by a kill
    except OSError:
        return notes
    for line in lines:
        try:
            shard, found = json.loads(line)
            notes[shard[0]] = Note(Shard._make(shard), Stamp._make(found))
        except (ValueError, TypeError, IndexError):
            continue  # a line that a crash left unreadable: its shard is scanned again
    return notes


class Notes:
    """Open notes: what was there is in `before`, `add` writes one more."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.before = read(folder)
        self._descriptor = descriptor
        os.write(descriptor, b"\n")  # ends a line that a kill has cut

    def add(self, note: Note) -> None:
        if note.stamp is not None:
            os.write(self._descriptor, json.dumps(note).encode() + b"\n")


@contextmanager
def writing(folder: Path) -> Iterator[Notes]:
    """The notes of a folder, locked. DataError when another scan has them, or the folder cannot be written to."""
    path = folder / NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise DataError(
            f"{path}: the index cannot be written ({error.strerror}); indexes lie beside their shards, so give "
            "write permission and space there, or copy the shards"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: is being indexed already; wait for it, or end that process") from None
        except OSError:
            pass  # a file system without locks; its scans are told apart by their owners
        yield Notes(folder, descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """The scan is finished."""
    (folder / NAME).unlink(missing_ok=True)
