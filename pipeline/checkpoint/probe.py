"""Whether all machines of a run see the same checkpoint folder, found before anything is paid for.

Rank 0 puts a token into the folder and every rank looks for it. What it gives up: a folder that all see at the start
may be lost later; a save fails then, and says which rank could not write.
"""

from __future__ import annotations

import secrets
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checkpoint import disk
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.session import World

PATIENCE_SECONDS = 10.0  # network file systems remember for some seconds that a name was not there


def require_shared(world: World, folder: Path, patience_seconds: float = PATIENCE_SECONDS) -> None:
    """Raises ConfigError, on all ranks, naming the hosts that do not see `folder` as rank 0 does. All call it together.

    Also raises CheckpointError when rank 0 cannot write there.
    """
    from pipeline.checkpoint import shards

    name = shards.on_rank_0(world, lambda: _leave_token(folder))
    try:
        seen = _look_for(folder / name, patience_seconds)
        everyone = world.gather_objects((socket.gethostname(), str(folder), seen))
    finally:
        if world.rank == 0:
            disk.discard(folder / name)
    blind = sorted({(host, path) for host, path, sees in everyone if not sees})
    if blind:
        (host, path, _), hosts = everyone[0], ", ".join(f"{other} ({there})" for other, there in blind)
        raise ConfigError(
            f"not all machines see the run's checkpoint folder: rank 0 on {host} wrote into {path}, and it is not to "
            f"be seen on {hosts}.\nPut `runs` into a folder that all machines share, under one path (NFS, Lustre, a "
            "shared volume). checkpoint.url does not replace it: it is a second home, filled from the first."
        )


def _leave_token(folder: Path) -> str:
    name = f".probe-{secrets.token_hex(8)}"
    with disk.explained(folder / name):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).mkdir()
    return name


def _look_for(path: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
        disk.names_in(path.parent)  # a fresh listing ends what the system remembers
    return True
