"""`millstream init`: a first configuration for a folder of data. See __init__.py."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: millstream init photos"


def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Raw data by class, text, or packed shards.")],
    out: Annotated[Path | None, typer.Option(help="YAML to write; NAME.yaml without it.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the run; the folder's own without it.")] = None,
    data: Annotated[Path, typer.Option(help="Folder that will hold what is packed.")] = Path("data"),
) -> None:
    """Look at a folder of data, write a complete configuration for a first run on it, and say what to do next.

    Nothing is overwritten.
    """
    from pipeline.cli import terminal
    from pipeline.starter import folder as folders
    from pipeline.starter import template

    called = folders.check_name(name) if name else folders.name_of(folder)
    path = out or Path(f"{called}.yaml")
    template.refuse_existing(path)
    found = folders.look(folder, called, data)
    for line in found.lines:
        terminal.say(line)
    template.write(found, path, called)
    terminal.say(f"wrote {path}: {found.task}", "bold")
    terminal.say("next:")
    quoted = shlex.quote(str(path))
    for command in [*found.commands, f"millstream doctor {quoted}", f"millstream train {quoted}"]:
        terminal.say(f"  {command}")
