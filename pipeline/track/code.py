"""Which code a run is trained by: version of the package, and the commit of the repository that it was started in."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TypedDict

import pipeline

GIT_SECONDS = 5.0


class Code(TypedDict):
    """commit, dirty: None outside of a git repository; dirty: whether a tracked file differs from that commit."""

    millstream: str
    commit: str | None
    dirty: bool | None


def version(folder: Path | None = None) -> Code:
    """Of the repository around `folder` (the working directory, where a user's tasks and configurations stand), else of
    the one around the package.
    """
    for place in (folder or Path.cwd(), Path(pipeline.__file__).parent):
        commit = _git(place, "rev-parse", "HEAD")
        if commit:
            changes = _git(place, "status", "--porcelain", "--untracked-files=no")
            dirty = None if changes is None else bool(changes)
            return Code(millstream=pipeline.__version__, commit=commit, dirty=dirty)
    return Code(millstream=pipeline.__version__, commit=None, dirty=None)


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says; None when it says nothing in time, or is not there."""
    command = ["git", "-C", str(folder), "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
