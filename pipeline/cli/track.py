"""`millstream track`: what of a run W&B has, files of it that need mending, sending them. See __init__.py."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.run import Run
    from pipeline.track.wandb.segments import Segment

app = typer.Typer(
    no_args_is_help=True,
    help="Send runs to W&B that were recorded offline, or not to the end.",
    epilog="Example: millstream track sync runs/digits",
)

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")]


@app.command(epilog="Example: millstream track status runs/digits")
def status(
    runs: Runs,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: one object a run.")] = False,
) -> None:
    """Show what W&B's files of a run hold, and which steps of the journal they lack."""
    from pipeline.cli import terminal
    from pipeline.run import open_run
    from pipeline.track.wandb import sync

    for run in map(open_run, runs):
        found = sync.status(run.folder)
        rows = [[each.identity, each.path.parent.name, spans(each.steps), state(each)] for each in found.segments]
        if as_json:
            keys = ("id", "segment", "steps", "state")
            facts = {"run": str(run.folder), "id": found.identity, "missing": found.missing}
            print(json.dumps(facts | {"segments": [dict(zip(keys, row)) for row in rows]}))
            continue
        terminal.say(f"{run.folder.name}: W&B id {found.identity or '- (none yet)'}", "bold")
        if rows:
            terminal.table(["id", "segment", "steps", "state"], rows)
        if found.missing:
            lacking = spans(found.missing)
            terminal.say(f"only in the journal: steps {lacking}; `millstream track sync` sends them too", "yellow")


@app.command(epilog="Example: millstream track repair runs/digits")
def repair(runs: Runs) -> None:
    """Cut torn ends off W&B's files, and fill in from the journal what they lack.

    Nothing is sent; `sync` does this first by itself.
    """
    from pipeline.run import open_run

    for run in map(open_run, runs):
        _idle(run)
        _repair(run)


@app.command(epilog="Example: millstream track sync runs/digits runs/stdlib")
def sync(runs: Runs) -> None:
    """Send runs to W&B, each step once, whatever was sent before.

    Repairs them first. Once more, or after a failure, it sends what is
    missing and nothing twice.
    """
    from pipeline.cli import terminal
    from pipeline.errors import RunError
    from pipeline.run import open_run
    from pipeline.track.wandb import account
    from pipeline.track.wandb import sync as work

    if not account.key():
        raise RunError(f"there is no key for W&B at {account.server()}: `wandb login` once, or set WANDB_API_KEY")
    for run in map(open_run, runs):
        _idle(run)
        _repair(run)
        count = work.send(run.folder, run.config.track, terminal.say)
        said = f"{count} segment{'s' * (count != 1)} sent" if count else "W&B has everything already"
        terminal.say(f"{run.folder.name}: {said}", "bold")


def _idle(run: Run) -> None:
    """W&B's files of a run that goes on are being written. Raises RunError."""
    from pipeline.cluster import lease
    from pipeline.errors import RunError

    if owner := lease.owner(run.folder):
        raise RunError(f"{run.folder} is being trained ({owner}): wait until it has ended, then try again")


def _repair(run: Run) -> None:
    from pipeline.cli import terminal
    from pipeline.track.wandb import sync

    config = run.config
    done = sync.repair(run.folder, config.track, config.name, config.model_dump(mode="json"))
    for path, cut in done.torn.items():
        terminal.say(f"{path.parent.name}: cut a torn end of {cut} bytes")
    if done.filled:
        terminal.say(f"{run.folder.name}: filled in steps {spans(done.filled)} from the journal")


def state(segment: Segment) -> str:
    """What became of a segment, in a few words."""
    words = ["sent" if segment.sent else "written online" if segment.online else "not sent"]
    words += [f"goes on from {segment.rewound + 1}"] if segment.rewound is not None else []
    words += [f"torn end of {segment.torn} bytes"] if segment.torn else []
    return ", ".join(words)


def spans(steps: list[int]) -> str:
    """Rising steps in short: "0-19, 25"."""
    edges = [0, *(place for place, (one, next_) in enumerate(pairwise(steps), 1) if next_ != one + 1), len(steps)]
    parts = [(steps[begin], steps[end - 1]) for begin, end in pairwise(edges) if begin < end]
    return ", ".join(f"{first}-{last}" if first != last else str(first) for first, last in parts) or "-"
