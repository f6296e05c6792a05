"""A save, a replacing save and retention, killed or cut from power at every single operation on the disk."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.checkpoint import disk, format
from pipeline.checkpoint.retention import Keeper, Retention
from tests.checkpoint.small_checkpoint import found_step, save

OPERATIONS = ("make_folder", "_create", "_append", "sync", "rename", "_remove", "_remove_folder")


class PowerCut(BaseException):
    """Ends the process, as far as the code under test can tell: no handler for errors may see it."""


class Disk:
    """Runs the real operations, stops at the `last`-th of them, and knows what had not reached the disk by then.

    `moment`: "before" or "after" the operation, or "half": half of a write. Afterwards no operation works any more.
    """

    def __init__(self, last: int, moment: str) -> None:
        self.last, self.moment, self.count = last, moment, 0
        self.contents: set[Path] = set()  # files whose content is not yet synced
        self.names: set[Path] = set()  # files whose name is not yet synced, in their folder
        self.moves: list[tuple[Path, Path]] = []  # folders whose new name is not yet synced

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in OPERATIONS:
            patch.setattr(disk, name, self._cut(name, getattr(disk, name)))

    def _cut(self, name: str, operation: Callable) -> Callable:
        def run(*arguments):
            self.count += 1
            if self.count > self.last or (self.count == self.last and self.moment == "before"):
                raise PowerCut
            if self.count == self.last and self.moment == "half" and name == "_append":
                operation(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                arguments[0].flush()
                raise PowerCut
            result = operation(*arguments)
            self._remember(name, arguments)
            if self.count == self.last:
                if name == "_append":
                    arguments[0].flush()
                if name == "_create":
                    result.close()
                raise PowerCut
            return result

        return run

    def _remember(self, name: str, arguments: tuple) -> None:
        if name == "_create":
            self.contents.add(arguments[0])
            self.names.add(arguments[0])
        elif name == "sync" and arguments[0].is_dir():
            self.names = {path for path in self.names if path.parent != arguments[0]}
            self.moves = [move for move in self.moves if move[0].parent != arguments[0]]
        elif name == "sync":
            self.contents.discard(arguments[0])
        elif name == "rename":
            source, target = arguments
            self.moves.append((source, target))
            self.contents = {target / path.name if path.parent == source else path for path in self.contents}
            self.names = {target / path.name if path.parent == source else path for path in self.names}

    def lose(self, what: str) -> None:
        """What a power cut may do to that which was not synced; a file system may keep any of it and lose the rest."""
        if what == "contents":
            for path in filter(Path.exists, self.contents):
                path.write_bytes(b"")
        elif what == "names":
            for path in filter(Path.exists, self.names):
                path.unlink()
        elif what == "moves":
            for source, target in reversed(self.moves):
                if target.exists() and not source.exists():
                    target.rename(source)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Disk` knows what would have been synced; to wait for a real disk thousands of times adds nothing but minutes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def sweep(
    tmp_path: Path, prepare: Callable[[Path], object], action: Callable[[Path], object], allowed: set[tuple[int, int]]
) -> dict[tuple[int, int], int]:
    """Cuts `action` at every operation; whatever loads must be in `allowed` as (step, attempt). Counts what loaded."""
    seen: dict[tuple[int, int], int] = {}
    pristine = tmp_path / "pristine"
    prepare(pristine)
    for moment in ("before", "half", "after"):
        for lost in ("nothing", "contents", "names", "moves"):
            last = 0
            while True:
                last += 1
                root = tmp_path / "root"
                shutil.rmtree(root, ignore_errors=True)
                shutil.copytree(pristine, root)
                cut = Disk(last, moment)
                with pytest.MonkeyPatch.context() as patch:
                    cut.install(patch)
                    try:
                        action(root)
                        done = True
                    except PowerCut:
                        done = False
                if not done:
                    cut.lose(lost)
                found = format.find(root)
                assert found is not None, f"cut {moment} operation {last}: nothing loads"
                loaded = (found.step, found.manifest.attempt)
                assert loaded in allowed, f"cut {moment} operation {last}: {loaded} loads"
                damage = [damage for listed in format.list_checkpoints(root) for damage in format.verify(listed.path)]
                assert damage == [], f"cut {moment} operation {last}: a checkpoint with holes {damage}"
                seen[loaded] = seen.get(loaded, 0) + 1
                if done:
                    break
                save(root, 90, attempt=5)  # and the next attempt saves as if nothing had been
                assert found_step(root) == 90
                assert all(name.startswith("checkpoint-") for name in os.listdir(root)), os.listdir(root)
    return seen


def test_save_cut_at_every_operation_leaves_the_previous_or_the_new(tmp_path: Path, no_waiting: None) -> None:
    seen = sweep(tmp_path, lambda root: save(root, 10), lambda root: save(root, 20), {(10, 1), (20, 1)})
    assert set(seen) == {(10, 1), (20, 1)} and sum(seen.values()) > 60


def test_replacing_save_cut_at_every_operation(tmp_path: Path, no_waiting: None) -> None:
    seen = sweep(tmp_path, lambda root: save(root, 10), lambda root: save(root, 10, attempt=2), {(10, 1), (10, 2)})
    assert set(seen) == {(10, 1), (10, 2)}


def test_retention_cut_at_every_operation_keeps_the_newest(tmp_path: Path, no_waiting: None) -> None:
    def prepare(root: Path) -> None:
        for step in (10, 20, 30):
            save(root, step)

    assert set(sweep(tmp_path, prepare, lambda root: Keeper(root, Retention(keep=1)).prune(), {(30, 1)})) == {(30, 1)}


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
