"""A checkpoint on disk: a folder that either is whole, proven by its manifest, or does not exist.

A save goes: `stage` makes a hidden folder, every rank puts its files there with `write` (or `seal`s what another
library wrote), rank 0 gathers the digests into a `Manifest` and calls `commit`: all files present, the manifest written
last, everything on the disk, then one rename. A load goes: `find` takes the newest checkpoint of which every byte
verifies and names those that it passed over; it fetches what only a second home holds (remote.py). Those of a line that
the run has gone back from do not count (rollbacks.py). Which old ones are deleted is said in retention.py.

    <root>/checkpoint-00000040/{rank-00000.safetensors, ..., manifest.json}     whole
    <root>/.staging-00000040-a2/                                                being written by attempt 2
    <root>/.replaced-checkpoint-00000040/                                       for the moment between two renames
    <root>/.deleting-checkpoint-00000020/                                       being deleted
    <root>/rollbacks.json                                                       which ones were given up, if any

It gives up speed for certainty: a save waits for the disk, a load reads every byte once for its sha256. No pickle
anywhere. Names and order follow from step and attempt, never from a clock.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.checkpoint import disk, rollbacks
from pipeline.checkpoint.disk import discard, seal, write
from pipeline.checkpoint.manifest import MANIFEST, NAME, VERSION, Damage, FileDigest, FragmentPlace, Manifest, parse
from pipeline.errors import CheckpointError

if TYPE_CHECKING:
    from pipeline.checkpoint.remote import Remote

__all__ = [
    "MANIFEST", "VERSION", "Damage", "FileDigest", "Found", "FragmentPlace", "Listed", "Manifest", "adopt",
    "checkpoint_name", "commit", "delete", "discard", "find", "given_up", "inspect", "list_checkpoints", "parse",
    "seal", "stage", "verify", "write",
]  # fmt: skip

_STAGING = re.compile(r"\.staging-\d{8,}-a(\d+)")


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that verifies, what is wrong with those that were passed over, and what else to know."""

    step: int
    path: Path
    manifest: Manifest
    bad: list[Damage]
    notes: list[str] = field(default_factory=list)


class Listed(NamedTuple):
    """A checkpoint in a cheap listing: manifest and sizes checked, contents not; `damage` is empty if they hold."""

    step: int
    path: Path
    manifest: Manifest | None
    damage: list[Damage]


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps; names sort like the numbers."""
    return f"checkpoint-{step:08d}"


def stage(root: Path, step: int, attempt: int, bytes_needed: int = 0) -> Path:
    """Makes the empty folder in which a checkpoint is put together, and clears what killed saves left behind.

    Called by one process; the others write into the folder once it is there. `bytes_needed`, where known, is compared
    with the free space before anything is written. Raises CheckpointError when the disk is full or cannot be written.
    """
    staging = root / f".staging-{step:08d}-a{attempt}"
    with disk.explained(staging, bytes_needed):
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root, attempt)
        if bytes_needed > disk.free_bytes(root):
            raise OSError(errno.ENOSPC, "too little space")
        disk.make_folder(staging)
    return staging


def commit(root: Path, staging: Path, manifest: Manifest, *, newest_attempt: Callable[[], int]) -> Path:
    """Turns a staging folder into a checkpoint, or removes it; afterwards the whole new checkpoint is on the disk.

    Refused (CheckpointError) when `manifest.attempt` is older than `newest_attempt` (another process has gone on from
    an earlier step and this one does not know it), when a newer attempt has already committed this step, or when a file
    named in the manifest is absent or of another size. One of the same step by this or an older attempt is replaced.
    The newest attempt is asked for when only the rename is left to do: a disk may have let this one wait for long.
    """
    target = root / checkpoint_name(manifest.step)
    try:
        for name, digest in manifest.files.items():
            damage = _check_file(staging, False, name, digest)
            if damage is not None:
                raise CheckpointError(f"checkpoint of step {manifest.step} not committed: {damage}")
        write(staging / MANIFEST, [manifest.to_bytes()])
        return adopt(staging, target, lambda: _check_fence(target, manifest, newest_attempt()))
    except CheckpointError:
        discard(staging)
        raise


def adopt(staging: Path, target: Path, check: Callable[[], None] = lambda: None) -> Path:
    """Gives a staging folder that holds a whole checkpoint, its manifest included, its name; replaces what has it.

    check: raises when that must not be; called when only the rename is left to do.
    """
    with disk.explained(target):
        disk.sync(staging)
        check()
        replaced = _set_aside(target)
        disk.rename(staging, target)
        disk.sync(target.parent)
    discard(replaced)
    return target


def find(root: Path, step: int | None = None, home: Remote | None = None) -> Found | None:
    """The newest checkpoint (or the one of `step`) of which every byte is as it was written; None when there is none.

    One that only `home` holds whole is brought here first. Raises CheckpointError when there are checkpoints but none
    is good (to begin again is never the answer to damage), when a newer one than the newest good one is of a format
    that this version does not read, and when nothing is here and `home` cannot be asked.
    """
    bad: list[Damage] = []
    here = dict(_candidates(root))
    there, notes = _steps_of(home, root, bool(here))
    for at in sorted({*here, *there} if step is None else {*here, *there} & {step}, reverse=True):
        path, damage = here.get(at, root / checkpoint_name(at)), []
        if at in here:
            manifest, damage = _inspect(path, read=True)
            if manifest is not None and not damage:
                return Found(at, path, manifest, bad, notes)
        if home and at in there and "version" not in (each.kind for each in damage):
            bad += damage
            manifest, damage = home.fetch(at, root)
            if manifest is not None and not damage:
                return Found(at, root / checkpoint_name(at), manifest, bad, [*notes, f"fetched from {home.url}"])
        if damage[0].kind == "version":
            raise CheckpointError(str(damage[0]))
        bad += damage
    if bad:
        listing = "\n  ".join(str(damage) for damage in bad)
        raise CheckpointError(
            f"no good checkpoint in {root}:\n  {listing}\n"
            "Bring a good copy back, or start anew on purpose with --fresh (a new run folder; nothing is deleted)."
        )
    return None


def inspect(path: Path) -> tuple[Manifest | None, list[Damage]]:
    """Reads every byte of one checkpoint; its manifest where that can be trusted, and all that is wrong with it."""
    return _inspect(path, read=True)


def verify(path: Path) -> list[Damage]:
    """Reads every byte of one checkpoint; returns all that is wrong with it, an empty list when nothing is."""
    return _inspect(path, read=True)[1]


def list_checkpoints(root: Path) -> list[Listed]:
    """All checkpoints in order of their steps; reads manifests and sizes only."""
    return [Listed(step, path, *_inspect(path, read=False)) for step, path in _candidates(root)]


def delete(path: Path) -> None:
    """Deletes one checkpoint: its name first, so that a kill or a power cut leaves it whole or none."""
    doomed = path.with_name(f".deleting-{path.name}")
    discard(doomed)
    disk.rename(path, doomed)
    disk.sync(path.parent)
    discard(doomed)


def given_up(root: Path) -> list[Path]:
    """Committed folders of a line of history that the run has gone back from; nothing else here sees them."""
    gone = rollbacks.given_up(root)
    return [path for _, path in _folders(root) if gone and gone(_manifest(path))]


def _candidates(root: Path) -> list[tuple[int, Path]]:
    """(step, path) of all committed folders by step, without those that were given up."""
    gone = rollbacks.given_up(root)
    return [(step, path) for step, path in _folders(root) if not (gone and gone(_manifest(path)))]


def _folders(root: Path) -> list[tuple[int, Path]]:
    """(step, path) of all committed folders by step. One set aside counts until its replacement is there."""
    found: dict[int, Path] = {}
    for name in disk.names_in(root):  # sorted, so ".replaced-..." comes first and gives way to "checkpoint-..."
        if match := NAME.fullmatch(name):
            found[int(match[1])] = root / name
    return sorted(found.items())


def _manifest(path: Path) -> Manifest | None:
    return parse(path, (path / MANIFEST).read_bytes)[0]


def _inspect(path: Path, *, read: bool) -> tuple[Manifest | None, list[Damage]]:
    """The manifest where it can be trusted, and the damage; `read`: contents too, not only sizes."""
    manifest, damage = parse(path, (path / MANIFEST).read_bytes)
    files = manifest.files if manifest else {}
    with ThreadPoolExecutor(os.cpu_count() if read else 1) as beside:  # sha256 takes longer than a good disk
        checks = list((beside.map if read else map)(partial(_check_file, path, read), files, files.values()))
    return manifest, damage + [found for found in checks if found is not None]


def _steps_of(home: Remote | None, root: Path, some_here: bool) -> tuple[list[int], list[str]]:
    """What the second home holds, and a note when it could not be asked and those here must do."""
    if home is None:
        return [], []
    try:
        return home.steps(rollbacks.given_up(root)), []
    except CheckpointError as error:
        if some_here:
            return [], [f"{error}; only those in {root} were looked at"]
        raise CheckpointError(
            f"{error}\nNo checkpoint is in {root} either, so whether the run has one cannot be told. Mend what is said "
            "above and run it again, or start without the second home: checkpoint.url=null"
        ) from error


def _check_file(folder: Path, read: bool, name: str, expected: FileDigest) -> Damage | None:
    try:
        size = (folder / name).stat().st_size
        if size != expected.bytes:
            return Damage(folder, name, "size", f"has {size} bytes instead of {expected.bytes}")
        if read and disk.digest_of(folder / name) != expected:
            return Damage(folder, name, "digest", "does not match its sha256: bits have flipped or it was overwritten")
    except FileNotFoundError:
        return Damage(folder, name, "missing", "is missing")
    except OSError as error:
        return Damage(folder, name, "unreadable", f"cannot be read: {error.strerror}")
    return None


def _check_fence(target: Path, manifest: Manifest, newest_attempt: int) -> None:
    """Raises CheckpointError when this save belongs to an attempt that another has gone past."""
    existing = _inspect(target, read=False)[0] if target.exists() else None
    newest = max(newest_attempt, existing.attempt if existing else 0)
    if manifest.attempt < newest:
        raise CheckpointError(
            f"checkpoint of step {manifest.step} not committed: attempt {manifest.attempt} has been superseded by "
            f"attempt {newest}, which now owns {target.parent}. Nothing was changed; this process should end."
        )


def _set_aside(target: Path) -> Path:
    """Moves an existing checkpoint out of the way; `_candidates` still finds it until the new one is in its place."""
    replaced = target.with_name(f".replaced-{target.name}")
    if target.exists():
        discard(replaced)
        disk.rename(target, replaced)
    return replaced


def _sweep(root: Path, attempt: int) -> None:
    """Clears what killed saves left: staging folders up to this attempt, half-deleted ones, one that was set aside."""
    for name in disk.names_in(root):
        staging = _STAGING.fullmatch(name)
        if (staging and int(staging[1]) <= attempt) or name.startswith(".deleting-"):
            discard(root / name)
        elif name.startswith(".replaced-"):
            target = root / name.removeprefix(".replaced-")
            if target.exists():
                discard(root / name)
            else:
                disk.rename(root / name, target)
                disk.sync(root)
