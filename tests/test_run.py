"""A run folder, read back: curves without what was done twice, the best value, whether it is finished."""

from __future__ import annotations

from pathlib import Path

import pytest

import pipeline
from pipeline.config import dump, load, resolve
from pipeline.errors import RunError
from pipeline.track.journal import Journal
from tests.checkpoint import small_checkpoint
from tests.small_project import project

__all__ = ["project"]  # a fixture for every test here


def folder(*overrides: str) -> Path:
    made = Path("runs/small")
    made.mkdir(parents=True)
    (made / "config.yaml").write_text(dump(resolve(load("good.yaml", ["steps=40", *overrides]))))
    return made


def attempt(run: Path, number: int, steps: range, scores: dict[int, float]) -> None:
    """What a worker's attempt leaves in the journal."""
    journal = Journal(run / "journal.jsonl", number)
    journal.write({"kind": "restore" if steps.start else "start", "step": steps.start})
    for step in steps:
        journal.write({"kind": "step", "step": step, "metrics": {"train/loss": number + step / 100}})
        if step + 1 in scores:
            journal.write({"kind": "evaluation", "step": step + 1, "metrics": {"eval/test/accuracy": scores[step + 1]}})
    journal.close()


def test_curves_best_and_checkpoints() -> None:
    path = folder("evaluate.best=test/accuracy")
    run = pipeline.open_run(path)
    assert run.records() == [] and run.curve("train/loss") == ([], []) and run.best is None and not run.finished
    attempt(run.folder, 1, range(0, 30), {10: 0.5, 20: 0.9, 30: 0.99})
    small_checkpoint.save(run.folder / "checkpoints", 20)
    assert run.best == (30, 0.99)

    attempt(run.folder, 2, range(20, 40), {30: float("nan"), 40: 0.7})
    small_checkpoint.save(run.folder / "checkpoints", 40, attempt=2)
    steps, losses = run.curve("train/loss")
    assert steps == list(range(40)) and losses[19] == 1.19 and losses[20] == 2.2
    assert run.best == (20, 0.9) and run.finished  # what attempt 2 did again, it did worse
    assert [listed.step for listed in run.checkpoints()] == [20, 40]
    assert Path(run.config.data.train["train"].folder).is_absolute() and pipeline.open_run(path) == run


def test_the_smallest_can_be_the_best_and_none_may_be_asked_for() -> None:
    run = pipeline.open_run(folder("evaluate={best: test/accuracy, mode: min}"))
    attempt(run.folder, 1, range(0, 20), {10: 0.5, 20: 0.9})
    assert run.best == (10, 0.5)
    (run.folder / "config.yaml").write_text(dump(load("good.yaml")))
    assert run.best is None


def test_a_folder_that_is_no_run() -> None:
    folder()
    with pytest.raises(RunError, match="runs in it: small"):
        pipeline.open_run("runs")
