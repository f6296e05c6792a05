"""When a disk refuses: told, training goes on, and the state is saved at the end all the same, or the end is an error.

The engine, the saver and the disk are real; of what is trained, and of its data, only what a save asks for is here.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.checkpoint.format import list_checkpoints
from pipeline.errors import CheckpointError
from pipeline.guard import Judge
from pipeline.saving import Saving
from pipeline.sections import Checkpoint
from pipeline.session import Session, World
from tests import gloo, small_run


def scenes(world: World, run: Path) -> dict[str, Any]:
    """A folder that cannot be written to at step 4, at the stop right after it, and no more at another stop."""
    settings = small_run.config("words", 1, checkpoint=Checkpoint(every=2))
    engine = small_run.start(world, settings, "words")
    small_run.curve(engine, world, settings, "words", 0, 4)
    learner = SimpleNamespace(engine=engine, running=SimpleNamespace(values={}), scores={}, scored_step=None)
    records: list[dict[str, Any]] = []
    session = Session(world, run, 1, lambda rank, new, beat: records.extend(new) or False)
    data = SimpleNamespace(state=small_run.DATA)
    judge = Judge(settings.guard)
    saving = Saving(settings, session, cast(Any, learner), cast(Any, data), judge, None)
    folder = run / "checkpoints"
    refused: list[str] = []
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.touch()  # a file where the folder should be
        saving.begin(4)
        saving.hold()
        with pytest.raises(CheckpointError) as error:
            saving.finish(4)
        refused.append(str(error.value))
        folder.unlink()
        saving.finish(4)
    finally:
        session.close()
    kinds = [record["kind"] for record in records]
    return {"refused": refused, "kinds": kinds, "steps": [each.step for each in list_checkpoints(folder)]}


def test_a_stop_right_after_a_save_that_failed_saves_again(tmp_path: Path) -> None:
    [said] = gloo.run(scenes, 1, tmp_path / "run")
    assert said["kinds"] == ["save_failed", "save"]
    assert "checkpoint not written" in said["refused"][0]
    assert said["steps"] == [4]
