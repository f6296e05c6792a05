"""Checkpoints of a line that was given up count as absent, here and in the second home, from the decision on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pipeline.checkpoint import format, rollbacks
from pipeline.checkpoint.remote import Remote
from pipeline.checkpoint.retention import Keeper, Retention
from pipeline.checkpoint.rollbacks import Rollback
from pipeline.checkpoint.uploads import Outbox
from pipeline.errors import CheckpointError
from tests.checkpoint.power import Disk, PowerCut, lose, no_waiting
from tests.checkpoint.small_checkpoint import found_step, save

__all__ = ["no_waiting"]  # a fixture

DECISION = Rollback(attempt=2, first=25, last=40)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Saved after 10, 20, 30 and 40 steps; the last two by the second attempt."""
    for step in (10, 20, 30, 40):
        save(tmp_path / "near", step, attempt=1 + (step > 20), metrics={"loss": 50.0 - step})
    return tmp_path / "near"


def listed(root: Path) -> list[int]:
    return [each.step for each in format.list_checkpoints(root)]


def test_what_was_given_up_is_neither_found_nor_listed(root: Path) -> None:
    assert found_step(root) == 40
    rollbacks.add(root, DECISION, newest_attempt=2)
    assert rollbacks.read(root) == [DECISION]
    assert (found_step(root), listed(root)) == (20, [10, 20])
    assert [path.name[-2:] for path in format.given_up(root)] == ["30", "40"]
    save(root, 30, attempt=3)  # the new line
    assert (found_step(root), listed(root)) == (30, [10, 20, 30])


def test_damage_does_not_bring_them_back(root: Path) -> None:
    rollbacks.add(root, DECISION, newest_attempt=2)
    for step in (10, 20):
        (root / format.checkpoint_name(step) / "rank-00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        format.find(root)
    shutil.rmtree(root / format.checkpoint_name(10))
    shutil.rmtree(root / format.checkpoint_name(20))
    assert format.find(root) is None


def test_a_second_decision_adds_to_the_first(root: Path) -> None:
    rollbacks.add(root, DECISION, newest_attempt=2)
    save(root, 30, attempt=3)
    save(root, 60, attempt=3)
    rollbacks.add(root, Rollback(3, 50, 55), newest_attempt=3)
    assert len(rollbacks.read(root)) == 2 and listed(root) == [10, 20, 30]
    rollbacks.add(root, Rollback(4, 15, 55), newest_attempt=4)
    assert listed(root) == [10]


def test_an_attempt_that_was_superseded_decides_nothing(root: Path) -> None:
    with pytest.raises(CheckpointError, match="superseded by attempt 3"):
        rollbacks.add(root, DECISION, newest_attempt=3)
    assert found_step(root) == 40 and rollbacks.read(root) == []


def test_a_file_that_cannot_be_read_is_no_licence(root: Path) -> None:
    (root / rollbacks.FILE).write_text("[[2, 25")
    with pytest.raises(CheckpointError, match=r"cannot be read.*from the journal"):
        format.find(root)


def test_the_best_is_one_of_the_line_that_counts_and_the_others_are_deleted(root: Path) -> None:
    rules = Retention(keep=1, keep_best=1, best="loss", mode="min")
    assert rules.best_ones(
        {each.step: each.manifest.metrics for each in format.list_checkpoints(root) if each.manifest}
    ) == [40]
    rollbacks.add(root, DECISION, newest_attempt=2)
    save(root, 50, attempt=3, metrics={"loss": 45.0})
    removed = Keeper(root, rules).prune()
    assert sorted(path.name[-2:] for path in removed) == ["10", "30", "40"] and listed(root) == [20, 50]
    assert sorted(name[-2:] for name in os.listdir(root) if name.startswith("checkpoint")) == ["20", "50"]


def test_one_to_go_back_to_stays_however_often_is_saved(tmp_path: Path) -> None:
    """Whenever a trouble is found that began up to `behind` steps ago, one from before it is there; few stay."""
    rules, good, most = Retention(keep=2, behind=14), set[int](), 0
    for step in range(3, 200, 3):
        good = rules.kept({each: {} for each in {*good, step}})
        most = max(most, len(good))
        assert step < 20 or min(good) <= step - 14
    assert most == 4 and Retention(keep=2, behind=14).kept({step: {} for step in (100, 200, 300)}) == {200, 300}
    assert Retention(keep=1, behind=14).kept({step: {} for step in (100, 200, 300)}) == {200, 300}


def test_the_second_home_forgets_them_too(root: Path, tmp_path: Path) -> None:
    home = Remote(f"file://{tmp_path}/far", "run")
    list(Outbox(root, home, Retention(keep=9)).send())
    assert home.steps() == [10, 20, 30, 40]
    rollbacks.add(root, DECISION, newest_attempt=2)
    for step in (20, 30, 40):
        shutil.rmtree(root / format.checkpoint_name(step))  # only the store has them now
    found = format.find(root, home=home)
    assert found is not None and found.step == 20 and "fetched" in found.notes[0]
    save(root, 27, attempt=3)
    outbox = Outbox(root, home, Retention(keep=1))
    assert [sent.step for sent in outbox.send()] == [27]
    assert home.steps() == [27]


def test_a_power_cut_leaves_the_decision_or_none(root: Path, tmp_path: Path, no_waiting: None) -> None:
    last, done, seen = 0, False, []
    while not done:
        last += 1
        crashed = tmp_path / "crashed"
        shutil.copytree(root, crashed)
        with pytest.MonkeyPatch.context() as patch:
            cut = Disk(last)
            cut.install(patch)
            try:
                rollbacks.add(crashed, DECISION, newest_attempt=2)
                done = True
            except PowerCut:
                pass
        for loss in [[]] if done else cut.losses():
            after = tmp_path / "after"
            shutil.copytree(crashed, after)
            lose(loss, crashed, after)
            seen.append((bool(rollbacks.read(after)), found_step(after)))
            rollbacks.add(after, Rollback(3, 15, 40), newest_attempt=3)
            assert found_step(after) == 10
            shutil.rmtree(after)
        shutil.rmtree(crashed)
    assert {*seen} == {(False, 40), (True, 20)} and seen[-1] == (True, 20)
