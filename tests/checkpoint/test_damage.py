"""What is wrong with a checkpoint, an engine or a disk is said on all ranks; nothing wrong is saved or loaded.

Two ranks are started once; the tests look at what they answered.
"""

from __future__ import annotations

import dataclasses
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline import checkpoint
from pipeline.checkpoint import format
from pipeline.config import Config
from pipeline.errors import CheckpointError, DataError
from pipeline.session import World
from tests import gloo, small_run

LAYOUTS = [(1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16")]  # those with weights beside the masters


def failure(action: Any) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return "nothing was raised"


def begin(world: World, kind: str, stage: int, dtype: str = "fp32", **changes: Any) -> tuple[Config, Any]:
    settings = small_run.config(kind, stage, dtype, **changes)
    return settings, small_run.start(world, settings, kind)


def ranks_that_fail_or_differ(world: World, root: Path) -> dict[str, Any]:
    """A disk that is full on one rank only, then a weight that one rank alone has changed."""
    said: dict[str, Any] = {}
    settings, engine = begin(world, "words", 0)
    small_run.curve(engine, world, settings, "words", 0, 2)
    small_run.save(world, settings, engine, root, 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if world.rank == 1 else limits[0], limits[1]))
    said["full"] = failure(lambda: small_run.save(world, settings, engine, root, 3))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said["left"] = world.gather_objects(sorted(path.name for path in root.iterdir()))[0]
    small_run.curve(engine, world, settings, "words", 2, 3)  # training goes on
    if world.rank == 1:
        engine.module.up.weight.data[3, 4] += 1e-6
    said["replica"] = failure(lambda: small_run.save(world, settings, engine, root, 3))
    engine.close()
    return said


def tampered_weights(world: World, root: Path) -> dict[str, Any]:
    """Layout -> (parameter changed on rank 0 behind the optimizer's back, answer)."""
    from pipeline.checkpoint import layouts

    said: dict[str, Any] = {}
    for stage, dtype in LAYOUTS:
        settings, engine = begin(world, "words", stage, dtype)
        small_run.curve(engine, world, settings, "words", 0, 1)
        piece = next(piece for piece in layouts.pieces(engine) if layouts.MASTER in piece.state)
        if world.rank == 0:
            piece.weights[0][0] += 1
        answer = failure(lambda: small_run.save(world, settings, engine, root / f"{stage}-{dtype}", 1))  # noqa: B023
        said[f"{dtype} at stage {stage}"] = (piece.name, answer)
        engine.close()
    return said


def damaged_files(world: World, root: Path) -> dict[str, Any]:
    """Fragments missing or twice in the table; a flipped bit, beside an older checkpoint and alone."""
    from pipeline.checkpoint import shards

    said: dict[str, Any] = {}
    settings, engine = begin(world, "words", 1)
    said["empty"] = small_run.load(world, settings, engine, root / "nothing here")
    small_run.curve(engine, world, settings, "words", 0, 1)
    small_run.save(world, settings, engine, root, 1)
    before = small_run.state(engine)
    manifest = format.list_checkpoints(root)[0].manifest
    assert manifest is not None

    def read(places: list[format.FragmentPlace]) -> str:
        changed = dataclasses.replace(manifest, fragments=tuple(places))
        return failure(lambda: shards.restore(engine, small_run.buffers(False), changed, root))

    places = list(manifest.fragments)
    said["missing"] = [read(places[:i] + places[i + 1 :]) for i in range(len(places))]
    said["twice"] = [read([*places, place]) for place in places]
    said["unasked"] = read([*places, places[0]._replace(key="momentum_buffer")])

    small_run.curve(engine, world, settings, "words", 1, 2)
    file = small_run.save(world, settings, engine, root, 2) / "rank-00001.safetensors"
    if world.rank == 0:
        content = bytearray(file.read_bytes())
        content[-17] ^= 4  # in a tensor's data
        file.write_bytes(content)
    restored = small_run.load(world, settings, engine, root)
    assert restored is not None
    said["flipped"] = (restored.step, restored.notes, small_run.same(before, small_run.state(engine)))
    world.barrier()
    if world.rank == 0:
        shutil.rmtree(root / format.checkpoint_name(1))
    world.barrier()
    said["only flipped"] = failure(lambda: small_run.load(world, settings, engine, root))
    engine.close()
    return said


def other_runs(world: World, root: Path) -> dict[str, Any]:
    """A good checkpoint, asked for by runs with other data, buffers, optimizer, model or settings."""
    said: dict[str, Any] = {}
    settings, engine = begin(world, "words", 1)
    small_run.curve(engine, world, settings, "words", 0, 1)
    small_run.save(world, settings, engine, root, 1)

    def refuse(step: int, saved: Any) -> list[str]:
        raise DataError(f"step {step} was trained on {saved['identity']}")

    for name, resume in (("data", refuse), ("buffers", small_run.same_data)):
        facts: dict[str, Any] = {"config": settings, "resume": resume, "buffers": {}}
        said[name] = failure(lambda: checkpoint.restore(engine, world, root, **facts))  # noqa: B023
    engine.close()
    for name, kind, optim in (
        ("optimizer", "words", {"name": "sgd"}),
        ("model", "images", {}),
        ("frozen", "words", {"freeze": ["up.*"]}),
    ):
        settings, engine = begin(world, kind, 1, optim=optim)
        said[name] = failure(lambda: small_run.load(world, settings, engine, root))  # noqa: B023
        engine.close()
    settings, engine = begin(world, "words", 1, optim={"weight_decay": 0.3})
    said["notes"] = getattr(small_run.load(world, settings, engine, root), "notes", [])
    said["decay"] = [group["weight_decay"] for group in engine.param_groups]
    engine.close()
    return said


def on_two(world: World, root: Path) -> dict[str, Any]:
    return {
        "ranks": ranks_that_fail_or_differ(world, root / "ranks"),
        "tampered": tampered_weights(world, root / "tampered"),
        "files": damaged_files(world, root / "files"),
        "others": other_runs(world, root / "others"),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    return gloo.run(on_two, 2, tmp_path_factory.mktemp("runs"))


def test_weights_that_are_not_the_masters_are_not_saved(two):
    assert len(two[0]["tampered"]) == len(LAYOUTS)
    for layout, (name, _) in two[0]["tampered"].items():
        for rank in two:
            assert f"rank 0: the weights of '{name}' are not its rounded masters" in rank["tampered"][layout][1], layout


def test_ranks_that_should_agree_and_do_not_are_named_on_all_ranks(two):
    for rank in two:
        assert "master of 'up.weight' differs between rank 1 and rank 0" in rank["ranks"]["replica"]


def test_a_rank_that_cannot_write_stops_the_save_on_all_ranks_and_leaves_no_trace(two):
    for rank in two:
        assert "rank 1: " in rank["ranks"]["full"] and "File too large" in rank["ranks"]["full"]
        assert rank["ranks"]["left"] == ["checkpoint-00000002"]


def test_a_fragment_that_is_missing_or_there_twice_is_refused(two):
    for rank in two:
        said = rank["files"]
        assert len(said["missing"]) == len(said["twice"]) > 30
        assert all("is missing" in message for message in said["missing"]), said["missing"]
        assert all("is there twice" in message for message in said["twice"]), said["twice"]
        assert "holds momentum_buffer" in said["unasked"]


def test_a_flipped_bit_leads_to_the_older_checkpoint_or_to_a_refusal(two):
    for rank in two:
        step, notes, as_then = rank["files"]["flipped"]
        assert step == 1 and as_then
        assert notes[0].startswith("damaged, passed over: ") and "rank-00001.safetensors" in notes[0]
        assert "no good checkpoint in" in rank["files"]["only flipped"]
        assert rank["files"]["empty"] is None


def test_another_run_s_checkpoint_is_refused_with_the_difference(two):
    for rank in two:
        said = rank["others"]
        assert "checkpoint-00000001 step 1 was trained on d1" in said["data"]
        assert "norm.running_mean is gone" in said["buffers"]
        assert "momentum_buffer of 'embed.weight'" in said["optimizer"]
        assert "conv1.weight is new" in said["model"]
        assert "up.weight was trained and no longer is" in said["frozen"]


def test_changed_settings_are_said_and_hold(two):
    assert "not bitwise: optim.weight_decay 0.1 -> 0.3" in two[0]["others"]["notes"]
    assert sorted(two[0]["others"]["decay"]) == [0.0, 0.3, 0.3]
