"""`millstream report` and `millstream dashboard`: the page as a file, and live. See track/page/."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

REPORT = "Example: millstream report runs/digits runs/digits-2 --out digits.html"
DASHBOARD = "Example: millstream dashboard runs"
LOOPBACK = "127.0.0.1"


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Write one HTML file that shows what happened in runs, side by side. It needs nothing beside it, no network."""
    from pipeline import terminal
    from pipeline.run import open_run

    folders = list(dict.fromkeys(open_run(run).folder for run in runs))
    from pipeline.track.page import document

    size = document.write(folders, out)
    terminal.say(f"{out}: {len(folders)} run{'s' * (len(folders) > 1)}, {terminal.size(size)}; open it in a browser")


def dashboard(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that holds run folders.")] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    host: Annotated[str, typer.Option(help="Address to listen at; others than loopback let others read.")] = LOOPBACK,
) -> None:
    """Serve the page of all runs in a folder, refreshed while they train. Reads only. Ctrl-C ends it."""
    from pipeline import terminal
    from pipeline.errors import RunError

    if not folder.is_dir():
        raise RunError(f"{folder} is no folder; name one that holds run folders, such as runs")
    from pipeline.track.page.serve import Server

    server = Server(folder, host, port)
    signal.signal(signal.SIGTERM, _stop)
    try:
        count = len(server.shelf.runs)
        terminal.say(f"{folder}: {count} run{'s' * (count != 1)} at {server.url} (Ctrl-C ends it)", "bold")
        if not server.loopback:
            terminal.warn("everybody who reaches this address may read these runs; there is no password")
        server.serve_forever(poll_interval=0.1)
    except KeyboardInterrupt:
        terminal.say("ended")
    finally:
        server.server_close()


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
