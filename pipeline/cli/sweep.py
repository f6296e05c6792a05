"""`millstream sweep`: one run for each point of a grid, or for points drawn at random. See __init__.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = """Example: millstream sweep configs/digits.yaml optim.lr=1e-4,3e-4,1e-3 zero.stage=1,2

Example: millstream sweep configs/digits.yaml 'optim.lr=log(1e-5,1e-2)' --samples 20 --early"""


def sweep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file that describes the run.")],
    overrides: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUES", help="V1,V2,V3; or uniform(A,B), log(A,B), int(A,B); one value: for all runs."
        ),
    ],
    samples: Annotated[int, typer.Option(min=1, help="Draws from the ranges, for each point of the grid.")] = 1,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; as many as fit the cluster without it.")
    ] = None,
    early: Annotated[bool, typer.Option("--early", help="End weak runs early (ASHA), by evaluate.best.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a sweep that was stopped.")] = False,
    address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="Running Ray cluster; without it one is started here.")
    ] = None,
) -> None:
    """Train one run for each point, and compare them by `evaluate.best`.

    Each is a run of its own in <runs>/<name>-sweep, which `millstream resume`
    and `report` take like any other. Ctrl-C stops; --resume goes on.
    """
    from pipeline.cli import terminal
    from pipeline.cluster import sweep as sweeps

    planned, first = sweeps.plan(config, overrides, samples, parallel, early)
    runs = f"{planned.trials} run{'s' * (planned.trials > 1)}"
    terminal.say(f"{runs} in {planned.folder}, compared by {first.evaluate.best} ({first.evaluate.mode})", "bold")
    trials = sweeps.run(planned, first, address or first.cluster.address, resume, terminal.say)
    keys = [*planned.grid, *planned.drawn]
    rows = [
        [
            t.folder.name,
            *(t.keys[key] for key in keys),
            "-" if t.best is None else f"{t.best:.5g}",
            f"{t.step:,}",
            t.state,
        ]
        for t in trials
    ]
    terminal.table(["run", *keys, first.evaluate.best or "", "at step", "state"], rows)
    unfinished = planned.trials - sum(trial.state != "failed" for trial in trials)
    if unfinished:
        terminal.warn(f"{unfinished} of {planned.trials} runs did not end; the same command with --resume goes on")
        raise typer.Exit(1)
