"""How commands speak to the terminal: errors, tables, progress bars. What a run shows is in track/console.py.

Everything that comes from outside (paths, names, texts of samples) is printed as it is, never read as markup.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline.errors import MillstreamError

if TYPE_CHECKING:
    from pipeline.checkpoint.format import Listed

REFRESH_SECONDS = 0.1

_out = Console(highlight=False, soft_wrap=True)
_err = Console(highlight=False, soft_wrap=True, stderr=True)


def say(text: str, style: str = "") -> None:
    """One line or more on standard output."""
    _out.print(Text(text, style=style))


def error(found: MillstreamError) -> None:
    """An error on standard error: the first line in red, what follows (the list, the mending) plain."""
    first, newline, rest = str(found).partition("\n")
    _err.print(Text(first, style="bold red") + Text(newline + rest))


def warn(text: str) -> None:
    """Something that a person should know, though the command did what it was asked."""
    _err.print(Text(f"warning: {text}", style="yellow"))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table; every cell is shown whole."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))
    _out.print(shown, soft_wrap=False)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Gives a function (stage, done, total) that draws one bar per stage; draws nothing when nobody watches."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=_err,
        disable=not _err.is_terminal,
        transient=True,
    )
    stages, drawn = {}, {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in stages:
            stages[stage] = bars.add_task(stage, total=total)
        now = time.monotonic()
        if done >= total or now - drawn.get(stage, 0.0) > REFRESH_SECONDS:  # called for every sample
            bars.update(stages[stage], completed=done, total=total)
            drawn[stage] = now

    with bars:
        yield show


@contextmanager
def busy(text: str) -> Iterator[None]:
    """Shows that something whose end is not known is going on, while it does; nothing when nobody watches."""
    with _err.status(text) if _err.is_terminal else nullcontext():
        yield


def size(count: float) -> str:
    """Bytes for people: kB, MB, GB, TB are powers of 1,000."""
    power = min(int(math.log10(max(count, 1))) // 3, 4)
    return f"{count / 1000**power:,.{1 if power else 0}f} {['bytes', 'kB', 'MB', 'GB', 'TB'][power]}"


def checkpoint(listed: Listed) -> list[str]:
    """A row of `checkpoint list`: step, attempt, when, size, metrics, state."""
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(listed.path.stat().st_mtime))
    state = "; ".join(f"{damage.file} {damage.detail}" for damage in listed.damage) or "good"
    if listed.manifest is None:
        return [str(listed.step), "-", saved, "-", "-", state]
    bytes_ = sum(file.bytes for file in listed.manifest.files.values())
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in listed.manifest.metrics.items())
    return [str(listed.step), str(listed.manifest.attempt), saved, size(bytes_), metrics, state]
