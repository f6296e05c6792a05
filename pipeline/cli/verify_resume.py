"""`millstream verify-resume`: proof, on the user's own run, that a kill changes nothing. See __init__.py."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.verify_resume import Report

EXAMPLE = "Example: millstream verify-resume configs/digits.yaml cluster.workers=2 --steps 20 --more 20"
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def verify_resume(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file that describes the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys set for this time.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Before the checkpoint that is gone on from.")] = 10,
    more: Annotated[int, typer.Option(min=1, help="After it.")] = 10,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Other number to go on with; fewer that share the micro batches evenly without it."),
    ] = None,
    report: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the report there too.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the runs where they are, and say where.")] = False,
) -> None:
    """Prove that a run goes on after a kill as if there had been none.

    Trains without a break. Trains, kills every worker with SIGKILL, goes on
    with the same number of workers, and with another. Compares. Exit code 1
    when something is not as promised. All of it is in a temporary folder.
    """
    from pipeline.cli import terminal
    from pipeline.config import load
    from pipeline.errors import RunError

    checked = load(config, overrides or ())
    if report and not report.absolute().parent.is_dir():
        raise RunError(f"{report} cannot be written: there is no folder {report.parent}; make it first")
    from pipeline.verify_resume import planned, verify

    for number in STOPS:
        signal.signal(number, _stop)
    with planned(checked, steps, more, workers, keep) as plan:
        if keep:
            terminal.say(f"the runs stay in {plan.folder}")
        with terminal.progress() as progress:
            found = verify(plan, terminal.say, progress)
        if report:
            report.write_text(json.dumps(found.to_json(), indent=2) + "\n")
        show(found)
    raise typer.Exit(0 if found.passed else 1)


def _stop(number: int, frame: FrameType | None) -> None:
    """Asked to end, it clears away what it began; asked again meanwhile, it does not leave that half done."""
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def show(report: Report) -> None:
    """The table and the verdict."""
    from pipeline.cli import terminal

    for comparison in report.comparisons:
        terminal.say(f"\nresumed with {comparison.workers} worker{'s' * (comparison.workers > 1)}", "bold")
        rows = [[check.what, "ok" if check.kept else "FAILED", check.said] for check in comparison.checks]
        terminal.table(["", "", "beside the run without a break"], rows)
    terminal.say("")
    if report.skipped:
        terminal.say(f"not tried with another number of workers: {report.skipped}", "yellow")
    took = f"{report.seconds:.0f} s"
    if report.passed:
        terminal.say(f"this run can be resumed: all as promised ({took})", "bold")
        return
    terminal.say(f"this run can NOT be resumed as promised ({took})", "bold red")
    if report.environment.get("device", "cpu") != "cpu" and not report.plan.config.deterministic:
        terminal.say("on a GPU equal bits need `deterministic: true`")
