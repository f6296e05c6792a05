"""What run folders say when no attempt is under way: which is a run's, what has changed, what must be there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline import config as configs
from pipeline.checkpoint import format as checkpoints
from pipeline.checkpoint import rollbacks
from pipeline.checkpoint.uploads import home_of
from pipeline.config import Config
from pipeline.errors import CheckpointError
from pipeline.track import journal


def run_folder(config: Config, fresh: bool) -> Path:
    """The run's folder: `<runs>/<name>`, or the newest of `<name>-2`, `<name>-3`, ... that `fresh` started.

    Raises CheckpointError when the second home has to be asked for that and does not answer.
    """
    runs = Path(config.runs)
    taken = {1: runs / config.name} if (runs / config.name).exists() else {}
    for path in runs.glob(f"{config.name}-*"):
        number = path.name.removeprefix(f"{config.name}-")
        if number.isdigit() and (path / "config.yaml").exists():
            taken[int(number)] = path
    newest = max(taken, default=0)
    if newest and not fresh:
        return taken[newest]

    def named(number: int) -> Path:
        return runs / (config.name if number == 1 else f"{config.name}-{number}")

    try:
        while (home := home_of(config, named(newest + 1))) and home.steps():  # it lives in its second home, not here
            newest += 1
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\nWhether the run lives there cannot be told, and it is not in {runs}. Mend that, or go on "
            "without the second home: checkpoint.url=null"
        ) from error
    return named(newest + 1 if fresh else max(newest, 1))


def note_configuration(config: Config, folder: Path, say: Callable[..., None]) -> None:
    """Name what differs from the configuration that the run had before; a new run has this one."""
    path = folder / "config.yaml"
    if not path.exists():
        save_configuration(config, folder)
    changes = configs.difference(configs.load_resolved(path), config)
    if changes:
        say(f"changed since the last attempt: {', '.join(changes)}", style="yellow")


def save_configuration(config: Config, folder: Path) -> None:
    """Put the resolved configuration into the run folder, all at once."""
    draft = folder / "config.yaml.tmp"
    draft.write_text(configs.dump(config))
    draft.replace(folder / "config.yaml")


def expect_checkpoint(config: Config, folder: Path) -> None:
    """Raises CheckpointError when the journal knows of a checkpoint and none is there: no fresh start by accident."""
    root = folder / "checkpoints"
    saved = [record for record in journal.read(folder / "journal.jsonl").records if record["kind"] == "save"]
    for decision in rollbacks.read(root):
        saved = [r for r in saved if r["step"] <= decision.first or r["attempt"] > decision.attempt]
    if saved and not checkpoints.list_checkpoints(root):
        home = home_of(config, folder)
        if home is not None and home.steps(rollbacks.given_up(root)):
            return
        raise CheckpointError(
            f"{root} is empty{f' and {home.url} too' if home else ''}, but step {saved[-1]['step']} was "
            "saved there. Bring the folder back, or start anew on purpose with --fresh (a new run folder; nothing is "
            "deleted)."
        )


def finished(config: Config, folder: Path) -> bool:
    """Whether the last step of this configuration is committed."""
    return any(found.step >= config.steps for found in checkpoints.list_checkpoints(folder / "checkpoints"))
