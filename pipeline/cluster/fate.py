"""What became of a worker that is gone without a word: what Ray, its host's kernel and its own log tell of its end.

Want of memory is told apart from all else: Ray's memory monitor says so when it ends a worker; the kernel counts those
that it ends (`oom_kill` of the worker's cgroup, or of the host), and a count that has risen since the worker began says
so too. A crash in native code leaves its stack in the worker's log (faulthandler). What none of them explains was
killed. What it gives up: a count rises for every process of the cgroup (on a host without cgroups: of the host), so
that another's end may be taken for the worker's; of a host that is gone nothing can be known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

MONITOR = re.compile("NODE_OUT_OF_MEMORY|running low on memory|OutOfMemoryError")  # Ray 2.60, what its errors say
FATAL = re.compile(r"^Fatal Python error: (.+)$", re.MULTILINE)  # Python's faulthandler
TAIL_BYTES = 2**18  # of a log, in which its end is looked for
ROOT = Path("/")  # of the file system; another one in tests

OUT_OF_MEMORY = "killed: out of memory"
UNKNOWN = "killed, or out of memory"
_LESS = (
    "Less is needed with a smaller micro_batch_size (the same global batch, in more pieces), a higher zero.stage, or "
)
LESS_MEMORY, LESS_DEVICE_MEMORY = f"{_LESS}fewer workers on a host", f"{_LESS}zero.offload_optimizer=cpu"
_HOST = re.compile(r"^(\w*MemoryError|bad_alloc)|can't allocate memory|Cannot allocate memory|std::bad_alloc")
_DEVICE = re.compile(r"^OutOfMemoryError|(CUDA|HIP|NCCL|XPU).*out of memory", re.IGNORECASE)


def short_of_memory(kind: str, message: str) -> str:
    """How to mend an error of this type that says that memory ran out, on the host or a device; else nothing."""
    text = f"{kind}: {message}"
    return LESS_DEVICE_MEMORY if _DEVICE.search(text) else LESS_MEMORY if _HOST.search(text) else ""


def kills() -> dict[str, int]:
    """{file: processes that the kernel has ended for want of memory}, of this process's cgroup; else of the host."""
    try:
        lines = (ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    files = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        # Seen from inside a container, its own cgroup is the root, whatever the path says.
        if not controllers:
            files += [f"sys/fs/cgroup{place}/memory.events" for place in (path.rstrip("/"), "")]
        elif "memory" in controllers.split(","):
            files += [f"sys/fs/cgroup/memory{place}/memory.oom_control" for place in (path.rstrip("/"), "")]
    for file in (*files, "proc/vmstat"):
        counted = killed_by(file)
        if counted is not None:
            return {file: counted}
    return {}


def killed_by(file: str) -> int | None:
    """The count in one of these files (all have a line "oom_kill 3"); None when it cannot be had."""
    try:
        found = re.search(r"^oom_kill (\d+)$", (ROOT / file).read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def more_kills(before: Mapping[str, int]) -> bool | None:
    """Whether a count has risen since; None when that cannot be told. To be asked on the worker's host."""
    now = {file: killed_by(file) for file in before}
    known = [count > before[file] for file, count in now.items() if count is not None]
    return any(known) if known else None


def tell(raised: str, kernel: bool | None, log: Path) -> str:
    """Why a worker is gone, in a few words.

    raised: what Ray says of it.  kernel: whether the kernel has ended processes for want of memory (`more_kills`).
    """
    if MONITOR.search(raised):
        return f"{OUT_OF_MEMORY}, by Ray's memory monitor"
    if kernel:
        return f"{OUT_OF_MEMORY}, by the kernel"
    if crash := FATAL.search(tail(log)):
        return f"crashed in native code: {crash[1]}, its stack is in {log.name}"
    if "SIGTERM" in raised:
        return "ended by SIGTERM"
    return UNKNOWN if kernel is None else "killed"


def tail(log: Path) -> str:
    """The end of a log; nothing when there is none here."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
