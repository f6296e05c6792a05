"""`millstream sample`: texts or pictures from a trained network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.tasks import Row

EXAMPLE = 'Example: millstream sample runs/stdlib --prompt "def main(" --count 2 tokens=100 temperature=0.7'


def sample(
    source: Annotated[Path, typer.Argument(metavar="CHECKPOINT_OR_RUN", help="A checkpoint, or a run: its newest.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Options of the task; text: tokens, temperature, top_p, top_k, chat. A wrong one is told.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to go on from; may be repeated. Without it: from nothing.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Samples for each prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Other seeds give other samples, the same gives the same.")] = 0,
    ema: Annotated[bool, typer.Option("--ema", help="The running averages of the weights instead.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="New folder for all samples. Pictures get one in any case."),
    ] = None,
) -> None:
    """Let a trained network write text, or make pictures.

    Any ZeRO stage, any number of workers; every byte of the checkpoint is verified first. Texts are printed. Pictures
    are written as PNG, and all of them in grid.png.
    """
    options = dict(map(_option, words or ()))
    from pipeline import sample as sampling
    from pipeline.checkpoint import weights
    from pipeline.cli import terminal

    if output:
        sampling.refuse_existing(output)
    loaded = weights.load(source, ema=ema)
    for note in loaded.notes:
        terminal.warn(note)
    with terminal.busy(f"{count * max(1, len(prompt or ()))} samples of {loaded.path.name}"):
        rows = sampling.sample(loaded, prompt or (), count=count, seed=seed, options=options)
    for number, row in enumerate(rows):
        _print(number, len(rows), row)
    if output is None and any(_is_picture(value) for row in rows for value in row.values()):
        output = _free(f"samples-{loaded.manifest.config.get('name', 'run')}-{loaded.manifest.step}")
    if output:
        files = sampling.write(output, rows, count if prompt and len(prompt) > 1 else None)
        shown = next((file for file in files if file.name == sampling.GRID), files[0])
        terminal.say(f"{len(rows)} samples of {loaded.path.name} in {output}; look at {shown}", "bold")


def _print(number: int, total: int, row: Row) -> None:
    """A row's texts as they are, below each other; numbers in the line above them."""
    from pipeline.cli import terminal

    facts = ", ".join(f"{name} {value:g}" for name, value in row.items() if isinstance(value, int | float))
    texts = {name: value for name, value in row.items() if isinstance(value, str)}
    if facts or texts:
        terminal.say(f"--- {number + 1} of {total}" + (f": {facts}" if facts else ""), "bold")
    for name, text in texts.items():
        if len(texts) > 1:
            terminal.say(f"{name}:", "bold")
        terminal.say(text)


def _is_picture(value: object) -> bool:
    return not isinstance(value, str | int | float)


def _free(name: str) -> Path:
    """A folder of this name here, with a number behind it where that is taken."""
    number, path = 1, Path(name)
    while path.exists():
        number += 1
        path = Path(f"{name}-{number}")
    return path


def _option(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not (key and equals):
        raise typer.BadParameter(f"{word!r} is not KEY=VALUE, such as tokens=100", param_hint="KEY=VALUE")
    return key, value
