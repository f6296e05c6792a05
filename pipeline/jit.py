"""Locks that a killed build of native code has left: found at the start, said, and removed when they are surely dead.

torch builds extensions on first use, one process at a time: a file `lock` in the build's folder says so, and who finds
it waits until it goes, for ever (torch.utils.file_baton, 2.13). Its owner keeps it open, so one that no process has
open is dead, given that all processes can be seen: those of a machine, not only of a container, and no other machine
shares the folder. Where that is not given the lock stays and is named. Nothing in this package builds anything by
itself (DeepSpeed's shared-memory collective is switched off); a task's own code may.

What it gives up: only torch's folder of extensions is looked at, and only at the start.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.data.slow import file_system

SHARED = ("nfs", "lustre", "fuse", "cifs", "smb", "gpfs", "ceph", "beegfs", "9p", "virtiofs")  # by several machines
INITIAL = "pid:[4026531836]"  # the machine's own process namespace: PROC_PID_INIT_INO of Linux (proc_ns.h)


def clear(folder: Path | None = None) -> list[str]:
    """Remove dead locks of torch's extension folder; a sentence for each lock that was there."""
    said, folder = [], folder or extensions()
    for lock in sorted([*folder.glob("*/lock"), *folder.glob("*/*/lock")]):
        try:
            found = os.stat(lock)
        except OSError:
            continue  # released just now
        owner = holder(found)
        if owner:
            said.append(f"process {owner} builds native code ({lock}): waiting for it")
        elif provable(lock):
            lock.unlink(missing_ok=True)
            said.append(f"removed {lock}, which a killed build of native code had left")
        else:
            said.append(
                f"{lock} says that native code is being built, but no process here does. If none does elsewhere "
                "either, remove it: whoever needs that code waits for it"
            )
    return said


def extensions() -> Path:
    """torch's folder of built extensions (torch.utils.cpp_extension.get_default_build_root)."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else cache / "torch_extensions"


def provable(lock: Path) -> bool:
    """Whether every process that could hold a lock can be seen from here."""
    kind = file_system(lock).split()[0]
    whole = os.path.exists("/proc/self/ns/pid") and os.readlink("/proc/self/ns/pid") == INITIAL
    mine = os.stat(lock).st_uid == os.geteuid()  # others' open files cannot be looked at
    return whole and mine and not kind.startswith(SHARED)


def holder(found: os.stat_result) -> int | None:
    """A process that has this file open, among those that can be looked at."""
    for pid, entry in _open_files():
        try:
            one = os.stat(entry)
        except OSError:
            continue
        if (one.st_dev, one.st_ino) == (found.st_dev, found.st_ino):
            return pid
    return None


def _open_files() -> Iterator[tuple[int, str]]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            numbers = os.listdir(process / "fd")
        except OSError:
            continue
        yield from ((int(process.name), f"{process}/fd/{number}") for number in numbers)
