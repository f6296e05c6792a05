"""The code that goes with a job, chosen by what may leave, never by what may not.

That is Millstream's own package, and the package of each module that the configuration names by import path (a task, a
decoder): their .py files, and nothing else of their folders. Data, runs, secrets, .git and .env cannot be among them.
What it gives up: packages that are installed here (site-packages) are not sent; the target must have them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pipeline
from pipeline.config import Config
from pipeline.problems import Problem

SENT = (".py", ".sh")  # .sh: the body of a batch script, which stands beside slurm.py
LARGEST = 20 * 2**20  # bytes of code; far more than any has


class Code(NamedTuple):
    """files: name at the target -> file here.  needed: packages that the target must have by itself."""

    files: dict[str, Path]
    needed: list[str]


def collect(config: Config, *, own: bool, users: bool = True) -> Code:
    """The code of a run. own: with Millstream's package, for a target that has none, or another version of it.

    users: with that of a task or a decoder by import path, unless it is installed here; a target whose image has it
    needs none of it.
    """
    tops = {"pipeline"} if own else set()
    needed = set()
    for module in modules(config):
        top = module.partition(".")[0]
        if top != "pipeline":
            (tops if users and not _installed(top) else needed).add(top)
    files = {name: path for top in sorted(tops) for name, path in sorted(_files(top))}
    return Code(files, sorted(needed))


def modules(config: Config) -> list[str]:
    """Modules that the configuration names by import path."""
    task = [config.task.name] if "." in config.task.name else []
    return [*task, *(path.partition(":")[0] for path in config.data.decoders.values())]


def problems(files: Mapping[str, Path]) -> list[Problem]:
    """What must not leave although it is code: links that lead elsewhere, and far too much of it."""
    found = [
        Problem(name, "is a link to another place", suggestion="put the file itself there, or leave it out")
        for name, path in files.items()
        if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve())
    ]
    size = sum(path.stat().st_size for path in files.values())
    if size > LARGEST:
        message = f"{size:,} bytes of code in {len(files):,} files, more than {LARGEST:,}"
        found.append(Problem("code", message, suggestion="put the task into a package that holds only code"))
    return found


def report(files: Mapping[str, Path]) -> str:
    """One line per file: its bytes, the beginning of its sha256, its name; and the sum."""
    lines, total = [], 0
    for name, path in files.items():
        content = path.read_bytes()
        total += len(content)
        lines.append(f"{len(content):>9,}  {hashlib.sha256(content).hexdigest()[:12]}  {name}")
    return "\n".join([*lines, f"{total:>9,} bytes in {len(files)} files", ""])


def stage(files: Mapping[str, Path], folder: Path) -> None:
    """Copy the files into `folder`, which then holds them and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)


def _installed(top: str) -> bool:
    places = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib")]
    return any(path.is_relative_to(place) for path in _places(top) for place in places)


def _places(top: str) -> list[Path]:
    """The folders of a package, or the file of a single module."""
    if top == "pipeline":
        return [Path(pipeline.__file__).parent]
    spec = importlib.util.find_spec(top)
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(place) for place in spec.submodule_search_locations]
    return [Path(spec.origin)] if spec.origin else []


def _files(top: str) -> Iterator[tuple[str, Path]]:
    for place in _places(top):
        for path in [place] if place.is_file() else place.rglob("*"):
            inside = path.relative_to(place.parent)
            hidden = any(part.startswith((".", "__pycache__")) for part in inside.parts)
            if path.suffix in SENT and path.is_file() and not hidden:
                yield inside.as_posix(), path
