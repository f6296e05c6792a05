"""`millstream checkpoint ...`: what the checkpoints of a run are, and whether they are whole.

Arguments in, one function of pipeline.checkpoint, a table or a few lines out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback(epilog="Example: millstream checkpoint list runs/digits")
def checkpoints() -> None:
    """List and verify the checkpoints of a run."""


@app.command("list", epilog="Example: millstream checkpoint list runs/digits")
def list_(run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]) -> None:
    """Show the checkpoints of a run; contents are not read, `verify` does that."""
    from pipeline import terminal
    from pipeline.run import open_run

    found = open_run(run).checkpoints()
    terminal.table(
        ["step", "attempt", "saved", "size", "metrics", "state"], [terminal.checkpoint(each) for each in found]
    )
    if not found:
        terminal.say("none yet")


@app.command("verify", epilog="Example: millstream checkpoint verify runs/digits")
def verify_checkpoints(run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]) -> None:
    """Read every byte of a run's checkpoints and compare digests. Exit code 1 when one is damaged."""
    from pipeline import terminal
    from pipeline.checkpoint.format import verify
    from pipeline.run import open_run

    found = open_run(run).checkpoints()
    damages = []
    with terminal.progress() as progress:
        for count, each in enumerate(found, 1):
            damages.append(verify(each.path))
            progress("verify", count, len(found))
    for damage in (damage for listed in damages for damage in listed):
        terminal.say(str(damage), "red")
    bad = sum(map(bool, damages))
    if bad:
        terminal.say(f"{bad} of {len(found)} checkpoints damaged; a run goes on from the newest good one", "bold red")
        raise typer.Exit(1)
    checked = f"{len(found)} checkpoint{'s' if len(found) > 1 else ''}"
    terminal.say(f"all good: {checked}, every byte as written" if found else "none yet", "bold")
