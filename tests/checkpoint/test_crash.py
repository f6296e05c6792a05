"""A save, a replacing save and retention, killed or cut from power after every single operation on the disk.

Whatever of the un-synced changes is lost then: the previous checkpoint loads or the new one, never neither, never a
mixture; and the next attempt saves as if nothing had been.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import format
from pipeline.checkpoint.format import checkpoint_name
from pipeline.checkpoint.retention import Keeper, Retention
from pipeline.session import World
from tests import gloo, small_run
from tests.checkpoint.power import Disk, PowerCut, lose, no_waiting
from tests.checkpoint.small_checkpoint import found_step, save

__all__ = ["no_waiting"]  # a fixture

Loaded = tuple[int, int] | None  # (step, attempt)


def loads(root: Path) -> Loaded:
    found = format.find(root)
    return None if found is None else (found.step, found.manifest.attempt)


def sweep(
    tmp_path: Path,
    prepare: Callable[[Path], object],
    action: Callable[[Path], object],
    allowed: set[Loaded],
    stays: tuple[int, ...] = (),
) -> dict[Loaded, int]:
    """Cuts `action` after every operation, and in the middle of every write, with every loss. Counts what loaded.

    What loads must be in `allowed`, and the checkpoints of the steps `stays` must be whole however it ended.
    """
    seen: dict[Loaded, int] = {}
    pristine, crashed, root = tmp_path / "pristine", tmp_path / "crashed", tmp_path / "root"
    pristine.mkdir()
    prepare(pristine)
    for half in (False, True):
        last, done = 0, False
        while not done:
            last += 1
            shutil.copytree(pristine, crashed)
            cut = Disk(last, half)
            with pytest.MonkeyPatch.context() as patch:
                cut.install(patch)
                try:
                    action(crashed)
                    done = True
                except PowerCut:
                    pass
            for loss in cut.losses() if not half or cut.halved or done else ():
                shutil.copytree(crashed, root)
                lose([] if done else loss, crashed, root)
                told = f"cut {'in' if half else 'after'} operation {last}, lost {loss}"
                loaded = loads(root)
                assert loaded in allowed, f"{told}: {loaded} loads"
                damage = [damage for listed in format.list_checkpoints(root) for damage in format.verify(listed.path)]
                assert damage == [], f"{told}: a checkpoint with holes {damage}"
                whole = {listed.step for listed in format.list_checkpoints(root)}
                assert whole >= {*stays}, f"{told}: of {stays} only {whole} are there"
                seen[loaded] = seen.get(loaded, 0) + 1
                save(root, 90, attempt=5)
                assert found_step(root) == 90
                assert [path.name for path in root.iterdir() if not path.name.startswith("checkpoint-")] == [], told
                shutil.rmtree(root)
            shutil.rmtree(crashed)
    return seen


def test_the_first_save(tmp_path: Path, no_waiting: None) -> None:
    seen = sweep(tmp_path, lambda root: None, lambda root: save(root, 10), {None, (10, 1)})
    assert set(seen) == {None, (10, 1)}


def test_a_save_leaves_the_previous_or_the_new(tmp_path: Path, no_waiting: None) -> None:
    seen = sweep(tmp_path, lambda root: save(root, 10), lambda root: save(root, 20), {(10, 1), (20, 1)}, stays=(10,))
    assert set(seen) == {(10, 1), (20, 1)} and sum(seen.values()) > 100


def test_a_replacing_save(tmp_path: Path, no_waiting: None) -> None:
    seen = sweep(tmp_path, lambda root: save(root, 10), lambda root: save(root, 10, attempt=2), {(10, 1), (10, 2)})
    assert set(seen) == {(10, 1), (10, 2)}


def test_a_save_over_what_killed_ones_have_left(tmp_path: Path, no_waiting: None) -> None:
    """A checkpoint that was set aside is the newest good one; beside it a half-deleted one and a half-written one."""

    def prepare(root: Path) -> None:
        save(root, 10).rename(root / ".replaced-checkpoint-00000010")
        save(root, 5).rename(root / ".deleting-checkpoint-00000005")
        save(root, 6).rename(root / ".staging-00000020-a1")

    seen = sweep(tmp_path, prepare, lambda root: save(root, 20, attempt=2), {(10, 1), (20, 2)}, stays=(10,))
    assert set(seen) == {(10, 1), (20, 2)}


def test_retention_keeps_the_newest_the_best_and_every_mth(tmp_path: Path, no_waiting: None) -> None:
    def prepare(root: Path) -> None:
        for step in (10, 20, 30, 40, 50):
            save(root, step, metrics={"loss": abs(20 - step)})

    rules = Retention(keep=1, keep_every=40, keep_best=1, best="loss", mode="min")
    seen = sweep(tmp_path, prepare, lambda root: Keeper(root, rules).prune(), {(50, 1)}, stays=(20, 40, 50))
    assert sum(seen.values()) > 30


def test_a_save_and_the_retention_that_follows(tmp_path: Path, no_waiting: None) -> None:
    def action(root: Path) -> None:
        save(root, 20)
        Keeper(root, Retention(keep=1)).prune()

    seen = sweep(tmp_path, lambda root: save(root, 10), action, {(10, 1), (20, 1)})
    assert seen[20, 1] > 10


# --- the real saver, whose thread writes, commits and deletes ---


def saver_cut_everywhere(world: World, work: Path) -> dict[str, Any]:
    """Saves step 2 and deletes step 1, cut after every operation of the thread; what loads, and whether it is whole."""
    from pipeline.checkpoint import shards
    from pipeline.checkpoint.saver import Saver

    settings = small_run.config("words", 1)
    engine = small_run.start(world, settings, "words")
    facts: dict[str, Any] = {"data": small_run.DATA, "buffers": small_run.buffers(True)}
    states, seen, last, done = {}, [], 0, False
    for step in (1, 2):
        small_run.curve(engine, world, settings, "words", step - 1, step)
        states[step] = small_run.state(engine)
        if step == 1:
            small_run.save(world, settings, engine, work / "pristine", 1)
    while not done:
        last += 1
        root = work / f"root-{last}"
        shutil.copytree(work / "pristine", root)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.fsync", lambda descriptor: None)
            cut = Disk(last)
            cut.install(patch)
            saver = Saver(engine, world, root, settings, attempt=1, prune=Keeper(root, Retention(keep=1)).prune)
            try:
                saver.begin(2, **facts)
                ended = saver.finish()
                done = ended is not None and ended.path is not None
            except PowerCut:
                pass
            saver.close()
        for number, loss in enumerate([[]] if done else [[], cut.changes]):
            copy = work / f"copy-{last}-{number}"
            shutil.copytree(root, copy)
            lose(loss, root, copy)
            found = format.find(copy)
            whole = [format.verify(listed.path) for listed in format.list_checkpoints(copy)]
            seen.append((last, found.step if found else None, whole))
            shutil.rmtree(copy)
        if not done:
            shutil.rmtree(root)
    found = format.find(root)
    assert found is not None
    shards.restore(engine, small_run.buffers(False), found.manifest, found.path)
    said = {
        "seen": seen,
        "same": small_run.same(small_run.state(engine), states[2]),
        "left": sorted(p.name for p in root.iterdir()),
    }
    engine.close()
    return said


def test_the_saver_s_thread_cut_at_every_operation(tmp_path: Path) -> None:
    [said] = gloo.run(saver_cut_everywhere, 1, tmp_path)
    assert {step for _, step, _ in said["seen"]} == {1, 2}
    assert all(damage == [] for _, _, whole in said["seen"] for damage in whole)
    assert len({last for last, _, _ in said["seen"]}) > 20  # operations, of which the retention's are the last
    assert said["same"] and said["left"] == [checkpoint_name(2)]


def test_real_kills_while_saving(tmp_path: Path) -> None:
    """The same with nothing simulated: a process that saves without pause is killed at many moments."""
    code = (
        "import sys; from pathlib import Path\n"
        "from pipeline.checkpoint import format; from tests.checkpoint.small_checkpoint import save\n"
        "from pipeline.checkpoint.retention import Keeper, Retention\n"
        "root = Path(sys.argv[1]); keeper = Keeper(root, Retention(keep=2))\n"
        "found = format.find(root); step = found.step if found else 0\n"
        "assert not (found and found.bad)\n"
        "while True: step += 1; save(root, step, size=60_000); print(step, flush=True); keeper.prune()\n"
    )
    rng, newest = random.Random(0), 0
    for _ in range(6):
        command = [sys.executable, "-c", code, str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        assert process.stdout is not None
        for _ in range(rng.randrange(1, 20)):
            newest = int(process.stdout.readline())
        process.kill()
        rest = process.stdout.read().split()
        process.stdout.close()
        process.wait()
        newest = int(rest[-1]) if rest else newest
        found = format.find(tmp_path)
        assert found is not None and found.bad == [] and found.step in (newest, newest + 1)
        newest = found.step
