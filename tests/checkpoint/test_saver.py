"""Saving behind the training: what is saved is the state at `begin`, and a save that fails costs only itself."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.format import list_checkpoints
from pipeline.config import Config
from pipeline.engine import Engine
from pipeline.session import World
from tests import gloo, small_run

ATTEMPT = 1


def scenes(world: World, root: Path) -> dict[str, Any]:
    """What every rank saw, in one start of the processes."""
    from pipeline.checkpoint.saver import Saver

    said: dict[str, Any] = {}
    settings = small_run.config("words", 2)
    engine = small_run.start(world, settings, "words")
    facts: dict[str, Any] = {"data": small_run.DATA, "buffers": small_run.buffers(True)}
    gate, spoil = threading.Event(), [False]

    def before() -> None:
        gate.wait()
        if spoil[0] and world.rank == 1:  # another file of that name: the disk refuses it, on this rank only
            next(root.glob(".staging-*")).joinpath("rank-00001.safetensors").mkdir()

    saver = Saver(engine, world, root, settings, attempt=ATTEMPT, before=before)
    small_run.curve(engine, world, settings, "words", 0, 2)
    at_2 = small_run.state(engine)
    assert saver.begin(2, **facts) is None
    saver.hold()
    small_run.curve(engine, world, settings, "words", 2, 4)
    said["in flight"] = (saver.ready, [each.step for each in list_checkpoints(root)])
    gate.set()
    ended = saver.finish()
    assert ended is not None
    said["first"] = (ended.step, ended.path, ended.failure, 0 < ended.blocked_seconds <= ended.seconds, ended.bytes)

    spoil[0] = True
    saver.begin(4, **facts)
    said["spoilt"] = saver.finish()
    spoil[0] = False
    world.barrier()  # rank 0 clears up
    said["after"] = ([each.step for each in list_checkpoints(root)], sorted(path.name for path in root.iterdir()))
    at_4 = small_run.state(engine)
    saver.begin(5, **facts)
    while True:  # as the loop does, until every rank is ready
        if world.gather([saver.ready]).all() and (ended := saver.advance()):
            break
    said["second"] = ended
    said["idle"] = (saver.ready, saver.finish())
    saver.close()

    said |= refusals(engine, world, root, settings, facts)
    engine.close()

    for step, state in ((2, at_2), (5, at_4)):
        if step == 2 and world.rank == 0:
            os.rename(root / "checkpoint-00000005", root.parent / "aside")
        world.barrier()
        engine = small_run.start(world, settings, "words")
        restored = small_run.load(world, settings, engine, root)
        said[f"same {step}"] = restored is not None and small_run.same(small_run.state(engine), state)
        engine.close()
        world.barrier()
        if step == 2 and world.rank == 0:
            os.rename(root.parent / "aside", root / "checkpoint-00000005")
    return said


def refusals(engine: Engine, world: World, root: Path, settings: Config, facts: dict[str, Any]) -> dict[str, Any]:
    """What a save says that a newer attempt has overtaken, and one that has no folder to go to."""
    from pipeline.checkpoint.saver import Saver

    said: dict[str, Any] = {}
    late = Saver(engine, world, root, settings, attempt=ATTEMPT, newest_attempt=lambda: ATTEMPT + 1)
    late.begin(6, **facts)
    said["superseded"] = late.finish()
    late.close()
    (root.parent / "file").touch()
    nowhere = Saver(engine, world, root.parent / "file" / "below", settings, attempt=ATTEMPT)
    said["nowhere"] = nowhere.begin(6, **facts)
    nowhere.close()
    return said


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return gloo.run(scenes, 2, tmp_path_factory.mktemp("saver") / "checkpoints")


def test_the_state_at_begin_is_saved_while_training_goes_on(said: list[dict[str, Any]]) -> None:
    for rank in said:
        assert rank["in flight"] == (False, [])
        step, path, failure, waited, size = rank["first"]
        assert (step, path.name, failure, waited) == (2, "checkpoint-00000002", None, True)
        assert size > 0
        assert rank["same 2"]
        assert rank["same 5"]


def test_a_save_that_fails_is_told_on_all_ranks_and_costs_only_itself(said: list[dict[str, Any]]) -> None:
    for rank in said:
        assert rank["spoilt"].path is None
        assert "rank 1" in rank["spoilt"].failure
        assert "rank-00001.safetensors" in rank["spoilt"].failure
        assert rank["after"] == ([2], ["checkpoint-00000002"])
        assert (rank["second"].step, rank["second"].failure) == (5, None)
        assert rank["idle"] == (False, None)


def test_what_cannot_be_committed_is_told(said: list[dict[str, Any]]) -> None:
    for rank in said:
        assert "superseded by attempt 2" in rank["superseded"].failure
        assert rank["superseded"].path is None
        assert rank["nowhere"].path is None
        assert "checkpoint not written" in rank["nowhere"].failure
