"""Where the files of a data set lie: whole files by their name, read-only. Here those of a local folder, mapped.

What reads a data set (index, segments, samples) asks a Storage for bytes and nothing else. remote/shards.py is
that of a URL, whose tars come in pieces. Data sets are written in folders only.

What it gives up: a mapped file cannot report an error of the disk, nor that it was cut after it was opened; the system
ends the process then (SIGBUS). The next start compares sizes and names the shard.
"""

from __future__ import annotations

import mmap
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.errors import DataError

if TYPE_CHECKING:
    from pipeline.data.remote.cache import Place

COMPRESSED = {  # how the name of a compressed tar ends -> the command that puts a plain .tar in its place
    **dict.fromkeys((".tar.gz", ".tgz"), "gzip -d"),
    **dict.fromkeys((".tar.bz2", ".tbz2"), "bzip2 -d"),
    **dict.fromkeys((".tar.xz", ".txz"), "xz -d"),
    **dict.fromkeys((".tar.zst", ".tzst"), "zstd -d --rm"),
    ".tar.lz4": "lz4 -d -m --rm",
}


class Storage(Protocol):
    """A place that holds the files of one data set. Threads may share it.

    block_bytes: that are read in one piece, on average, where nobody says otherwise.
    """

    block_bytes: int

    @property
    def place(self) -> str:
        """What it is called in messages."""
        ...

    def map(self, name: str) -> memoryview:
        """All bytes of a file, read-only; FileNotFoundError or another OSError when they cannot be had."""
        ...

    def segment(self, name: str, digest: str) -> memoryview:
        """The index of the tar `name`, whose xxh3_128 should be `digest`; raises as `map` does."""
        ...

    def sizes(self, expected: int = 0) -> dict[str, int] | None:
        """The tars that are there by name, with their bytes; None when so many cannot be listed cheaply."""
        ...

    def close(self) -> None:
        """Let go of what is open."""
        ...


class Folder:
    """A local folder."""

    block_bytes = 1 << 20

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    @property
    def place(self) -> str:
        return str(self.folder)

    def map(self, name: str) -> memoryview:
        return map_file(self.folder / name)

    def segment(self, name: str, digest: str) -> memoryview:
        return self.map(f"{name}.idx")

    def sizes(self, expected: int = 0) -> dict[str, int]:
        """Raises DataError as `find_shards` does."""
        return find_shards(self.folder)

    def close(self) -> None:
        """Nothing is open."""


def beside(storage: Storage, name: str) -> bytes | None:
    """A file that lies beside the shards; None when there is none."""
    try:
        return bytes(storage.map(name))
    except FileNotFoundError:
        return None


def is_url(place: Path | str) -> bool:
    """Whether a place is somewhere else than in a file system that is mounted here."""
    return "://" in str(place) and not str(place).startswith("file://")


def open_storage(place: Path | str | Storage, cache: Place | None = None) -> Storage:
    """A folder, or a URL through the cache of this node. Raises StoreError for a URL that nobody knows."""
    if not isinstance(place, Path | str):
        return place
    if is_url(place):
        from pipeline.data.remote.shards import Remote

        return Remote(str(place), cache)
    return Folder(str(place).removeprefix("file://"))


def map_file(path: Path) -> memoryview:
    """The bytes of a file, mapped read-only."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def find_shards(folder: Path | str) -> dict[str, int]:
    """The tars of a folder in the order of their names, with their bytes.

    Raises DataError when there is no folder, no tar in it, a compressed one, or a pipe in the place of one; each with
    the command that makes what is there indexable.
    """
    _refuse_streams(str(folder))
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of shards; check the path, or make one with `millstream data pack`")
    found: dict[str, int] = {}
    compressed: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if name.endswith(".tar"):
                if not entry.is_file():
                    raise DataError(f"{entry.path}: {_not_plain(entry)}")
                found[name] = entry.stat().st_size
            elif _unpack(name):
                compressed.append(name)
    if compressed:
        first = min(compressed)
        raise DataError(
            f"{folder / first}: compressed shards are not read ({len(compressed)} here), samples are read at their "
            f"places; unpack each: `{_unpack(first)} {shlex.quote(str(folder / first))}`"
        )
    if not found:
        deeper = sorted(path.parent.name for path in folder.glob("*/*.tar"))
        pack = f"pack some with `millstream data pack {shlex.quote(str(folder))} OUT`"
        hint = f"its folder {deeper[0]} has some, name that one" if deeper else pack
        raise DataError(f"{folder}: no .tar shards in this folder; {hint}")
    return dict(sorted(found.items()))


def _unpack(name: str) -> str | None:
    return next((command for ending, command in COMPRESSED.items() if name.lower().endswith(ending)), None)


def _refuse_streams(place: str) -> None:
    """What stands for a folder and is a pipe, or a single file."""
    if place in ("-", "/dev/stdin") or place.startswith("pipe:"):
        source = "cat" if not place.startswith("pipe:") else place.removeprefix("pipe:").strip()
        raise DataError(
            f"{place}: a pipe cannot be indexed, samples are read at their places; keep what comes out of it: "
            f"`mkdir -p shards && {source} > shards/000000.tar`, then `millstream data index shards`"
        )
    path = Path(place)
    if path.is_fifo():
        raise DataError(f"{place}: {_pipe(path)}")
    if path.is_file():
        command = _unpack(path.name)
        unpack = f"`{command} {shlex.quote(place)}`, then " if command else ""
        folder = shlex.quote(str(path.parent))
        raise DataError(f"{place}: a file, and folders are what is indexed; {unpack}`millstream data index {folder}`")


def _not_plain(entry: os.DirEntry[str]) -> str:
    if Path(entry.path).is_fifo():
        return _pipe(Path(entry.path))
    return "not a plain file; put a copy of its bytes in its place"


def _pipe(path: Path) -> str:
    """The way from a named pipe to a file of the same name."""
    pipe, plain = shlex.quote(str(path)), shlex.quote(f"{path}.plain")
    keep = f"cat {pipe} > {plain} && mv {plain} {pipe}"
    return f"a pipe, and samples are read at their places; keep what comes out of it: `{keep}`"
