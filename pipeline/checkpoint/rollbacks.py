"""Decisions to go back: which checkpoints belong to a line of history that was given up, and which steps are left out.

    <root>/rollbacks.json      [[attempt, first, last], ...], beside the checkpoints that they are about

An attempt that meets a trouble it cannot pass adds one and ends. From then on every checkpoint behind `first` that this
attempt or an earlier one has made counts as absent (format.py asks here), so whoever goes on later, even if all is
killed in the next moment, goes on from before the trouble. They are deleted at the next save. What it gives up: the
file has no second home. A machine that has nothing but the store goes on from the newest there, and decides anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.checkpoint import disk
from pipeline.checkpoint.manifest import Manifest
from pipeline.errors import CheckpointError

if TYPE_CHECKING:
    from pipeline.session import World

FILE = "rollbacks.json"


class Rollback(NamedTuple):
    """attempt: that decided.  first, last: the steps that are left out; it goes on from a state before `first`."""

    attempt: int
    first: int
    last: int


def read(root: Path) -> list[Rollback]:
    """All decisions about the checkpoints in `root`, oldest first. Raises CheckpointError when they cannot be read."""
    try:
        return [Rollback(*row) for row in json.loads((root / FILE).read_bytes())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{root / FILE} cannot be read: {error}. It says which checkpoints were given up: bring it back, or write "
            "it from the journal (kind: rollback), a row [attempt, step, last] each"
        ) from error


def shared(world: World, root: Path) -> list[Rollback]:
    """What rank 0 reads, or its CheckpointError, on all ranks."""
    from pipeline.checkpoint.shards import on_rank_0

    return on_rank_0(world, lambda: read(root))


def add(root: Path, decision: Rollback, newest_attempt: int) -> None:
    """Make a decision hold, for good, before this returns.

    Raises CheckpointError when the disk refuses, or when another attempt has taken the run over meanwhile.
    """
    if decision.attempt < newest_attempt:
        raise CheckpointError(
            f"not going back: attempt {decision.attempt} has been superseded by attempt {newest_attempt}, which now "
            f"owns {root}. Nothing was changed; this process should end."
        )
    draft = root / f".{FILE}-a{decision.attempt}"
    with disk.explained(draft):
        root.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
    disk.write(draft, [json.dumps([*read(root), decision]).encode()])
    with disk.explained(draft):
        disk.rename(draft, root / FILE)
        disk.sync(root)


def given_up(root: Path) -> Callable[[Manifest | None], bool] | None:
    """Tells of a checkpoint of `root`, or of its second home, whether its line was given up; None: no line ever was."""
    made = read(root)

    def abandoned(manifest: Manifest | None) -> bool:
        return manifest is not None and any(
            manifest.step > decision.first and manifest.attempt <= decision.attempt for decision in made
        )

    return abandoned if made else None
