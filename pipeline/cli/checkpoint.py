"""`millstream checkpoint ...`: what the checkpoints of a run are, whether they are whole, what goes, what differs.

Arguments in, one function of pipeline.checkpoint, a table or a few lines out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli import export

if TYPE_CHECKING:
    from pipeline.checkpoint.diff import Diff
    from pipeline.checkpoint.format import Listed
    from pipeline.checkpoint.retention import Retention
    from pipeline.config import Config

ROWS = 40  # of a table of differences

app = typer.Typer(no_args_is_help=True)


@app.callback(epilog="Example: millstream checkpoint list runs/digits")
def checkpoints() -> None:
    """List, verify, compare, export, send and delete the checkpoints of a run."""


@app.command("list", epilog="Example: millstream checkpoint list runs/digits")
def list_(run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]) -> None:
    """Show the checkpoints of a run; contents are not read, `verify` does that."""
    from pipeline.cli import terminal
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
    from pipeline.checkpoint.format import verify
    from pipeline.cli import terminal
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


@app.command("prune", epilog="Example: millstream checkpoint prune runs/digits --keep 1 --dry-run")
def prune(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    keep: Annotated[int | None, typer.Option(min=1, help="Newest good ones that stay.")] = None,
    keep_every: Annotated[int | None, typer.Option(min=1, metavar="STEPS", help="Multiples of it stay.")] = None,
    best: Annotated[
        str | None, typer.Option(metavar="SET/METRIC:max|min", help="The one with the best value stays.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be deleted.")] = False,
) -> None:
    """Delete old checkpoints; what is not said is as in the run's configuration.

    Those that count are read back whole first. The only good one is never deleted.
    """
    from pipeline.checkpoint.retention import Keeper
    from pipeline.cli import terminal
    from pipeline.run import open_run

    opened = open_run(run)
    keeper = Keeper(opened.folder / "checkpoints", _rules(opened.config, keep, keep_every, best))
    doomed = keeper.doomed()
    going, found = {each.step for each in doomed}, opened.checkpoints()
    rows = [["goes" if each.step in going else "stays", *terminal.checkpoint(each)] for each in found]
    terminal.table(["", "step", "attempt", "saved", "size", "metrics", "state"], rows)
    freed = terminal.size(sum(map(_bytes, doomed)))
    if not dry_run:
        keeper.prune()
    count = f"{len(doomed)} of {len(found)} checkpoint{'s' * (len(found) != 1)}"
    if not doomed:
        terminal.say("nothing to delete" if found else "none yet", "bold")
    elif dry_run:
        terminal.say(f"{count} would go, {freed} would be free; nothing was deleted", "bold")
    else:
        terminal.say(f"{count} deleted, {freed} free", "bold")


@app.command("upload", epilog="Example: millstream checkpoint upload runs/digits")
def upload(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Second home; that of the run's configuration without it.")
    ] = None,
) -> None:
    """Send what has not arrived in the second home (checkpoint.url). Exit code 1 when something is still here only."""
    from pipeline.checkpoint.remote import Remote
    from pipeline.checkpoint.retention import Retention
    from pipeline.checkpoint.uploads import Outbox
    from pipeline.cli import terminal
    from pipeline.errors import ConfigError
    from pipeline.run import open_run

    opened = open_run(run)
    where = url or opened.config.checkpoint.url
    if where is None:
        raise ConfigError(f"{run} has no second home: give --url, or set checkpoint.url in its configuration")
    outbox = Outbox(opened.folder / "checkpoints", Remote(where, opened.folder.name), Retention.of(opened.config))
    refused = []
    for sent in outbox.send():
        if sent.refused:
            refused.append(sent.step)
            terminal.say(f"step {sent.step}: {sent.refused}", "red")
        else:
            terminal.say(f"step {sent.step}: {terminal.size(sent.bytes)} in {sent.seconds:.1f} s")
    if refused:
        raise typer.Exit(1)
    terminal.say(f"all is at {outbox.home.url}", "bold")


@app.command("diff", epilog="Example: millstream checkpoint diff runs/digits runs/digits-2")
def diff_(
    a: Annotated[Path, typer.Argument(metavar="A", help="Checkpoint folder, or run folder (its newest checkpoint).")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other one; workers and ZeRO stage may differ.")],
) -> None:
    """Compare two checkpoints: how they were made, and every tensor, element by element.

    Exit code 0 when both are the same state to the bit (however they were made), 1 when not, 2 when one is damaged.
    """
    from pipeline.checkpoint import diff
    from pipeline.checkpoint.format import inspect
    from pipeline.cli import terminal

    folders = _checkpoint(a), _checkpoint(b)
    manifests = []
    with terminal.progress() as progress:
        for folder in folders:
            manifest, damage = inspect(folder)
            if manifest is None or damage:
                terminal.say("\n".join(map(str, damage)), "red")
                raise typer.Exit(2)
            manifests.append(manifest)
        found = diff.diff(*folders, (manifests[0], manifests[1]), lambda done, total: progress("compare", done, total))
    _show(found)
    raise typer.Exit(0 if found.equal else 1)


def _show(found: Diff) -> None:
    """The summary first, then what was made in another way, then the tensors, those that differ most at the top."""
    from pipeline.cli import terminal

    apart, worst = found.tensors, max((each.relative for each in found.tensors), default=0.0)
    if found.equal:
        terminal.say(f"equal: {found.compared} tensors, to the bit", "bold green")
    else:
        parts = [f"{len(apart)} of {found.compared} tensors differ, by at most {worst:.3g} relative"] * bool(apart)
        parts += [f"{len(found.state)} other things of the state"] * bool(found.state)
        terminal.say("different: " + "; ".join(parts), "bold")
    for title, facts in (("state", found.state), ("made with", found.made)):
        _table([title, "A", "B"], [[name, str(one), str(other)] for name, one, other in facts])
    rows = [
        [t.parameter, t.key, f"{t.largest:.3g}", f"{t.relative:.3g}", f"{t.elements:,} of {t.total:,}"]
        for t in sorted(apart, key=lambda t: -t.relative)
    ]
    _table(["tensor", "state", "largest", "relative", "elements that differ"], rows)


def _table(columns: list[str], rows: list[list[str]]) -> None:
    """The first rows, after an empty line, and how many more there are."""
    from pipeline.cli import terminal

    if rows:
        terminal.say("")
        terminal.table(columns, rows[:ROWS])
    if len(rows) > ROWS:
        terminal.say(f"and {len(rows) - ROWS:,} more")


def _rules(config: Config, keep: int | None, keep_every: int | None, best: str | None) -> Retention:
    """The retention of the configuration, with what the command line says instead."""
    from dataclasses import replace

    from pipeline.checkpoint.retention import Retention

    rules = Retention.of(config)
    if keep is not None:
        rules = replace(rules, keep=keep)
    if keep_every is not None:
        rules = replace(rules, keep_every=keep_every)
    if best is not None:
        metric, _, mode = best.partition(":")
        if mode not in ("max", "min"):
            raise typer.BadParameter(f"{best!r} does not say what is best: {metric}:max or {metric}:min")
        rules = replace(rules, best=f"eval/{metric}", mode=mode, keep_best=max(1, rules.keep_best))
    return rules


def _bytes(each: Listed) -> int:
    return sum(file.stat().st_size for file in each.path.iterdir())


def _checkpoint(path: Path) -> Path:
    """A checkpoint folder as it is; of a run folder the newest."""
    from pipeline.errors import CheckpointError
    from pipeline.run import open_run

    if (path / "manifest.json").is_file():
        return path
    found = open_run(path).checkpoints()
    if not found:
        raise CheckpointError(f"{path} has no checkpoint yet")
    return found[-1].path


app.command("export", epilog="Example: millstream checkpoint export runs/digits exported/digits")(export.export)
