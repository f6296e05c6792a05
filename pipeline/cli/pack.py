"""`millstream data pack`: raw files of every kind into shards."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import ExitStack
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.data.pack.pack import Kind as Known
    from pipeline.data.pack.tars import Chosen
    from pipeline.data.pack.writer import Packed

CORES = os.cpu_count() or 1


class Kind(Enum):
    """What raw files are."""

    auto = "auto"
    images = "images"
    audio = "audio"
    arrays = "arrays"
    table = "table"
    tars = "tars"
    text = "text"
    chats = "chats"


class End(Enum):
    """A column of a table."""

    first = "first"
    last = "last"


SourceArgument = Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder or file; see --kind.")]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="New folder; gets train/ and, with --holdout, test/.")]
KindOption = Annotated[
    Kind,
    typer.Option(
        help="What it is: images or audio, as SOURCE/<class>/<file>; arrays (npy, npz, csv of pixels); table (csv, "
        "tsv, jsonl, parquet, arrow, a folder saved by `datasets`); tars; text, which becomes rows of tokens; chats "
        "(jsonl of messages), of which only the answers are learnt."
    ),
]
HoldoutOption = Annotated[float, typer.Option(min=0, help="For test/: below 1 a share, from 1 on a number.")]
SeedOption = Annotated[int, typer.Option(help="Of the shuffle.")]
ShuffleOption = Annotated[bool, typer.Option(help="Write samples in a random order, or as they come.")]
ShardMbOption = Annotated[float, typer.Option(min=0.001, help="Size of a shard in MB (10^6 bytes), about.")]
ThreadsOption = Annotated[int, typer.Option(min=1, help="Files read at a time; the result is the same.")]
WorkersOption = Annotated[
    int,
    typer.Option(min=0, help="Processes that read instead of threads, for large tables; the result is the same."),
]
AddressOption = Annotated[
    str | None, typer.Option(help="Ray cluster whose machines read instead; all see the same folders.")
]
OriginOption = Annotated[str | None, typer.Option(help="Where the source comes from, in words; kept in card.json.")]
LicenceOption = Annotated[str | None, typer.Option(help="Of the source; kept in card.json.")]
FieldOption = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel="Tables",
        metavar="MEMBER=COLUMN",
        help="Such as cls=label, txt=caption, jpg=photo (bytes, or the path of a file), '*=file' (extension by "
        "content); may be repeated. Without it all columns are taken, by their values.",
    ),
]
KeyOption = Annotated[str | None, typer.Option(rich_help_panel="Tables", help="Column of the keys; else numbers.")]
TogetherOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel="Tables",
        metavar="COLUMN",
        help="Hold out rows of equal value together, or none of them, such as all of a speaker.",
    ),
]
FilesOption = Annotated[
    Path | None,
    typer.Option(resolve_path=True, rich_help_panel="Tables", help="Folder of paths in columns; else the table's own."),
]
OnlyOption = Annotated[
    Path | None, typer.Option(resolve_path=True, rich_help_panel="Tars", help="File with the keys to take, one a line.")
]
LeaveOutOption = Annotated[
    Path | None, typer.Option(resolve_path=True, rich_help_panel="Tars", help="File with the keys not to take.")
]
PrefixKeysOption = Annotated[
    bool, typer.Option("--prefix-keys", rich_help_panel="Tars", help="Put the tar's name before its keys.")
]
ShapeOption = Annotated[
    str | None, typer.Option(rich_help_panel="Arrays", help="Of one image, if rows are flat: 28x28 or 32x32x3.")
]
LabelOption = Annotated[End, typer.Option(rich_help_panel="Arrays", help="Column of the class, if it is in the rows.")]
LabelsOption = Annotated[
    Path | None,
    typer.Option(resolve_path=True, rich_help_panel="Arrays", help="File of the classes (.npy), if they are apart."),
]
ScaleOption = Annotated[
    float, typer.Option(rich_help_panel="Arrays", help="Multiplies the values, to make them 0 to 255.")
]
TokenizerOption = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel="Text", help="tokenizer.json or its folder; without it one is trained (not for chats)."
    ),
]
TemplateOption = Annotated[
    Path | None, typer.Option(rich_help_panel="Text", help="Chat template (Jinja) instead of the tokenizer's own.")
]
VocabularyOption = Annotated[
    int, typer.Option(min=257, rich_help_panel="Text", help="Tokens of the tokenizer that is trained.")
]
LengthOption = Annotated[int, typer.Option(min=1, rich_help_panel="Text", help="Tokens predicted per sample.")]
PatternOption = Annotated[
    list[str] | None, typer.Option(rich_help_panel="Text", help="Files to take, such as '*.py'; may be repeated.")
]
ExcludeOption = Annotated[
    list[str] | None, typer.Option(rich_help_panel="Text", help="Files or folders to leave out; may be repeated.")
]


def pack(
    source: SourceArgument,
    out: OutArgument,
    kind: KindOption = Kind.auto,
    holdout: HoldoutOption = 0.0,
    seed: SeedOption = 0,
    shuffle: ShuffleOption = True,
    shard_mb: ShardMbOption = 32.0,
    threads: ThreadsOption = CORES,
    workers: WorkersOption = 0,
    address: AddressOption = None,
    origin: OriginOption = None,
    licence: LicenceOption = None,
    field: FieldOption = None,
    key: KeyOption = None,
    together: TogetherOption = None,
    files: FilesOption = None,
    only: OnlyOption = None,
    leave_out: LeaveOutOption = None,
    prefix_keys: PrefixKeysOption = False,
    shape: ShapeOption = None,
    label: LabelOption = End.last,
    labels: LabelsOption = None,
    scale: ScaleOption = 1.0,
    tokenizer: TokenizerOption = None,
    template: TemplateOption = None,
    vocabulary: VocabularyOption = 8192,
    length: LengthOption = 512,
    pattern: PatternOption = None,
    exclude: ExcludeOption = None,
) -> None:
    """Pack raw files into indexed WebDataset shards, ready to train on.

    When it is stopped or killed, the same command goes on where it was, and gives the same bytes.
    """
    from pipeline.cli import long_running, terminal
    from pipeline.data.pack import pack as packer

    command = shlex.join(["millstream", *sys.argv[1:]])
    packing = packer.Packing(holdout, seed, shuffle, round(shard_mb * 1e6), 4, threads, licence, origin, command)
    arrays = packer.Arrays(shape=_shape(shape), label=label.value, labels=labels, scale=scale)
    patterns, excluded = tuple(pattern or packer.PATTERNS), tuple(exclude or ())
    text = packer.Text(length, vocabulary, tokenizer, patterns=patterns, exclude=excluded)
    chats = packer.Chats(length, tokenizer, template)
    columns = packer.Columns(tuple(map(_member, field or ())), key, together, files)
    chosen = _chosen(only, leave_out, prefix_keys)
    asked = _kind(kind, bool(field), bool(only or leave_out or prefix_keys))
    packed_by = partial(packer.pack, source, out, packing, kind=asked, arrays=arrays, text=text, chats=chats)
    with ExitStack() as stack:
        progress = stack.enter_context(terminal.progress())
        stack.enter_context(long_running.goes_on())
        mapping = stack.enter_context(long_running.mapping(workers, address)) if workers or address else None
        packed = packed_by(columns=columns, chosen=chosen, mapping=mapping, progress=progress)
    _say_packed(packed)


def _kind(kind: Kind, fields: bool, chosen: bool) -> Known | None:
    """What the source is taken for: as asked, or as only one kind has such options; None: to be found out."""
    if kind is not Kind.auto:
        return kind.value
    if fields:
        return "table"
    return "tars" if chosen else None


def _say_packed(packed: Packed) -> None:
    """What was made, and what to do next."""
    from pipeline.cli import terminal
    from pipeline.yaml_file import scalar

    for warning in packed.warnings:
        terminal.warn(warning)
    counts = ", ".join(f"{packed.folder / split} {count:,} samples" for split, count in packed.samples.items())
    terminal.say(f"packed {counts}", style="bold")
    train, test = packed.folder / "train", packed.folder / "test"
    sets = f", evaluate: {{test: {scalar(test)}}}" if "test" in packed.samples else ""
    preview = f"millstream data preview {shlex.quote(str(train))}"
    terminal.say(f"Look at it with `{preview}`; in a configuration it is")
    terminal.say(f"  data: {{train: {scalar(train)}{sets}}}")


def _chosen(only: Path | None, leave_out: Path | None, prefix: bool) -> Chosen:
    """Which samples of tars are taken."""
    from pipeline.data.pack.tars import Chosen

    if only and leave_out:
        raise typer.BadParameter("give the keys to take or those to leave out, not both", param_hint="--only")
    return Chosen(only or leave_out, leave_out is not None, prefix)


def _member(text: str) -> tuple[str, str]:
    """`cls=label` as ("cls", "label")."""
    member, equals, column = text.partition("=")
    if not (member and equals and column) or "/" in member:
        raise typer.BadParameter(f"{text!r} is not MEMBER=COLUMN, such as cls=label", param_hint="--field")
    return member, column


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
