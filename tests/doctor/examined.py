"""Examines an entry of the corpus as the command would, in this process, with its environment; and judges what came."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.doctor.examine import Target, examine
from pipeline.doctor.findings import Report
from tests.doctor import corpus

CLEAN = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "MILLSTREAM_KILL", "AWS_ACCESS_KEY_ID", "AWS_PROFILE")


def run(entry: dict[str, Any], good: Path, folder: Path, *, quick: bool = True) -> Report:
    """The report on an entry; its files are made in `folder`."""
    path = corpus.make(entry, good, folder)
    given = {**entry.get("args", {})}
    if "folder" in given:
        given["folder"] = Path(given["folder"])
    given["kind"] = given.pop("target", "local")
    if given["kind"] == "slurm":
        given["options"] = {"python": sys.executable, **given.get("options", {})}
    shown = corpus.pretend(entry.get("dist", {}), folder / "shown")
    with around(entry.get("env", {}), shown, folder):
        return examine(path, (), Target(**given), quick=quick)


@contextmanager
def around(env: dict[str, str], shown: Path, folder: Path) -> Iterator[None]:
    """Variables, versions and working directory of an entry."""
    before, here = dict(os.environ), os.getcwd()
    for name in CLEAN:
        os.environ.pop(name, None)
    os.environ.update(env, HOME=str(folder))
    sys.path.insert(0, str(shown))
    importlib.invalidate_caches()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
        sys.path.remove(str(shown))
        os.environ.clear()
        os.environ.update(before)


def found(entry: dict[str, Any], report: Report) -> bool:
    """Whether a finding of the level has the place and the word."""
    level = entry.get("level", "error")
    levels = ("error", "warning") if level == "any" else (level,)
    return any(
        re.search(entry["place"], finding.problem.place)
        and re.search(entry["says"], f"{finding.problem.message} {finding.problem.suggestion}")
        for finding in report.of(*levels)
    )


def alarms(entry: dict[str, Any], report: Report) -> list[str]:
    """What a good entry should not have raised."""
    return [
        f"{finding.level} {finding.problem}"
        for finding in report.of("error", "warning")
        if not ("tells" in entry and finding.level == "warning" and re.search(entry["tells"], str(finding.problem)))
    ]
