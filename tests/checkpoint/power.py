"""A disk that loses power at a chosen operation, and then any part of what had not been synced by then.

The operations are the real ones of pipeline/checkpoint/disk.py, on real files. What a power cut may take is known from
the order of writes and syncs: a file's content, a new name in a folder, a rename, a removal, each until its file or
its folder has been synced.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pipeline.checkpoint import disk

OPERATIONS = ("make_folder", "_create", "_append", "sync", "rename", "_remove", "_remove_folder")


class PowerCut(BaseException):
    """Ends the process, as far as the code under test can tell: no handler for errors may see it."""


@dataclass(frozen=True)
class Change:
    """One change that is not on the disk yet. `path` is where it is now; `before`: what a rename or removal undoes."""

    kind: str  # content, name, folder, move, removal
    path: Path
    before: Path | bytes | None = None

    @property
    def folder(self) -> Path:
        """Whose sync makes it last."""
        return self.path if self.kind == "content" else self.path.parent

    def moved(self, source: Path, target: Path) -> Change:
        """The same after a folder has been renamed."""
        inside = self.path.is_relative_to(source)
        return replace(self, path=target / self.path.relative_to(source)) if inside else self


class Disk:
    """Runs the real operations and stops after the `last`-th, `half`: in the middle of it, when that is a write."""

    def __init__(self, last: int, half: bool = False) -> None:
        self.last, self.half, self.count = last, half, 0
        self.halved = False  # whether the last operation was one that can be cut in the middle
        self.changes: list[Change] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in OPERATIONS:
            patch.setattr(disk, name, self._cut(name, getattr(disk, name)))

    def _cut(self, name: str, operation: Callable) -> Callable:
        def run(*arguments):
            self.count += 1
            if self.count > self.last:
                raise PowerCut
            if self.count == self.last and self.half and name == "_append":
                self.halved = True
                operation(arguments[0], arguments[1][: len(arguments[1]) // 2])
                arguments[0].flush()
                raise PowerCut
            gone = arguments[0].read_bytes() if name == "_remove" else None
            result = operation(*arguments)
            self._remember(name, arguments, gone)
            if self.count == self.last:
                if name == "_append":
                    arguments[0].flush()
                if name == "_create":
                    result.close()
                raise PowerCut
            return result

        return run

    def _remember(self, name: str, arguments: tuple, gone: bytes | None) -> None:
        path = arguments[0]
        if name == "make_folder":
            self.changes.append(Change("folder", path))
        elif name == "_create":
            self.changes += [Change("content", path), Change("name", path)]
        elif name == "sync":
            self.changes = [change for change in self.changes if change.folder != path]
        elif name == "rename":
            self.changes = [change.moved(*arguments) for change in self.changes]
            self.changes.append(Change("move", arguments[1], path))
        elif name in ("_remove", "_remove_folder"):
            self.changes = [change for change in self.changes if change.path != path or change.kind == "removal"]
            self.changes.append(Change("removal", path, gone))

    def losses(self) -> Iterator[list[Change]]:
        """What may be lost: nothing, all, all of a kind, each alone, all but each."""
        kinds = {change.kind for change in self.changes}
        every = [[], self.changes, *([c for c in self.changes if c.kind == kind] for kind in sorted(kinds))]
        every += [[change] for change in self.changes]
        every += [[other for other in self.changes if other is not change] for change in self.changes]
        seen: list[list[Change]] = []
        for loss in every:
            if loss not in seen:
                seen.append(loss)
                yield loss


def lose(changes: list[Change], crashed: Path, root: Path) -> None:
    """Take these changes back in `root`, a copy of the folder `crashed` in which they were made."""
    order = ("content", "name", "removal", "folder", "move")
    for change in sorted(reversed(changes), key=lambda change: order.index(change.kind)):
        path = root / change.path.relative_to(crashed)
        if change.kind == "content" and path.exists():
            path.write_bytes(b"")
        elif change.kind == "name" and path.exists():
            path.unlink()
        elif change.kind == "removal" and isinstance(change.before, bytes):
            if path.parent.is_dir() and not path.exists():
                path.write_bytes(change.before)
        elif change.kind == "removal" and path.parent.is_dir():
            path.mkdir(exist_ok=True)
        elif change.kind == "move" and isinstance(change.before, Path):
            source = root / change.before.relative_to(crashed)
            if path.exists() and not source.exists():
                path.rename(source)
        elif change.kind == "folder" and path.is_dir():
            disk.discard(path)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Disk` knows what would have been synced; to wait for a real disk thousands of times adds nothing but minutes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
