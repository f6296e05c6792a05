"""The page as one HTML file: look, library, program and numbers in it, nothing beside it.

What comes from a run (names, messages, configurations) reaches the page as JSON only, and the program shows it as text,
never as HTML. A policy inside the file allows just the scripts that are in it, by their digests, so that the file asks
no network whatever is in it; the live page may ask its own server. Pictures of samples are put into the file. Charts
are drawn by uPlot (MIT; its licence lies beside it): a canvas chart of 50 kB that draws hundreds of thousands of points
in a moment.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pipeline import __version__, look
from pipeline.errors import RunError
from pipeline.track import pictures
from pipeline.track.page import model
from pipeline.track.page.reading import Reading
from pipeline.track.page.thin import width_for

MOMENTS = 24  # evaluations whose samples are in the file, of all runs; at least one of each
SCRIPTS = ("uPlot.iife.min.js", "elements.js", "chart.js", "parts.js", "samples.js", "page.js")


def write(runs: Sequence[Path], out: Path) -> int:
    """Write the page of these run folders to `out`; returns its bytes. Raises RunError when it cannot be written."""
    content = report(runs).encode()
    try:
        out.write_bytes(content)
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror}; name another file with --out") from error
    return len(content)


def report(runs: Sequence[Path]) -> str:
    """The page of these run folders as they are now."""
    folders = list(dict.fromkeys(runs))
    names = {model.title(folder, folders): Reading(folder).all() for folder in folders}
    width = width_for(max(reading.last_step for reading in names.values()), len(names))
    shown = [model.run(name, reading, width, moments=max(1, MOMENTS // len(names))) for name, reading in names.items()]
    for told_of, folder in zip(shown, folders):
        _put_in(told_of["samples"], folder)
    told = {
        "live": False,
        "made": time.time(),
        "version": __version__,
        "list": [model.listed(name, reading, reading.position) for name, reading in names.items()],
        "runs": shown,
    }
    title = next(iter(names)) if len(names) == 1 else f"{len(names)} runs"
    return document(f"{title} - millstream", told, "'none'", "data:")[0]


def document(title: str, told: dict[str, Any], connect: str, images: str) -> tuple[str, str]:
    """(the page, its content security policy); `connect`, `images`: where it may fetch from, as that policy says it."""
    scripts = [_asset(name) for name in SCRIPTS]
    sources = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; connect-src {connect}; "
        f"img-src {images}; base-uri 'none'; form-action 'none'"
    )
    body = _asset("page.html") + f'<script type="application/json" id="told">{model.text(told)}</script>'
    body += "".join(f"<script>{script}</script>" for script in scripts)
    # An empty icon: else the browser asks the server for one, which it has not.
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}"><link rel="icon" href="data:,">'
    return look.document(title, _asset("uPlot.min.css") + _asset("page.css"), body, head), policy


def _put_in(samples: list[dict[str, Any]], folder: Path) -> None:
    """Beside the name of each picture the picture itself, as an address that holds it."""
    cells = (cell for moment in samples for rows in moment["sets"].values() for row in rows for cell in row.values())
    for cell in cells:
        if path := pictures.find(folder, pictures.name_in(cell)):
            content = base64.b64encode(path.read_bytes()).decode()
            cell["data"] = f"data:{pictures.MEDIA[path.suffix]};base64,{content}"


def _asset(name: str) -> str:
    return files("pipeline.track.page").joinpath("assets", name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
