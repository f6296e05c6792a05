"""How the machines are doing: processors, memory, disk and GPUs of each host, at a slow interval.

One worker of each host looks, in a thread of its own, so that no step waits for it, not even on a disk that hangs. What
it sees becomes a record of the journal, and from there `system/<host>/...` on the page and in W&B.

What it gives up: in a container these are numbers of the whole machine, and of its GPUs those that are seen there. GPUs
are asked by NVIDIA's own tool; no other kind is.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.session import Session

FIRST_SECONDS, SAMPLE_SECONDS = 1.0, 30.0
TOOL_SECONDS = 10.0  # that nvidia-smi has to answer
_QUERY = ("index", "utilization.gpu", "memory.used", "memory.total")


@contextmanager
def watched(session: Session) -> Iterator[None]:
    """While it lasts the host is looked at, by the first of its workers."""
    if session.world.local_rank != 0:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(session, ended), name="node", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=1.0)


def look(folder: Path) -> dict[str, float]:
    """This host now; of its processors the share in use since this thread last looked. Shares are 0 to 1."""
    import psutil

    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(folder))
    values = {
        "cpu": psutil.cpu_percent() / 100,
        "memory": memory.percent / 100,
        "memory_bytes": float(memory.used),
        "disk": disk.percent / 100,
        "disk_free_bytes": float(disk.free),
    }
    return values | _gpus()


def metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """A record of this kind as metrics: system/<host>/<what>."""
    host = re.sub(r"[^\w-]", "_", str(record["host"]))
    return {f"system/{host}/{name}": value for name, value in record["values"].items()}


def _watch(session: Session, ended: threading.Event) -> None:
    look(session.run)  # shares are counted from here
    pause = FIRST_SECONDS
    while not ended.wait(pause):
        session.record("node", host=session.host, values=look(session.run))
        pause = SAMPLE_SECONDS


def _gpus() -> dict[str, float]:
    """Share of the last moment in which each GPU computed, and of its memory; nothing where there is no nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    values: dict[str, float] = {}
    with suppress(OSError, subprocess.TimeoutExpired):
        said = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS).stdout
        for index, busy, used, total in (line.split(",") for line in said.splitlines() if line.count(",") == 3):
            with suppress(ValueError):  # "[N/A]": it does not know
                values[f"gpu{index.strip()}_memory"] = round(float(used) / float(total), 4)
                values[f"gpu{index.strip()}"] = float(busy) / 100
    return values
