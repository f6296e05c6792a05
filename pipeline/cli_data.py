"""`millstream data`: pack, index, verify, stats, preview. See cli.py for how commands are written."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.data.parallel import Mapping
    from pipeline.data.writer import Packed

app = typer.Typer(no_args_is_help=True)


class Kind(Enum):
    """What raw files are."""

    auto = "auto"
    images = "images"
    arrays = "arrays"
    text = "text"


class End(Enum):
    """A column of a table."""

    first = "first"
    last = "last"


@app.callback(epilog="Example: millstream data pack photos/ data/photos --holdout 0.1")
def data() -> None:
    """Pack, index, verify and look at data sets."""
    # Asked to end, by a person or by a scheduler, a data command clears away what is half-made before it goes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@app.command(epilog="Example: millstream data pack photos/ data/photos --holdout 0.1 --licence CC-BY-4.0")
def pack(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of images by class or of text; or a file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder; gets train/ and, with --holdout, test/.")],
    kind: Annotated[Kind, typer.Option(help="What the raw files are.")] = Kind.auto,
    holdout: Annotated[float, typer.Option(min=0, help="For test/: below 1 a share, from 1 on a number.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the shuffle.")] = 0,
    shard_mb: Annotated[float, typer.Option(min=0.001, help="Size of a shard in MB (10^6 bytes), about.")] = 32.0,
    threads: Annotated[int, typer.Option(min=1, help="Files read at a time; the result is the same.")] = os.cpu_count()
    or 1,
    licence: Annotated[str | None, typer.Option(help="Of the source; kept in card.json.")] = None,
    shape: Annotated[
        str | None, typer.Option(rich_help_panel="Arrays", help="Of one image, if rows are flat: 28x28 or 32x32x3.")
    ] = None,
    label: Annotated[
        End, typer.Option(rich_help_panel="Arrays", help="Column of the class, if it is in the rows.")
    ] = End.last,
    labels: Annotated[
        Path | None, typer.Option(rich_help_panel="Arrays", help="File of the classes (.npy), if they are apart.")
    ] = None,
    scale: Annotated[
        float, typer.Option(rich_help_panel="Arrays", help="Multiplies the values, to make them 0 to 255.")
    ] = 1.0,
    tokenizer: Annotated[
        Path | None, typer.Option(rich_help_panel="Text", help="tokenizer.json to use; without it one is trained.")
    ] = None,
    vocabulary: Annotated[
        int, typer.Option(min=257, rich_help_panel="Text", help="Tokens of the tokenizer that is trained.")
    ] = 8192,
    length: Annotated[int, typer.Option(min=1, rich_help_panel="Text", help="Tokens predicted per sample.")] = 512,
    pattern: Annotated[
        list[str] | None, typer.Option(rich_help_panel="Text", help="Files to take, such as '*.py'; may be repeated.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(rich_help_panel="Text", help="Files or folders to leave out; may be repeated.")
    ] = None,
) -> None:
    """Pack raw files into indexed WebDataset shards, ready to train on."""
    from pipeline import terminal
    from pipeline.data import pack as packer

    packing = packer.Packing(
        holdout=holdout,
        seed=seed,
        shard_bytes=round(shard_mb * 1e6),
        threads=threads,
        licence=licence,
        command=shlex.join(["millstream", *sys.argv[1:]]),
    )
    arrays = packer.Arrays(shape=_shape(shape), label=label.value, labels=labels, scale=scale)
    patterns, excluded = tuple(pattern or packer.PATTERNS), tuple(exclude or ())
    text = packer.Text(length, vocabulary, tokenizer, patterns=patterns, exclude=excluded)
    asked = None if kind is Kind.auto else kind.value
    with terminal.progress() as progress:
        packed = packer.pack(source, out, packing, kind=asked, arrays=arrays, text=text, progress=progress)
    _say_packed(packed)


@app.command(epilog="Example: millstream data index data/photos/train")
def index(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of tar shards, written by WebDataset or by tar.")
    ],
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="Running Ray cluster to use instead of processes here.")
    ] = None,
) -> None:
    """Scan tar shards made elsewhere and write their index; the shards stay as they are.

    When it is stopped, the same command goes on where it was.
    """
    from pipeline import terminal
    from pipeline.data import index as indexer

    shards, sizes = [], indexer.find_shards(folder)
    done, total, before = 0, sum(sizes.values()), indexer.unfinished(folder)
    if before:
        terminal.say(f"going on: {before} of {len(sizes)} shards were scanned before")
    try:
        with terminal.progress() as progress, _mapping(workers, address) as mapping:
            for shard in indexer.scan(folder, mapping):
                shards.append(shard)
                done += shard.bytes
                progress("index", done, total)
            made = indexer.commit(folder, shards)
    except KeyboardInterrupt:
        kept = f"{len(shards)} of {len(sizes)} shards are scanned, and the same command goes on from there"
        typer.echo(f"\n{kept}: millstream data index {shlex.quote(str(folder))}", err=True)
        raise
    size = terminal.size(made.bytes)
    terminal.say(f"indexed {len(made.shards)} shards: {made.samples:,} samples, {size}, identity {made.identity[:12]}")
    terminal.say(f"Look at it with `millstream data preview {folder}`, train on it with data.train={folder}")


@app.command(epilog="Example: millstream data verify data/photos/train")
def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of indexed tar shards.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Read every byte and compare it with the index. Exit code 1 when something is damaged."""
    from pipeline import terminal
    from pipeline.data import damage as checker
    from pipeline.data.index import read_root
    from pipeline.data.parallel import processes

    damages, done, whole = [], 0, read_root(folder)
    with terminal.progress() as progress:
        for found in checker.verify(folder, processes(workers)):
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
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of indexed tar shards.")],
    looked: Annotated[
        int, typer.Option("--sample", min=1, help="Samples whose bytes are looked into: lengths, sizes of pictures.")
    ] = 2000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Count what is in a data set: bytes, fields, classes and their balance, lengths, sizes of pictures, shards."""
    import json

    from pipeline import terminal
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
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of indexed tar shards.")],
    count: Annotated[int | None, typer.Option(min=1, help="Samples to show; 4, or 64 on a sheet.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Draw them as a .html page, or pictures as a .png.")] = None,
) -> None:
    """Show what is in a data set: size, classes, shapes, and a few samples spread over all of it."""
    from pipeline import terminal
    from pipeline.data import preview as previewer

    if sheet is None:
        terminal.say(previewer.preview(folder, count or 4))
    else:
        previewer.write_sheet(folder, sheet, count or 64)
        terminal.say(f"drew {sheet}")


@contextmanager
def _mapping(workers: int, address: str | None) -> Iterator[Mapping]:
    """Who works through the shards: processes here, or a Ray cluster."""
    from pipeline.data.parallel import processes

    if address is None:
        yield processes(workers)
        return
    from pipeline.cluster import tasks

    with tasks.connected(address) as mapping:
        yield mapping


def _say_packed(packed: Packed) -> None:
    """What was made, and what to do next."""
    from pipeline import terminal

    for warning in packed.warnings:
        terminal.warn(warning)
    counts = ", ".join(f"{packed.folder / split} {count:,} samples" for split, count in packed.samples.items())
    terminal.say(f"packed {counts}", style="bold")
    sets = ", evaluate: {test: " + str(packed.folder / "test") + "}" if "test" in packed.samples else ""
    terminal.say(f"Look at it with `millstream data preview {packed.folder / 'train'}`; in a configuration it is")
    terminal.say(f"  data: {{train: {packed.folder / 'train'}{sets}}}")


def _shape(text: str | None) -> tuple[int, ...] | None:
    """`28x28` as (28, 28)."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not HEIGHTxWIDTH or HEIGHTxWIDTHxCHANNELS", param_hint="--shape"
        ) from None
