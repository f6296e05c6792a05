"""Which checkpoints stay and which are deleted: the newest, every so many steps, the best; never the only good one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline import config as configs
from pipeline.checkpoint import format
from pipeline.checkpoint.format import checkpoint_name
from pipeline.checkpoint.retention import Keeper, Retention
from tests.checkpoint.small_checkpoint import found_step, save
from tests.small_project import problems, project

__all__ = ["project"]  # a fixture, for the rules of the configuration

SCORES = {10: 0.5, 20: 0.9, 30: float("nan"), 40: 0.7, 50: 0.9, 60: 0.1}


def spoil(path: Path) -> None:
    """Zeros in place of a file's content; its size is right."""
    file = path / "rank-00000.safetensors"
    file.write_bytes(bytes(file.stat().st_size))


def steps(root: Path) -> list[int]:
    return [int(name.rpartition("-")[2]) for name in sorted(os.listdir(root))]


# --- the rules, without a disk ---


def test_newest_every_and_best_stay_together() -> None:
    good = {step: {"eval/test/accuracy": score} for step, score in SCORES.items()}
    rules = Retention(keep=1, keep_every=30, keep_best=1, best="eval/test/accuracy", mode="max")
    assert rules.kept(good) == {60, 30, 20}  # of two that are equally good, the earlier
    assert Retention(keep=2, keep_best=2, best="eval/test/accuracy", mode="min").kept(good) == {50, 60, 10}
    assert Retention(keep=2, keep_best=9, best="eval/test/loss").kept(good) == {50, 60}  # nobody has measured that
    assert Retention(keep=0).kept(good) == {60} and Retention().kept({}) == set()


# --- in a folder ---


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_prune_deletes_what_no_rule_keeps_and_then_nothing(root: Path) -> None:
    for step in range(10, 100, 10):
        save(root, step)
    keeper = Keeper(root, Retention(keep=2, keep_every=40), lambda: {30})
    doomed = [each.step for each in keeper.doomed()]
    removed = keeper.prune()
    assert steps(root) == [30, 40, 80, 90]
    assert [path.name for path in removed] == [checkpoint_name(step) for step in (10, 20, 50, 60, 70)]
    assert doomed == [10, 20, 50, 60, 70]
    assert keeper.prune() == []


def test_the_only_good_one_stays(root: Path) -> None:
    good = save(root, 10)
    for step in (20, 30):
        spoil(save(root, step))
    keeper = Keeper(root, Retention(keep=0))
    assert keeper.prune() == [] and found_step(root) == 10
    save(root, 40)
    assert len(keeper.prune()) == 3 and not good.exists() and found_step(root) == 40


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_damaged_ones_take_nobody_s_place(root: Path, keep: int) -> None:
    for step in (10, 20, 30, 40, 50):
        save(root, step)
    spoil(root / checkpoint_name(40))
    (root / checkpoint_name(20) / "rank-00001.safetensors").unlink()
    Keeper(root, Retention(keep=keep)).prune()
    good = [step for step in steps(root) if not format.verify(root / checkpoint_name(step))]
    assert good == [10, 30, 50][-keep:]


def test_a_damaged_best_one_gives_way_to_the_next_best(root: Path) -> None:
    for step in (10, 20, 30, 40):
        save(root, step)  # the larger the step, the larger its train/loss
    rules = Retention(keep=1, keep_best=1, best="train/loss", mode="min")
    spoil(root / checkpoint_name(10))
    Keeper(root, rules).prune()
    assert steps(root) == [20, 40]


def test_each_is_read_back_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    verify = format.verify
    monkeypatch.setattr(format, "verify", lambda path: read.append(path.name) or verify(path))
    keeper = Keeper(root, Retention(keep=2))
    for step in (10, 20, 30, 40):
        save(root, step)
        keeper.prune()
    assert read == [checkpoint_name(step) for step in (10, 20, 30, 40)]
    save(root, 40, attempt=2)  # another content under the same name
    keeper.prune()
    assert read[4:] == [checkpoint_name(40)]


# --- what the configuration may ask for ---


def test_rules_follow_from_the_configuration() -> None:
    changes = ["checkpoint.keep=3", "checkpoint.keep_best=2", "checkpoint.every=10", "evaluate.every=20"]
    config = configs.load("good.yaml", [*changes, "evaluate.best=test/loss", "evaluate.mode=min"])
    assert Retention.of(config) == Retention(3, None, 2, "eval/test/loss", "min", behind=3 + 10)
    assert Retention.of(configs.load("good.yaml", ["guard.rollbacks=0"])).behind == 0


@pytest.mark.parametrize(
    ("changes", "message", "mend"),
    [
        (["evaluate.every=10"], "evaluate.best is empty", "such as test/accuracy"),
        (["evaluate.best=test/loss"], "only the last step is evaluated", "set evaluate.every to 60"),
        (["evaluate.best=test/loss", "evaluate.every=40"], "no checkpoint before the last", "set evaluate.every to 60"),
    ],
)
def test_best_without_a_choice_is_refused(changes: list[str], message: str, mend: str) -> None:
    [problem] = problems("checkpoint.keep_best=1", "checkpoint.every=60", *changes)
    assert problem.place.endswith("checkpoint.keep_best")
    assert message in problem.message
    assert mend in (problem.suggestion or "")


def test_best_of_a_set_that_is_not_there_is_refused() -> None:
    [problem] = problems("checkpoint.keep_best=1", "evaluate.best=tset/loss", "evaluate.every=100")
    assert problem.place.endswith("evaluate.best")


@pytest.mark.parametrize(
    ("url", "message", "mend"),
    [
        ("backup/here", "is not a URL", "file:///"),
        ("s4://bucket", "no kind of store", "s3"),
        ("lakefs://bucket/folder", "needs lakefs_spec", "pip install lakefs_spec"),
    ],
)
def test_a_second_home_that_cannot_be_is_refused(url: str, message: str, mend: str) -> None:
    [problem] = problems(f"checkpoint.url={url}")
    assert problem.place.endswith("checkpoint.url")
    assert message in problem.message
    assert mend in (problem.suggestion or "")
    assert configs.load("good.yaml", ["checkpoint.url=s3://bucket/folder"]).checkpoint.url == "s3://bucket/folder"
