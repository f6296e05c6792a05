"""The folder in which a data set is made, beside the place where it will be: found whole there, or not at all.

.OUT.packing holds a plan (what the result follows from) and what has been done so far, every file whole or absent. It
outlives a kill, Ctrl-C and a full disk; the same plan then goes on from there. One rename puts the result in place.

What it gives up: until then it takes its space twice, where samples are spooled first (spool.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import DataError
from pipeline.whole_file import put, sync

COPY_BYTES = 16 << 20  # at a time


class Work(NamedTuple):
    """What is half-made. folder: where.  out: what will be OUT.  warnings: what was said when it was opened."""

    folder: Path
    out: Path
    warnings: tuple[str, ...]


@contextmanager
def work_folder(out: Path, plan: Mapping[str, Any]) -> Iterator[Work]:
    """A folder beside `out`, .OUT.packing, whose part `out` becomes OUT when the block ends well.

    What an earlier try with the same plan (what the result follows from) has left there is kept; what another one has
    left is removed. The folder stays after a kill, Ctrl-C and a full disk, and is removed when the source is at fault.
    Raises DataError when `out` exists (it is never overwritten), when another process is at it, and for what the
    system refuses.
    """
    out = Path(os.path.abspath(out))
    folder = out.with_name(f".{out.name}.packing")
    refuse_existing(out)
    descriptor, keep = -1, True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(folder)
        warnings = _follow(folder, json.dumps(plan).encode())
        (folder / "out").mkdir(exist_ok=True)
        yield Work(folder, folder / "out", warnings)
        sync(folder / "out")
        os.rename(folder / "out", out)
        sync(out.parent)
        keep = False
    except OSError as error:
        mend = f"mend it, and the same command goes on with what is in {folder}"
        raise DataError(f"writing {out} failed: {error}; {mend}") from error
    except DataError as error:
        keep = descriptor < 0 or isinstance(error.__cause__, OSError)
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)


def refuse_existing(out: Path) -> None:
    """Raises DataError when something is there: nothing is ever overwritten."""
    if out.exists() or out.is_symlink():
        left = out.with_name(f".{out.name}.packing")
        if left.is_dir() and not (left / "out").exists():  # by a kill after the last rename
            shutil.rmtree(left, ignore_errors=True)
        raise DataError(f"{out} exists already; choose another folder, or remove it first, to make this data set")


def _locked(folder: Path) -> int:
    """A descriptor with the lock on a work folder. DataError when another process has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DataError(f"{folder}: is being written already; wait for it, or end that process") from None
    except OSError:
        pass  # a file system without locks
    return descriptor


def _follow(folder: Path, plan: bytes) -> tuple[str, ...]:
    """Keep what is in the folder if it follows this plan, else begin anew."""
    path, before = folder / "plan.json", b""
    if path.exists():
        before = path.read_bytes()
    if before == plan:
        return ()
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    put(path, [plan])
    changed = f"what an earlier try left in {folder} was of other files or options; it began anew"
    return (changed,) if before else ()


def json_bytes(value: Any) -> bytes:
    """JSON for people: indented, UTF-8, a newline at the end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def link(source: Path, target: Path, copy: bool = False) -> None:
    """Have a file under a second name, or a copy of its bytes where that cannot be, or when it is asked for."""
    if target.exists():
        return
    if not copy:
        with suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return
    with open(source, "rb") as file:
        put(target, iter(lambda: file.read(COPY_BYTES), b""))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty when there is no file. DataError when it holds none."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable JSON ({error}); remove it, or copy it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds {type(found).__name__}, not an object; remove it, or copy it again")
    return found
