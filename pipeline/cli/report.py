"""`millstream runs`, `report` and `dashboard`: what became of runs, as a list, as a page, live. See track/page/."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

RUNS = "Example: millstream runs --json"
REPORT = "Example: millstream report runs/digits runs/digits-2 --out digits.html"
DASHBOARD = "Example: millstream dashboard runs"
LOOPBACK = "127.0.0.1"


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder that holds run folders.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="For programs: a list, one object a run.")] = False,
) -> None:
    """List runs: what became of each, how far it is, how its time was spent."""
    from pipeline.cli import terminal
    from pipeline.track.page import model

    found = model.rows(folder)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    columns = ["run", "state", "step", "best", "restarts", "useful", "last heard"]
    terminal.table(columns, [_cells(row) for row in found])


def _cells(row: Mapping[str, Any]) -> list[str]:
    best = f"{row['best'][0]} {row['best'][1]:.4g}" if row["best"] and row["best"][1] is not None else "-"
    return [
        row["name"],
        f"{row['state']}: {row['owner']}" if row["owner"] else row["state"],
        f"{row['last_step']}/{row['steps'] or '?'}",
        best,
        str(row["restarts"]),
        "-" if row["useful"] is None else f"{row['useful']:.0%}",
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["heard"])) if row["heard"] else "-",
    ]


def report(
    run: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Write one HTML file that shows what happened in runs, side by side. It needs nothing beside it, no network."""
    from pipeline.cli import terminal
    from pipeline.run import open_run

    folders = list(dict.fromkeys(open_run(path).folder for path in run))
    from pipeline.track.page import document

    size = document.write(folders, out)
    terminal.say(f"{out}: {len(folders)} run{'s' * (len(folders) > 1)}, {terminal.size(size)}; open it in a browser")


def dashboard(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that holds run folders.")] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    host: Annotated[str, typer.Option(help="Address to listen at; others than loopback let others read.")] = LOOPBACK,
) -> None:
    """Serve the page of all runs in a folder, refreshed while they train. Reads only. Ctrl-C ends it."""
    from pipeline.cli import terminal
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
