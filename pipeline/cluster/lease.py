"""One writer per run folder: a lease with a heartbeat, and the numbers of attempts.

`take` writes who owns the run into lease.json, or raises and names who does. An owner that is provably dead (same
machine and boot, its process gone) is replaced at once; one that cannot be looked at from here (another host) after
30 s in which its heartbeat did not move, by the monotonic clock here: clocks of two hosts are never compared.
`new_attempt` gives each attempt a number of its own, whatever happens; a checkpoint of an older attempt is refused by
that number. Should a lease ever be lost (a driver stopped for a minute on another host), the latecomer changes nothing.

It gives up: on a file system without locks two takeovers of the same dead lease in the same instant could both succeed;
the attempt numbers still tell them apart.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.errors import RunError
from pipeline.run import newest_attempt
from pipeline.whole_file import sync

BEAT_SECONDS = 5.0
SILENCE_SECONDS = 30.0
LOOK_SECONDS = 0.2


class Lease:
    """Ownership of a run folder, kept by a daemon thread until `release`. Made by `take`."""

    def __init__(self, folder: Path, owner: Mapping[str, Any], file: int, beat_seconds: float) -> None:
        self.folder, self.owner, self._file = folder, owner, file
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, args=(beat_seconds,), name="lease", daemon=True)
        self._heart.start()

    @property
    def lost(self) -> bool:
        """Whether somebody else has taken the run over; this process must not write into it any more."""
        owner = _read(self.folder / "lease.json")[0]
        return owner is None or owner.get("token") != self.owner["token"]

    def release(self) -> None:
        """Give the run free; a second time, or after it was lost, does nothing."""
        if self._released.is_set():
            return
        self._released.set()
        self._heart.join()
        with _lock(self.folder):
            if not self.lost:
                (self.folder / "lease.json").unlink()
        os.close(self._file)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _beat(self, seconds: float) -> None:
        # In place, at the same length: works on a full disk, and cannot touch the file of somebody who took over.
        beat = 0
        while not self._released.wait(seconds):
            beat += 1
            with suppress(OSError):
                os.pwrite(self._file, _content(self.owner, beat), 0)


def take(
    folder: Path,
    *,
    say: Callable[[str], None] | None = None,
    silence_seconds: float = SILENCE_SECONDS,
    beat_seconds: float = BEAT_SECONDS,
) -> Lease:
    """Become the one that writes into this run folder.

    Raises RunError naming host and process of the owner when it is alive. `say` gets one line before a wait of up to
    `silence_seconds` for a sign of life from another host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seen, since, told = b"", time.monotonic(), False
    while True:
        with _lock(folder):
            owner, content = _read(folder / "lease.json")
            alive = _alive(owner) if content else False
            silent = bool(content) and content == seen and time.monotonic() - since >= silence_seconds
            if alive is False or (alive is None and silent):
                return _acquire(folder, replace=bool(content), beat_seconds=beat_seconds)
        moved = bool(seen) and content != seen
        if alive or moved:
            raise RunError(_taken(folder, owner))
        if not seen:
            seen, since = content, time.monotonic()
        if say and not told:
            say(f"{_name(owner)} owned this run; waiting up to {silence_seconds:.0f} s for a sign of life")
            told = True
        time.sleep(min(LOOK_SECONDS, silence_seconds / 4))


def owner(folder: Path) -> str | None:
    """Who owns this run folder now, as words; None when nobody does, or the owner is dead."""
    found, content = _read(folder / "lease.json")
    if not content:
        return None
    alive = _alive(found)
    return None if alive is False else _name(found) + ("" if alive else ", if it lives")


def new_attempt(folder: Path) -> int:
    """The next attempt's number, from 1; nobody else ever gets the same. Written to attempts/<number>.json."""
    attempts = folder / "attempts"
    attempts.mkdir(parents=True, exist_ok=True)
    number = newest_attempt(folder)
    while True:
        number += 1
        try:
            with (attempts / f"{number:04d}.json").open("x") as file:
                json.dump({"attempt": number, **_myself(), "time": time.time()}, file)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            continue
        sync(attempts)
        return number


def _acquire(folder: Path, *, replace: bool, beat_seconds: float) -> Lease:
    """Puts our own lease in place, whole from the first moment. The lock is held."""
    path = folder / "lease.json"
    owner = {"token": secrets.token_hex(8), **_myself(), "since": time.time()}
    draft = folder / f".lease-{owner['token']}"
    file = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.write(file, _content(owner, 0))
        os.fsync(file)
        if replace:
            draft.replace(path)
        else:
            os.link(draft, path)  # fails when there is one, even without locks
    except OSError as error:
        os.close(file)
        if isinstance(error, FileExistsError):
            raise RunError(_taken(folder, _read(path)[0])) from error
        raise RunError(
            f"cannot take the run folder {folder}: {error.strerror}. Mend the disk or its permissions"
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    return Lease(folder, owner, file, beat_seconds)


def _alive(owner: Mapping[str, Any] | None) -> bool | None:
    """Whether the owner's process lives; None when that cannot be told from here."""
    here = _myself()
    if owner is None or not here["boot"] or any(owner.get(key) != here[key] for key in ("host", "boot", "namespace")):
        return None
    return owner.get("started") == _started(owner.get("pid", 0))


def _myself() -> dict[str, Any]:
    """What identifies this process among all machines, their boots and containers."""
    return {
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "namespace": os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else "",
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _started(pid: int) -> int | None:
    """Start of a process in clock ticks since boot (proc(5), field 22 of stat); None when it is gone or a zombie."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[19]) if fields and fields[0] not in "ZX" else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _content(owner: Mapping[str, Any], beat: int) -> bytes:
    return (json.dumps({**owner, "beat": f"{beat:012d}"}) + "\n").encode()


def _read(path: Path) -> tuple[dict[str, Any] | None, bytes]:
    """(owner where it can be read, the bytes as they are); no bytes when there is no lease."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None, b""
    try:
        owner = json.loads(content)
    except ValueError:
        return None, content or b"\0"  # an empty file is somebody's lease too
    return (owner, content) if isinstance(owner, dict) else (None, content)


def _name(owner: Mapping[str, Any] | None) -> str:
    return f"process {owner.get('pid')} on host {owner.get('host')}" if owner else "somebody (lease.json is damaged)"


def _taken(folder: Path, owner: Mapping[str, Any] | None) -> str:
    return (
        f"run already active: {folder} is owned by {_name(owner)}, attempt {newest_attempt(folder)}. "
        "Nothing was changed. Stop that one first, wait for it, or give this run another `name`."
    )


@contextmanager
def _lock(folder: Path, seconds: float = 10.0) -> Iterator[None]:
    """Keeps looking at a lease and replacing it together; held for milliseconds, freed by the kernel at a kill."""
    file = os.open(folder / ".lease.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        give_up = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > give_up:
                    raise RunError(
                        f"{folder}/.lease.lock is held by a stopped process: end it and try again"
                    ) from error
                time.sleep(0.01)
            except OSError:  # a file system without locks: see the top of this file
                break
        yield
    finally:
        os.close(file)
