"""Nothing follows from what the clock on the wall shows: it jumps by hours to and fro, and the run is the same."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configs
from pipeline.cluster import driver, lease
from pipeline.run import Run
from pipeline.track import summary
from tests import small_data


def run(path: Path, name: str) -> Run:
    """Train in two goes, so that the second starts from what the first has left."""
    for steps in (5, 12):
        changes = ["cluster.workers=0", f"name={name}", f"steps={steps}", "evaluate.every=3", "checkpoint.keep=3"]
        assert driver.run(configs.load(path, changes)) == driver.DONE
    return Run(path.parent / "runs" / name)


def facts(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What happened, in the order of the journal, without what is measured."""
    told = ("start", "restore", "step", "evaluation", "save", "end")
    return [(r["attempt"], r["kind"], r["step"], r.get("samples"), r.get("path")) for r in records if r["kind"] in told]


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock, in this process and whatever library, is off by up to a day, either way."""
    pictures = str(small_data.images(tmp_path / "pictures"))
    data = {"train": pictures, "evaluate": {"test": pictures}}
    task = {"name": "tests.poisoned_task"}
    path = small_data.config(tmp_path / "toy.yaml", task, Path("unused"), data=data, checkpoint={"every": 2})
    calm = run(path, "calm")
    draw, real, looks = random.Random(4), time.time, []

    def jumping() -> float:
        looks.append(draw.uniform(-86400, 86400))
        return real() + looks[-1]

    monkeypatch.setattr(time, "time", jumping)
    jumped = run(path, "jumped")
    with lease.take(jumped.folder) as mine:
        assert not mine.lost and lease.new_attempt(jumped.folder) == 3
    monkeypatch.undo()
    times = [record["time"] for record in jumped.records()]
    assert len(looks) > 30 and times != sorted(times)
    assert calm.curve("train/loss") == jumped.curve("train/loss")
    assert calm.curve("eval/test/loss") == jumped.curve("eval/test/loss")
    ordered = sorted(facts(calm.records())), sorted(facts(jumped.records()))  # saves are told when they are written
    assert ordered[0] == ordered[1]
    assert [record["seq"] for record in jumped.records()] == list(range(1, len(times) + 1))
    assert [listed.step for listed in jumped.checkpoints()] == [listed.step for listed in calm.checkpoints()]
    assert summary.summary(jumped.records())["last_step"] == 12
