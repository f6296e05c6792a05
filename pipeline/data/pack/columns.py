"""A row of a table -> the members of a sample, by what a person asked for or by what the values are.

Asked for: pairs of (member, column) such as ("jpg", "photo"). The member's last part says what the value must be:
    cls                 a whole number, or a word, which gets the number of its place among all words
    txt                 text
    json                anything that JSON can hold
    npy                 a number, or numbers in lists
    any other           bytes, or the path of a file, relative to the table's folder
    *                   the same, with the extension that the first bytes or else the file's name say
Not asked for, each column is a member by its values: bytes are `*`, columns called label, class or cls are cls, text or
caption are txt, file_name (or file, path) is the path of a file, and all others make one json.

Pictures, sounds, arrays are decoded once, so that a bad one is found now. What it gives up: objects of Python, and
columns that are to be computed.
"""

from __future__ import annotations

import difflib
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.decode import DECODERS, decode
from pipeline.errors import DataError

CLASSES, TEXTS, FILES = ("label", "class", "cls"), ("text", "caption"), ("file_name", "filename", "file", "path")
STARTS = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n": "png", b"fLaC": "flac", b"OggS": "ogg", b"\x93NUMPY": "npy"}
RIFF = {b"WAVE": "wav", b"WEBP": "webp"}
TEXTUAL = ("cls", "txt", "json", "npy")  # members whose value is made here; all others are bytes as they are


@dataclass(frozen=True)
class Columns:
    """How a row becomes a sample.

    members: (member, column) pairs, none: all columns, by their values.  key: the column of keys, None: rows are
    numbered.  together: the column whose equal values are held out together.  folder: what paths are relative to, None:
    the table's own.  words: of the column of classes, if it has words: their places are the numbers.
    """

    members: tuple[tuple[str, str], ...] = ()
    key: str | None = None
    together: str | None = None
    folder: Path | None = None
    words: Mapping[str, int] = field(default_factory=dict)

    @property
    def wanted(self) -> list[str] | None:
        """The columns that are read; None: all."""
        if not self.members:
            return None
        columns = (self.key, self.together, *(column for _, column in self.members))
        return list(dict.fromkeys(column for column in columns if column))

    def class_column(self, names: Collection[str]) -> str | None:
        """The column of classes among those that there are."""
        if self.members:
            return next((column for member, column in self.members if extension_of(member) == "cls"), None)
        return next((name for name in names if name.lower() in CLASSES), None)

    def check(self, names: Sequence[str], place: str) -> None:
        """Raises DataError naming columns that are wanted and not there."""
        for column in (
            column for column in (self.key, self.together, *(self.wanted or ())) if column and column not in names
        ):
            raise DataError(f"{place}: {missing(column, names)}")


def missing(column: str, names: Sequence[str]) -> str:
    """What to say of a column that is not there."""
    near = difflib.get_close_matches(column, names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"there is no column {column!r}{hint} There are: {', '.join(map(str, names))}"


def extension_of(member: str) -> str:
    """seg.png -> png"""
    return member.rpartition(".")[2].lower()


def members_of(row: Mapping[str, Any], columns: Columns, folder: Path) -> dict[str, bytes]:
    """{extension: bytes} of one row; empty values (None) are left out. Raises DataError saying what does not fit."""
    if not columns.members:
        return _by_value(row, columns, folder)
    fields: dict[str, bytes] = {}
    for member, column in columns.members:
        if column not in row:
            raise DataError(missing(column, list(row)))
        if row[column] is not None:
            name, data = _member(member, column, row[column], columns, folder)
            _add(fields, name, data, column)
    if not fields:
        raise DataError(f"all of {', '.join(column for _, column in columns.members)} are empty")
    return fields


def _by_value(row: Mapping[str, Any], columns: Columns, folder: Path) -> dict[str, bytes]:
    fields: dict[str, bytes] = {}
    rest: dict[str, Any] = {}
    for column, value in row.items():
        name = column.lower()
        if value is None or column == columns.key:
            continue
        member = None
        if isinstance(value, bytes) or _is_file(value):
            member = "*"
        elif name in CLASSES:
            member = "cls"
        elif isinstance(value, str):
            member = "txt" if name in TEXTS else "*" if name in FILES else None
        if member is None:
            rest[column] = value
            continue
        found, data = _member(member, column, value, columns, folder)
        _add(fields, f"{_plain(column)}.{found}" if found in fields else found, data, column)
    if rest:
        _add(fields, "json", _json(rest, "the others"), "the others")
    if not fields:
        raise DataError("all columns are empty")
    return fields


def _member(member: str, column: str, value: Any, columns: Columns, folder: Path) -> tuple[str, bytes]:
    """Name and bytes of one member."""
    extension = extension_of(member)
    if extension == "cls":
        return member, _class(value, column, columns.words)
    if extension == "txt":
        if not isinstance(value, str):
            raise DataError(f"column {column} holds {type(value).__name__}, not text; make it a json")
        return member, value.encode("utf-8", "replace")
    if extension == "json":
        return member, _json(value, column)
    if extension == "npy" and not isinstance(value, bytes | str):
        return member, _npy(value, column)
    data, name = _bytes(value, column, columns.folder or folder)
    if extension == "*":
        extension = sniffed(data) or extension_of(name) or "bin"
        member = member.replace("*", extension)
    if extension in DECODERS and extension not in ("txt", "json", "bin"):
        try:
            decode(extension, data)
        except DataError as error:
            raise DataError(f"column {column}{f', file {name}' if name else ''}: {error}") from None
    return member, data


def _add(fields: dict[str, bytes], name: str, data: bytes, column: str) -> None:
    if name in fields:
        raise DataError(f"two columns make a member {name}, {column} is one; name them apart, such as {column}.{name}")
    fields[name] = data


def _class(value: Any, column: str, words: Mapping[str, int]) -> bytes:
    if words:
        if str(value) in words:
            return b"%d" % words[str(value)]
        raise DataError(f"column {column} holds {value!r}, which is none of the {len(words)} classes")
    number = whole(value)
    if number is None or not -(2**63) <= number < 2**63:
        raise DataError(f"column {column} holds {value!r}, neither a whole number nor one of the classes")
    return b"%d" % number


def whole(value: Any) -> int | None:
    """The whole number that a value is, or that its text says."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        text = value.strip()
        return int(text) if text.removeprefix("-").isdecimal() else None
    return None


def _json(value: Any, column: str) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, default=_plain_value).encode("utf-8", "replace")
    except (TypeError, ValueError) as error:
        raise DataError(f"column {column} cannot be a json: {error}") from error


def _plain_value(value: Any) -> Any:
    """Dates, decimals and the like as the text that they print as; bytes are none of these."""
    if isinstance(value, bytes):
        raise TypeError("it holds bytes")
    return str(value)


def _npy(value: Any, column: str) -> bytes:
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.array(None)
    if array.dtype.kind not in "biuf":
        raise DataError(f"column {column} is no array of numbers, of equal lengths in each direction; make it a json")
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _is_file(value: Any) -> bool:
    """What `datasets` keeps of a picture or a sound: {"bytes": ..., "path": ...}."""
    return isinstance(value, dict) and value.keys() == {"bytes", "path"}


def _bytes(value: Any, column: str, folder: Path) -> tuple[bytes, str]:
    """The bytes that a value is or names, and the name of the file, if there is one."""
    if isinstance(value, bytes):
        return value, ""
    if _is_file(value):
        name = value["path"] or ""
        if value["bytes"] is not None:
            return value["bytes"], name
        value = name
    if not isinstance(value, str) or not value:
        raise DataError(f"column {column} holds {type(value).__name__}, neither bytes nor the path of a file")
    try:
        return (folder / value).read_bytes(), value
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"column {column}: {folder / value} cannot be read ({reason})") from None


def sniffed(data: bytes) -> str | None:
    """The extension that the first bytes say."""
    if data[:4] == b"RIFF":
        return RIFF.get(data[8:12])
    return next((extension for start, extension in STARTS.items() if data.startswith(start)), None)


def _plain(column: str) -> str:
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "_-") else "_" for letter in column)


def distinct(values: Iterator[Any], column: str, most: int = 1 << 16) -> list[str]:
    """The words of a column of classes, in order; none when all are whole numbers."""
    words: set[str] = set()
    numbers = True
    for value in values:
        if value is None:
            continue
        numbers = numbers and whole(value) is not None
        words.add(str(value))
        if not numbers and len(words) > most:
            raise DataError(f"column {column} has more than {most} different words; is it the class? Make it a txt")
    return [] if numbers else sorted(words)
