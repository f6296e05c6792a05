"""What stands above every dated result: hardware, versions, load, command. And where results are kept."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "ray", "numpy")


def processor() -> str:
    """Model and number of cores that this process may use."""
    name = platform.processor() or platform.machine()
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        names = [line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def memory_gib() -> float:
    """Of the host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def versions() -> str:
    """Of Python and of the packages that decide how fast a step is."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up as plain text too."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def page(title: str, facts: Sequence[str], body: str, load_before: float) -> str:
    """One result as Markdown: title, hardware, versions, command, load average, then `facts` and `body`."""
    now = datetime.now().astimezone()
    load = f"{load_before:.1f} before, {os.getloadavg()[0]:.1f} after, of which the measurement itself is a part"
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    lines = [
        f"# {title}, {now:%Y-%m-%d %H:%M}",
        "",
        f"- Hardware: {processor()}, {memory_gib():.0f} GiB; {platform.system()} {platform.release()}",
        f"- Versions: {versions()}",
        f"- Command: `{command}`",
        f"- Load average of the machine: {load}",
        *(f"- {fact}" for fact in facts),
        "",
        body,
        "",
    ]
    return "\n".join(lines)


def save(kind: str, text: str) -> Path:
    """Append `text` to today's file of this kind; returns its path."""
    path = RESULTS / f"{kind}-{datetime.now():%Y-%m-%d}.md"
    path.parent.mkdir(exist_ok=True)
    before = path.read_text() + "\n" if path.exists() else ""
    path.write_text(before + text)
    return path
