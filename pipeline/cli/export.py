"""`millstream checkpoint export`: a checkpoint as a folder that transformers or diffusers opens."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class Dtype(StrEnum):
    """Types of the written weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def size(text: str) -> int:
    """Bytes in "5GB", "500 MB" (powers of 1,000), "2GiB" (of 1,024) or "1000000"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text, re.IGNORECASE)
    count = int(float(match[1]) * (1024 if match[3] else 1000) ** UNITS[match[2].upper()]) if match else 0
    if not count:
        raise typer.BadParameter(f"{text!r} is no size; write such as 5GB or 500MB")
    return count


def export(
    source: Annotated[Path, typer.Argument(metavar="CHECKPOINT_OR_RUN", help="A checkpoint, or a run: its newest.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder.")],
    dtype: Annotated[Dtype, typer.Option(help="The fp32 masters are rounded to it, once.")] = Dtype.float32,
    ema: Annotated[bool, typer.Option("--ema", help="The running averages of the weights instead.")] = False,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Of one file of weights.")] = "5GB",
) -> None:
    """Write the weights of a checkpoint into a folder that `from_pretrained` of transformers or diffusers opens.

    Any ZeRO stage, any number of workers. Every byte is compared with its sha256; the folder appears whole or not.
    """
    shard_bytes = size(max_shard_size)
    from pipeline.checkpoint import export as exporting
    from pipeline.cli import terminal

    with terminal.progress() as progress:
        done = exporting.export(source, folder, dtype=dtype.value, ema=ema, shard_bytes=shard_bytes, progress=progress)
    rows = [[name, terminal.size(count)] for name, count in done.files.items()]
    terminal.table(["file", "size"], rows)
    terminal.say(
        f"{done.folder}: {done.tensors} tensors in {done.dtype}, {terminal.size(sum(done.files.values()))}, "
        f"from {done.checkpoint.name}",
        "bold",
    )
    for note in done.notes:
        terminal.warn(note)
    terminal.say(f"open it: {done.package}.{done.opener}.from_pretrained({str(done.folder)!r})")
