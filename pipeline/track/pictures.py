"""Pictures of a run, in its folder: samples/<step>/<name>.png or .jpg. The journal names them, the page and W&B show
them.

A name comes from a file that somebody may have sent, so only a plain one that stays in that folder is followed.
"""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = "samples"  # of a run's folder
MEDIA = {".png": "image/png", ".jpg": "image/jpeg"}
_NAME = re.compile(r"\d+/[A-Za-z0-9][A-Za-z0-9._-]*\.(png|jpg)")
_MOST_BYTES = 1 << 20  # of one; those that are written here have a few kB


def find(run: Path, name: object) -> Path | None:
    """The picture of this name, or None when there is none, or it lies elsewhere, or is far too large."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return None
    folder = (run / FOLDER).resolve()
    path = (folder / name).resolve()
    if path.is_relative_to(folder) and path.is_file() and path.stat().st_size <= _MOST_BYTES:
        return path
    return None


def name_in(value: object) -> object:
    """The name of the picture that a value of a sample stands for; None when it is text or a number."""
    return value.get("picture") if isinstance(value, dict) else None
