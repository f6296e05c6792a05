"""The documents of a source: text files, and lines of .jsonl, found by name and read when they are needed.

One pass at the start gives names, digests and sizes of all documents; later passes read the text again. So a corpus
may be larger than memory, at the price of reading it about four times while it is packed.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import xxhash

from pipeline.data.pack.writer import Progress
from pipeline.errors import DataError

PATTERNS = ("*.txt", "*.py", "*.md", "*.jsonl")


@dataclass(frozen=True)
class Corpus:
    """The documents of a source, read when needed and never all in memory. Empty ones do not count."""

    source: Path
    files: list[Path]
    field: str  # of each line of a .jsonl
    names: list[str]  # relative path of each document's file; of a .jsonl with the line: "a.jsonl:3"
    digests: list[bytes]
    size_bytes: np.ndarray  # int64[documents], of the text as UTF-8
    file_of: np.ndarray  # int64[documents], place in `files`

    def texts(self, mask: np.ndarray) -> Iterator[str]:
        """The chosen documents, in order."""
        first = np.searchsorted(self.file_of, np.arange(len(self.files) + 1))
        for i, path in enumerate(self.files):
            chosen = mask[first[i] : first[i + 1]]
            if chosen.any():
                for wanted, (_, text, _) in zip(chosen, _documents(self.source, path, self.field)):
                    if wanted:
                        yield text


def find_files(source: Path, patterns: Sequence[str], exclude: Sequence[str] = ()) -> list[Path]:
    """Files below `source` whose names match, none hidden, ordered by path; `source` itself if it is a file."""
    if not source.is_dir():
        return [source] if source.is_file() else []

    def kept(name: str) -> bool:
        return not name.startswith(".") and not any(fnmatch(name, pattern) for pattern in exclude)

    found: list[Path] = []
    for folder, subfolders, names in os.walk(source):
        subfolders[:] = filter(kept, subfolders)
        wanted = (name for name in names if kept(name) and any(fnmatch(name, pattern) for pattern in patterns))
        found += (path for path in (Path(folder, name) for name in wanted) if path.is_file())
    return sorted(found, key=lambda path: path.relative_to(source).as_posix())


def look_through(
    source: Path, patterns: Sequence[str], exclude: Sequence[str], field: str, progress: Progress
) -> tuple[Corpus, list[str]]:
    """Read everything once: names, digests and sizes of all documents that are not empty, and warnings."""
    files = find_files(source, patterns, exclude)
    names: list[str] = []
    digests: list[bytes] = []
    sizes, file_of, mended = array("q"), array("q"), 0
    for i, path in enumerate(files):
        for name, document, changed in _documents(source, path, field):
            data = document.encode()
            names.append(name)
            digests.append(xxhash.xxh3_128_digest(data))
            sizes.append(len(data))
            file_of.append(i)
            mended += changed
        progress("read", i + 1, len(files))
    if not names:
        left_out = f", leaving out {' '.join(exclude)}" if exclude else ""
        raise DataError(f"no text in {source}: {len(files)} files match {' '.join(patterns)}{left_out}, all empty")
    warnings = [f"{mended} documents hold bytes that are not UTF-8; replacement marks stand for them"] if mended else []
    return Corpus(source, files, field, names, digests, np.array(sizes), np.array(file_of)), warnings


def _other(line: bytes, field: str, error: Exception) -> str:
    """What a line of JSON is that has no field of text, and how it is packed."""
    what = f"no JSON object with a field {field!r}"
    if not isinstance(error, KeyError):
        return f"{what} ({type(error).__name__}: {error})"
    there = json.loads(line)
    if "messages" in there:
        return f"{what} but one with 'messages': pack it with --kind chats"
    return f"{what} but with {', '.join(map(repr, there)) or 'none'}: name its text {field!r}, or use --kind table"


def _documents(source: Path, path: Path, field: str) -> Iterator[tuple[str, str, bool]]:
    """Name, text and whether it had to be mended, of each document in one file that is not empty."""
    name = path.relative_to(source).as_posix() if path != source else path.name
    if path.suffix.lower() != ".jsonl":
        data = path.read_bytes()
        text = data.decode("utf-8", "replace")
        if text:
            yield name, text, "\ufffd" in text and text.encode() != data
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}, line {number}: {_other(line, field, error)}") from error
            if not isinstance(text, str):
                raise DataError(f"{path}, line {number}: field {field!r} is {type(text).__name__}, not text")
            clean = text.encode(
                "utf-8", "replace"
            ).decode()  # a lone half of a surrogate pair can be in JSON, not in UTF-8
            if clean:
                yield f"{name}:{number}", clean, clean != text
