"""The only functions that change what a checkpoint folder holds: write a file, seal one, move and remove.

Data goes through `write` in chunks: into the file and then to the disk (fsync), beside that into its sha256.
An error of the operating system comes out as a CheckpointError that names the path and the free space. At the end stand
the single operations, so small that a test can cut the power at each of them.

It gives up speed for certainty: every file is waited for. Local and mounted file systems only.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pipeline.checkpoint.manifest import FileDigest
from pipeline.errors import CheckpointError
from pipeline.whole_file import sync

PIECE = 8 << 20  # bytes that are written and hashed at a time
BEHIND = 32  # pieces that are written and not yet hashed; they stay in memory
WORTH_A_THREAD = 1 << 20  # bytes; below, telling a thread takes as long as hashing


def write(path: Path, chunks: Iterable[bytes | bytearray | memoryview]) -> FileDigest:
    """Writes a new file, hashing on the way, and waits until it is on the disk. A partial file is removed.

    Raises CheckpointError naming the path and the free space when the disk is full or cannot be written.
    """
    digest, size = hashlib.sha256(), 0
    hashing: deque[Future[None]] = deque()
    try:
        with explained(path), ThreadPoolExecutor(1, thread_name_prefix="sha256") as beside:
            with _create(path) as file:
                for chunk in chunks:
                    for piece in _pieces(chunk):
                        if hashing or piece.nbytes >= WORTH_A_THREAD:
                            hashing.append(beside.submit(digest.update, piece))
                        else:
                            digest.update(piece)
                        _append(file, piece)
                        size += piece.nbytes
                        while len(hashing) > BEHIND or (hashing and hashing[0].done()):
                            hashing.popleft().result()
            sync(path)  # what is still to be hashed is, while the disk is waited for
            for each in hashing:
                each.result()
    except Exception:
        with suppress(OSError):
            _remove(path)
        raise
    return FileDigest(size, digest.hexdigest())


def _pieces(chunk: bytes | bytearray | memoryview) -> Iterator[memoryview]:
    """The chunk in pieces, so that it can be hashed while it is written."""
    view = memoryview(chunk).cast("B")
    return (view[begin : begin + PIECE] for begin in range(0, view.nbytes, PIECE))


def seal(path: Path) -> FileDigest:
    """Size and sha256 of a file that another library wrote, after waiting until it is on the disk."""
    with explained(path):
        sync(path)
        return digest_of(path)


def digest_of(path: Path) -> FileDigest:
    """Size and sha256 of a file; reads all of it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileDigest(file.tell(), digest.hexdigest())


def names_in(folder: Path) -> list[str]:
    """Sorted names of what a folder holds; none when there is no such folder."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def discard(folder: Path) -> None:
    """Removes a folder that is no checkpoint, as far as that is possible; the next `stage` tries again."""
    for name in names_in(folder):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            discard(path)
        else:
            with suppress(OSError):  # cleaning up must not hide the error that made it necessary
                _remove(path)
    with suppress(OSError):
        _remove_folder(folder)


@contextmanager
def explained(path: Path, bytes_needed: int = 0) -> Iterator[None]:
    """Turns an OSError into a CheckpointError that says where, how much, and what to do."""
    try:
        yield
    except OSError as error:
        need = f"{bytes_needed / 1e6:,.1f} MB needed, " if bytes_needed else ""
        room = f"{need}{free_bytes(path) / 1e6:,.1f} MB free"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = f"disk full ({room}): free some space, lower `checkpoint.keep`, or point `runs` elsewhere"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            problem = f"not writable ({error.strerror}): mend the permissions or point `runs` elsewhere"
        else:
            problem = f"{error.strerror or error} ({room})"
        raise CheckpointError(
            f"checkpoint not written: {path}: {problem}. Earlier checkpoints are untouched."
        ) from error


def free_bytes(path: Path) -> int:
    """Free space where `path` lies or will lie; 0 when even that cannot be told."""
    folder = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


# --- every change on the disk is one of these, or `sync` ---


def make_folder(path: Path) -> None:
    """Makes a new folder; its parent is there."""
    path.mkdir()


def rename(path: Path, target: Path) -> None:
    """Moves a folder to a name that is not taken, at once."""
    path.rename(target)


def _create(path: Path) -> BinaryIO:
    return path.open("xb")


def _append(file: BinaryIO, chunk: memoryview) -> None:
    file.write(chunk)


def _remove(path: Path) -> None:
    path.unlink()


def _remove_folder(path: Path) -> None:
    path.rmdir()
