"""A run with a second home, from its start to its going on elsewhere: what is sent, fetched, refused and said."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configs
from pipeline.checkpoint.remote import Remote
from pipeline.cluster import driver
from pipeline.errors import CheckpointError
from pipeline.session import World
from pipeline.track import journal
from tests import gloo, small_data
from tests.checkpoint.object_store import BUCKET, ObjectStore
from tests.small_session import records_of

TASK = {"name": "tests.poisoned_task"}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    pictures = small_data.images(tmp_path / "pictures")
    data = {"train": str(pictures), "evaluate": {"test": str(pictures)}}
    checkpoint = {"every": 2, "url": f"file://{tmp_path}/far"}
    guard = {"rollbacks": 0}  # so that none stays to go back to
    return small_data.config(
        tmp_path / "toy.yaml", TASK, pictures, data=data, steps=6, checkpoint=checkpoint, guard=guard
    )


def train(toy: Path, *changes: str, fresh: bool = False) -> int:
    return driver.run(configs.load(toy, ["cluster.workers=0", *changes]), fresh=fresh)


def records(toy: Path, kind: str, run: str = "toy") -> list[dict[str, Any]]:
    path = toy.parent / "runs" / run / "journal.jsonl"
    return [record for record in journal.read(path).records if record["kind"] == kind]


def checkpoints(toy: Path, run: str = "toy") -> list[int]:
    return [int(name[-8:]) for name in sorted(os.listdir(toy.parent / "runs" / run / "checkpoints"))]


def test_a_run_goes_on_from_its_second_home(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    far = Remote(f"file://{toy.parent}/far", "toy")
    assert train(toy) == driver.DONE
    assert far.steps() == checkpoints(toy) == [4, 6] and records(toy, "upload")[-1]["step"] == 6
    assert f"step      6  sent to {far.url}, " in capsys.readouterr().out

    shutil.rmtree(toy.parent / "runs" / "toy" / "checkpoints")
    assert train(toy, "steps=8") == driver.DONE
    assert f"going on from step 6; fetched from {far.url}" in capsys.readouterr().out
    assert far.steps() == checkpoints(toy) == [6, 8]

    shutil.rmtree(toy.parent / "runs")  # a machine that has seen nothing of it; and whoever wants to start anew
    assert train(toy, "steps=8", fresh=True) == driver.DONE
    assert "training from step 0" in capsys.readouterr().out and checkpoints(toy, "toy-2") == [6, 8]
    shutil.rmtree(toy.parent / "runs")
    assert train(toy, "steps=10") == driver.DONE  # the newest of them, as where its folders are
    assert f"going on from step 8; fetched from {far.url}-2" in capsys.readouterr().out

    for folder in ("runs/toy-2/checkpoints", "far/toy-2"):
        shutil.rmtree(toy.parent / folder)
    with pytest.raises(CheckpointError, match=r"is empty and .*/far/toy-2 too, but step 10 was saved there"):
        train(toy, "steps=12")


def test_a_store_that_refuses_costs_no_step_and_what_waits_is_named(
    toy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectStore()
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    changes = [f"checkpoint.url=s3://{BUCKET}/x", "checkpoint.upload_wait_seconds=1", "checkpoint.keep=1"]
    store.start()
    try:
        store.refuse(True)
        with pytest.raises(CheckpointError, match=r"access refused(.|\n)*not in .*/runs\. (.|\n)*checkpoint\.url=null"):
            train(toy, *changes)
        store.refuse(False)
        assert train(toy, *changes) == driver.DONE
        store.refuse(True)
        capsys.readouterr()
        assert train(toy, *changes, "steps=10") == driver.DONE
        said = capsys.readouterr().out
        assert "access refused" in said and said.count("not sent: ") == 1 and "Training goes on." in said
        assert "checkpoint of step 10 not at s3://shelf/x/toy yet (last failure: " in said
        assert f"Send with: millstream checkpoint upload {toy.parent}/runs/toy" in said
        store.refuse(False)
        assert Remote(f"s3://{BUCKET}/x", "toy").steps() == [6]
        assert train(toy, *changes, "steps=12") == driver.DONE
        assert Remote(f"s3://{BUCKET}/x", "toy").steps() == [12]
    finally:
        store.kill()


def on_two(world: World, toy: Path) -> dict[str, Any]:
    """Two ranks train, lose their folder, and go on; what each has recorded the second time."""
    run = toy.parent / "runs" / "toy"
    records_of(world, configs.load(toy, ["steps=4"]), run)
    if world.rank == 0:
        shutil.rmtree(run / "checkpoints")
    world.barrier()
    records = records_of(world, configs.load(toy, ["steps=6"]), run)
    return {record["kind"]: record for record in records}


def test_all_ranks_go_on_from_what_was_fetched(toy: Path) -> None:
    first, second = gloo.run(on_two, 2, toy)
    assert first["restore"]["step"] == 4
    assert first["restore"]["notes"][0] == f"fetched from file://{toy.parent}/far/toy"
    assert (first["upload"]["step"], first["end"]["step"]) == (6, 6)
    assert not {"upload", "save", "restore"} & second.keys()  # only rank 0 speaks of them


def test_the_best_ones_stay(toy: Path) -> None:
    best = ["evaluate.best=test/loss", "evaluate.mode=max", "evaluate.every=2"]
    assert train(toy, "checkpoint.keep=1", "checkpoint.keep_best=1", "steps=10", *best) == driver.DONE
    values = {record["step"]: record["metrics"]["eval/test/loss"] for record in records(toy, "evaluation")}
    assert checkpoints(toy) == sorted({10, max(values, key=lambda step: (values[step], -step))})
    assert Remote(f"file://{toy.parent}/far", "toy").steps() == checkpoints(toy)
