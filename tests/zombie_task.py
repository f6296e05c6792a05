"""Image classification on a disk that once stops answering in the middle of a commit, until another attempt has begun:
so does a host commit that was cut off from the others and comes back late. All else is the real commit.

A file `hold` in the run folder arms it. The host that is held up writes its name into `held` there, and then how its
commit ended into `late`.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

from pipeline.checkpoint import disk, format
from pipeline.errors import CheckpointError
from pipeline.run import newest_attempt
from tests.slow_task import Config, Task

__all__ = ["Config", "Task"]

commit, sync = format.commit, disk.sync


def late_commit(root: Path, staging: Path, *arguments: Any, **facts: Any) -> Path:
    run = root.parent
    if not (run / "hold").exists():
        return commit(root, staging, *arguments, **facts)
    (run / "hold").unlink()

    def answer_late(path: Path) -> None:
        if path == staging:
            attempt = newest_attempt(run)
            (run / "held").write_text(socket.gethostname())
            while newest_attempt(run) == attempt:
                time.sleep(0.1)
        sync(path)

    disk.sync, outcome = answer_late, "committed"
    try:
        return commit(root, staging, *arguments, **facts)
    except CheckpointError as error:
        outcome = str(error)
        raise
    finally:
        disk.sync = sync
        (run / "late").write_text(outcome)


format.commit = late_commit
