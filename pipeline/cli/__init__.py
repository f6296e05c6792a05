"""The `millstream` command: reads arguments, calls one function of the part that does the work, prints what came out.

Nothing heavy is imported before a command runs, so `millstream --help` is instant and `train` finds a wrong
configuration in under a second. Errors that a person can mend are shown as a message with their exit code (78: mend the
configuration, 1: anything else); a traceback is a bug. What it gives up: no option of a run is a flag. All are keys of
its configuration, set on the command line as key.path=value.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import pipeline
from pipeline.cli import checkpoint, data, doctor, init, report, sample, submit, sweep, track, verify_resume
from pipeline.errors import MillstreamError

INTERRUPTED = 130  # what typer makes of Ctrl-C; `train` has a way of its own

app = typer.Typer(name="millstream", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(data.app, name="data")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(track.app, name="track")
app.add_typer(submit.app, name="submit")


def main() -> None:
    """Entry of the `millstream` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":  # others never fail
            stream.reconfigure(errors="replace")  # a name or a bar that the terminal's encoding lacks is shown as ?
    try:
        app([_at_home(argument) for argument in sys.argv[1:]])
    except MillstreamError as error:
        from pipeline.cli import terminal

        terminal.error(error)
        sys.exit(error.exit_code)
    except SystemExit as ending:
        if ending.code == INTERRUPTED:
            typer.echo("\nstopped; no file is half-written", err=True)
        raise


def _at_home(argument: str) -> str:
    """~ as the home folder where no shell has seen to it: in quotes, and behind the = of an option."""
    head, equals, tail = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return head + equals + (os.path.expanduser(tail) if tail == "~" or tail.startswith("~/") else tail)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"millstream {pipeline.__version__}")
        raise typer.Exit


def _keys(incomplete: str) -> list[str]:
    """Completes KEY=VALUE to the keys of a configuration."""
    from pipeline.config import Config
    from pipeline.problems import places

    return [f"{place}=" for place in places(Config) if place.startswith(incomplete)]


@app.callback(epilog="Example: millstream train configs/digits.yaml")
def millstream(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Exact, elastic training of deep networks from sharded data."""


@app.command(epilog="Example: millstream train configs/digits.yaml cluster.workers=4 optim.lr=1e-3")
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file that describes the run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys set for this time.", autocompletion=_keys),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew in a new run folder; deletes nothing.")] = False,
    new_order: Annotated[
        bool, typer.Option("--new-order", help="Go on though data, weights, seed or batch sizes are others now.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="Running Ray cluster; without it one is started here.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="For programs: the journal's records as they come, a JSON object a line.")
    ] = False,
) -> None:
    """Train, or go on where the same command stopped.

    Ctrl-C finishes the step, saves, and ends with exit code 75. Done is 0.
    """
    from pipeline.config import load

    checked = load(config, overrides or ())
    from pipeline.cluster import driver

    raise typer.Exit(driver.run(checked, fresh=fresh, address=address, new_order=new_order, as_json=as_json))


@app.command(epilog="Example: millstream resume runs/digits steps=800")
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys set from now on.", autocompletion=_keys),
    ] = None,
    address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="Running Ray cluster; without it one is started here.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="For programs: the journal's records as they come, a JSON object a line.")
    ] = False,
) -> None:
    """Go on with a run from its newest good checkpoint, by the configuration that lies in its folder."""
    from pipeline.config import load
    from pipeline.run import open_run

    folder = open_run(run).folder
    checked = load(folder / "config.yaml", overrides or ())
    from pipeline.cluster import driver

    raise typer.Exit(driver.run(checked, folder=folder, address=address, as_json=as_json))


@app.command(epilog="Example: millstream evaluate runs/digits --checkpoint 400")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN_OR_CONFIG", help="Run folder, or the YAML file of its run.")],
    checkpoint: Annotated[
        int | None, typer.Option(metavar="STEP", help="Step of the checkpoint; the newest good one without it.")
    ] = None,
) -> None:
    """Score the held-out data sets of a run with one of its checkpoints."""
    from pipeline.cli import terminal

    folder = _run_folder(run)
    from pipeline.cluster import driver

    step, scores = driver.evaluate(folder, checkpoint)
    terminal.say(f"{folder.name} after {step:,} steps", "bold")
    terminal.table(["metric", "value"], [[name, f"{value:.6g}"] for name, value in scores.items()])


app.command(epilog=report.RUNS)(report.runs)
app.command(epilog=report.REPORT)(report.report)
app.command(epilog=report.DASHBOARD)(report.dashboard)
app.command("sample", epilog=sample.EXAMPLE)(sample.sample)
app.command("verify-resume", epilog=verify_resume.EXAMPLE)(verify_resume.verify_resume)
app.command("init", epilog=init.EXAMPLE)(init.init)
app.command("doctor", epilog=doctor.EXAMPLE)(doctor.doctor)
app.command("sweep", epilog=sweep.EXAMPLE)(sweep.sweep)


def _run_folder(path: Path) -> Path:
    """The run folder at `path`, or that of the configuration at `path`."""
    from pipeline.run import open_run

    if not path.is_file():
        return open_run(path).folder
    from pipeline.cluster import history
    from pipeline.config import load_resolved, resolve
    from pipeline.errors import RunError

    config = resolve(load_resolved(path))
    if not (config.runs / config.name).is_dir():
        raise RunError(f"{path} has no run in {config.runs} yet; train it first: millstream train {path}")
    return history.run_folder(config, fresh=False)
