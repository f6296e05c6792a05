"""`millstream data`: index, verify, stats, preview, repair, merge, send, head, and the commands of two more files.

See __init__.py for how commands are written.
"""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli import pack, simulate
from pipeline.cli.long_running import goes_on, mapping

if TYPE_CHECKING:
    from pipeline.data.index import Index

app = typer.Typer(no_args_is_help=True)


@app.callback(epilog="Example: millstream data pack photos/ data/photos --holdout 0.1")
def data() -> None:
    """Pack, index, verify and look at data sets."""
    # Asked to end by a scheduler, a data command does as by Ctrl-C: it keeps what is done, and says so.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@app.command(epilog="Example: millstream data index data/photos/train")
def index(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Folder or URL of tar shards, written by WebDataset or by tar.")
    ],
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="Running Ray cluster to use instead of processes here.")
    ] = None,
) -> None:
    """Scan tar shards made elsewhere and write their index; the shards stay as they are.

    When it is stopped, the same command goes on where it was.
    """
    from pipeline.cli import terminal
    from pipeline.data import index as indexer
    from pipeline.data.storage import is_url

    if is_url(folder):
        from pipeline.data.remote.index_url import index_url

        with terminal.progress() as progress:
            told(index_url(folder, workers, progress), folder)
        return
    shards, sizes = [], indexer.find_shards(folder)
    done, total, before = 0, sum(sizes.values()), indexer.unfinished(folder)
    if before:
        terminal.say(f"going on: {before} of {len(sizes)} shards were scanned before")
    try:
        with terminal.progress() as progress, mapping(workers, address) as over:
            for shard in indexer.scan(folder, over):
                shards.append(shard)
                done += shard.bytes
                progress("index", done, total)
            made = indexer.commit(folder, shards)
    except KeyboardInterrupt:
        kept = f"{len(shards)} of {len(sizes)} shards are scanned, and the same command goes on from there"
        typer.echo(f"\n{kept}: millstream data index {shlex.quote(str(folder))}", err=True)
        raise
    told(made, folder)


def told(made: Index, place: str) -> None:
    """Say what was indexed."""
    from pipeline.cli import terminal

    size = terminal.size(made.bytes)
    terminal.say(f"indexed {len(made.shards)} shards: {made.samples:,} samples, {size}, identity {made.identity[:12]}")
    terminal.say(f"Look at it with `millstream data preview {shlex.quote(place)}`, train on it with {_set(place)}")


def _set(place: Path | str) -> str:
    """A data set as a key of the command line, for a shell."""
    return f"data.train={shlex.quote(str(place))}"


@app.command(epilog="Example: millstream data verify data/photos/train")
def verify(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder or URL of indexed tar shards.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Read every sample's bytes and compare them with the index. Exit code 1 when something is damaged.

    What no sample is made of, the zeros between the members of a tar, is not looked at.
    """
    from pipeline.cli import terminal
    from pipeline.data import damage as checker
    from pipeline.data.index import read_root
    from pipeline.data.parallel import processes, threads
    from pipeline.data.storage import is_url

    damages, done, whole = [], 0, read_root(folder)
    over = threads(workers) if is_url(folder) else processes(workers)
    with terminal.progress() as progress:
        for found in checker.verify(folder, over):
            if isinstance(found, checker.Damage):
                damages.append(found)
            else:
                done += found.bytes
                progress("verify", done, whole.bytes)
    if damages:
        rows = [[damage.shard or "-", damage.member or "-", damage.kind, damage.message] for damage in damages]
        terminal.table(["shard", "member", "kind", "damage"], rows)
        terminal.say(f"{len(damages)} damaged; bring good copies of these shards back, then verify again", "bold red")
        raise typer.Exit(1)
    terminal.say(
        f"all good: {len(whole.shards):,} shards, {whole.samples:,} samples, nothing differs from the index", "bold"
    )


@app.command(epilog="Example: millstream data stats data/photos/train")
def stats(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder or URL of indexed tar shards.")],
    looked: Annotated[
        int, typer.Option("--sample", min=1, help="Samples whose bytes are looked into: lengths, sizes of pictures.")
    ] = 2000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Count what is in a data set: bytes, fields, classes and their balance, lengths, sizes of pictures, shards."""
    import json

    from pipeline.cli import terminal
    from pipeline.data import stats as counter
    from pipeline.data import stats_page

    with terminal.progress() as progress:
        found = counter.stats(folder, looked, progress)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
        return
    for number, section in enumerate(stats_page.page(found)):
        terminal.say(f"\n{section.title}" if number else section.title, "bold")
        for note in section.notes:
            terminal.say(note)
        if section.columns:
            terminal.table(section.columns, section.rows)


@app.command(epilog="Example: millstream data preview data/photos/train --sheet photos.png")
def preview(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder or URL of indexed tar shards.")],
    count: Annotated[int | None, typer.Option(min=1, help="Samples to show; 4, or 64 on a sheet.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Draw them as a .html page, or pictures as a .png.")] = None,
) -> None:
    """Show what is in a data set: size, classes, shapes, and a few samples spread over all of it."""
    from pipeline.cli import terminal
    from pipeline.data import preview as previewer

    if sheet is None:
        terminal.say(previewer.preview(folder, count or 4))
    else:
        previewer.write_sheet(folder, sheet, count or 64)
        terminal.say(f"drew {sheet}")


@app.command(epilog="Example: millstream data repair data/photos/train data/photos/good")
def repair(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of indexed tar shards.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder, for the data set without them.")],
    drop: Annotated[Path | None, typer.Option(help="File of keys to leave out too, one a line.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Write a data set without the samples whose bytes changed or do not decode; the list is in OUT/left_out.json.

    Good shards are linked, not copied. When it is stopped, the same command goes on where it was.
    """
    from pipeline.cli import terminal
    from pipeline.data.pack import repair as repairer
    from pipeline.data.parallel import processes

    with terminal.progress() as progress, goes_on():
        repaired = repairer.repair(folder, out, drop, processes(workers), progress)
    for left in repaired.left_out[:10]:
        terminal.warn(f"left out {left.key or f'{left.samples} samples of {left.shard}'}: {left.why}")
    count = sum(left.samples for left in repaired.left_out)
    if count:
        terminal.say(f"left out {count:,} samples, listed in {out / repairer.LEFT_OUT}")
    anew = f"{repaired.rewritten} shards written anew"
    terminal.say(f"{out}: {repaired.samples:,} samples, identity {repaired.identity[:12]}, {anew}", "bold")
    terminal.say(f"Train on it with {_set(out)}; a run that has begun goes on with --new-order")


@app.command(epilog="Example: millstream data merge data/photos/train data/more/train data/both")
def merge(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Indexed folders, and at the end OUT.")],
    copy: Annotated[bool, typer.Option("--copy", help="Copy the shards; by default they are linked.")] = False,
) -> None:
    """Make one data set over the shards of several, in OUT, a new folder; no shard is read.

    When it is stopped, the same command goes on where it was.
    """
    from pipeline.cli import terminal
    from pipeline.data.pack import merge as merger

    *sets, out = folders
    with terminal.progress() as progress, goes_on():
        merged = merger.merge(sets, out, copy, progress)
    for warning in merged.warnings:
        terminal.warn(warning)
    if merged.renamed:
        terminal.say("shards have the number of their set before their names, which met or were out of order")
    terminal.say(
        f"{out}: {merged.samples:,} samples in {merged.shards} shards, identity {merged.identity[:12]}", "bold"
    )
    terminal.say(f"Look at it with `millstream data stats {shlex.quote(str(out))}`, train on it with {_set(out)}")


@app.command(epilog="Example: millstream data send data/photos s3://bucket/photos")
def send(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of indexed tar shards, or what `data pack` made.")],
    url: Annotated[str, typer.Argument(metavar="URL", help="Where it shall be; any that fsspec knows.")],
    threads: Annotated[int, typer.Option(min=1, help="Files sent at a time.")] = 8,
) -> None:
    """Copy a data set to an object store; its index goes last, so that it is found whole or not at all.

    When it is stopped, the same command goes on where it was.
    """
    from pipeline.cli import terminal
    from pipeline.data import send as sender

    with terminal.progress() as progress, goes_on():
        sent = sender.send(folder, url, threads, progress)
    terminal.say(
        f"sent {sent.files} files, {terminal.size(sent.bytes)}, to {url}" if sent.files else f"{url} has it all", "bold"
    )


@app.command(epilog="Example: millstream data head data/photos/train fox/0007 --to looked-at")
def head(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder or URL of indexed tar shards.")],
    key: Annotated[str, typer.Argument(metavar="KEY", help="Of the sample, as `data preview` shows it.")],
    to: Annotated[Path | None, typer.Option(help="Folder that gets its members as files.")] = None,
) -> None:
    """Show one sample: where it lies and what is in it; with --to, write its members to a folder."""
    from pipeline.cli import terminal
    from pipeline.data import head as finder
    from pipeline.data.preview import describe
    from pipeline.data.reader import open_dataset

    with open_dataset(folder) as dataset:
        sample = finder.find(dataset, key)
        shard = dataset.index.shards.name(dataset.index.locate(sample.number)[0])
        terminal.say(f"sample {sample.number} of {len(dataset):,}, in {shard}")
        for line in describe(dataset.index.storage, sample):
            terminal.say(line)
        for path in finder.write(sample, to) if to else ():
            terminal.say(f"wrote {path}")


app.command(epilog="Example: millstream data pack photos/ data/photos --holdout 0.1 --licence CC-BY-4.0")(pack.pack)
app.command(epilog=simulate.EXAMPLE)(simulate.simulate)
