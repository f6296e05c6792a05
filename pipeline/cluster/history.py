"""What run folders say when no attempt is under way: which is a run's, what has changed, what must be there, and what
became of each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pipeline import config as configs
from pipeline.checkpoint import format as checkpoints
from pipeline.checkpoint import rollbacks
from pipeline.checkpoint.uploads import home_of
from pipeline.cluster import lease
from pipeline.config import Config
from pipeline.errors import CheckpointError, RunError
from pipeline.run import Run
from pipeline.track import goodput, journal


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


class Row(NamedTuple):
    """One run in a list, as text."""

    name: str
    state: str
    step: str
    best: str
    restarts: str
    useful: str
    heard: str


def overview(folder: Path) -> list[Row]:
    """The runs in `folder`, the one last heard of first. Raises RunError when there is none."""
    rows = [(path.parent.stat().st_mtime, _row(path.parent)) for path in folder.glob("*/config.yaml")]
    if not rows:
        raise RunError(f"{folder} holds no runs; `millstream train CONFIG` makes one")
    return [row for _, row in sorted(rows, key=lambda pair: pair[0], reverse=True)]


def _row(folder: Path) -> Row:
    run = Run(folder)
    records, wanted = run.records(), run.config.evaluate
    facts = journal.summary(records, wanted.best, wanted.mode)
    best = next((f"{name} {value:.4g}" for name, _, value, _ in facts["evaluations"] if name == wanted.best), "-")
    useful = goodput.shares(records).get("useful")
    return Row(
        folder.name,
        _state(run, records),
        f"{facts['last_step']}/{run.config.steps}",
        best,
        str(facts["restarts"]),
        "-" if useful is None else f"{useful:.0%}",
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(records[-1]["time"])) if records else "-",
    )


def _state(run: Run, records: list[journal.Record]) -> str:
    active = lease.owner(run.folder)
    if active:
        return f"training: {active}"
    if run.finished:
        return "done"
    last = next((record for record in reversed(records) if record["kind"] in ("attempt", "end", "failure")), None)
    if last is None:
        return "not begun"
    if last["kind"] == "end" and last["reason"] != "rollback":
        return "stopped"
    return "given up" if last["kind"] == "failure" and last["exit_code"] else "interrupted"
