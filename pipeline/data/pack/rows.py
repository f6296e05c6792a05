"""Files of tables -> rows, as Python's values by the name of their column: .csv, .tsv, .jsonl, .parquet, .arrow.

Parquet and arrow are read by pyarrow, which reads what `datasets.save_to_disk` writes too, so that library is not
needed. Values of a .csv are text, as they stand there. Large files are cut at the ends of lines or row groups into
pieces that are read by themselves. Rows are numbered by where they stand (lines from 1, rows of parquet and arrow from
0), so that a file that grows keeps its numbers.

What it gives up: compressed .csv and .jsonl, and other encodings than UTF-8.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import DataError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".arrow")
BATCH_BYTES, BATCH_ROWS = 8 << 20, 4096  # rows that are Python's at a time

csv.field_size_limit(sys.maxsize)


class Piece(NamedTuple):
    """A part of a file. first, last: bytes of text files; row groups of parquet; nothing of arrow.

    key: that rows begin with.  row: number of the first.
    """

    path: Path
    key: str
    first: int = 0
    last: int = 0
    row: int = 0


def names_of(path: Path) -> list[str]:
    """The columns of a file; of a .jsonl those of its first line. Raises DataError when it cannot be read."""
    suffix = path.suffix.lower()
    try:
        if suffix in DELIMITERS:
            with open(path, encoding="utf-8-sig", newline="") as file:
                names = next(csv.reader(file, delimiter=DELIMITERS[suffix], strict=True), None)
        elif suffix == ".jsonl":
            names = next(([*row] for _, row in _json_rows(Piece(path, "", 0, path.stat().st_size))), None)
        elif suffix == ".parquet":
            from pyarrow import parquet

            names = parquet.read_schema(path).names
        else:
            with _arrow(path) as (schema, _):
                names = schema.names
    except (OSError, ValueError, csv.Error, DataError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not names:
        raise DataError(f"{path} is empty")
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise DataError(f"{path} has two columns of one name: {', '.join(twins)}; rename one")
    return names


def unit(piece: Piece) -> str:
    """What the number of a row counts."""
    return "row" if piece.path.suffix.lower() in (".parquet", ".arrow") else "line"


def cut(path: Path, key: str, wanted: int) -> Iterator[tuple[Piece, int]]:
    """A file in pieces of about `wanted` bytes, and the bytes of each."""
    suffix, size = path.suffix.lower(), path.stat().st_size
    if suffix == ".parquet":
        yield from _row_groups(path, key, wanted)
    elif suffix == ".arrow" or size <= wanted:
        yield Piece(path, key, 0, size), size
    else:
        yield from _at_lines(path, key, wanted, quotes=suffix in DELIMITERS)


def _row_groups(path: Path, key: str, wanted: int) -> Iterator[tuple[Piece, int]]:
    from pyarrow import parquet

    metadata = parquet.read_metadata(path)
    first = row = rows_ = size = 0
    for group in range(metadata.num_row_groups):
        found = metadata.row_group(group)
        size, rows_ = size + found.total_byte_size, rows_ + found.num_rows
        if size >= wanted or group == metadata.num_row_groups - 1:
            yield Piece(path, key, first, group + 1, row), size
            first, row, size = group + 1, rows_, 0


def _at_lines(path: Path, key: str, wanted: int, quotes: bool) -> Iterator[tuple[Piece, int]]:
    first = place = row = lines = 0
    quoted = False
    with open(path, "rb") as file:
        for line in file:
            place, lines = place + len(line), lines + 1
            if quotes and line.count(b'"') % 2:
                quoted = not quoted
            if place - first >= wanted and not quoted:
                yield Piece(path, key, first, place, row), place - first
                first, row = place, lines
    if place > first:
        yield Piece(path, key, first, place, row), place - first


def rows(piece: Piece, wanted: list[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, {column: value}) of each row. DataError when the file cannot be read from there on."""
    suffix = piece.path.suffix.lower()
    try:
        if suffix == ".jsonl":
            yield from _json_rows(piece)
        elif suffix in DELIMITERS:
            yield from _csv_rows(piece, DELIMITERS[suffix])
        elif suffix == ".parquet":
            yield from _parquet_rows(piece, wanted)
        else:
            yield from _arrow_rows(piece, wanted)
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors are ValueErrors and OSErrors
        raise DataError(f"cannot be read: {error}") from error


def _json_rows(piece: Piece) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(piece):
        if not line.strip():
            continue
        try:
            row = json.loads(_text(number, line))
        except ValueError as error:
            raise DataError(f"line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"line {number} is {type(row).__name__}, not an object with fields")
        yield number, row


def _csv_rows(piece: Piece, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    names = names_of(piece.path)
    lines = (_text(number, line) for number, line in _lines(piece))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    if not piece.first:
        next(reader)  # the names
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"line {piece.row + reader.line_num}: {error}") from error
        if cells is None:
            return
        number = piece.row + reader.line_num
        if not cells:  # an empty line
            continue
        if len(cells) != len(names):
            raise DataError(f"line {number} has {len(cells)} columns, the first line has {len(names)}")
        yield number, dict(zip(names, cells))


def _text(number: int, line: bytes) -> str:
    try:
        return str(line, "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"line {number} is not UTF-8 ({error.reason} at byte {error.start})") from error


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    with open(piece.path, "rb") as file:
        file.seek(piece.first)
        place = piece.first
        for number in count(piece.row + 1):
            if place >= piece.last or not (line := file.readline()):
                return
            place += len(line)
            yield number, line


def _parquet_rows(piece: Piece, wanted: list[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    from pyarrow import parquet

    with parquet.ParquetFile(piece.path, memory_map=True) as file:
        number = piece.row
        for group in range(piece.first, piece.last):
            found = file.metadata.row_group(group)
            step = _batch_rows(found.total_byte_size, found.num_rows)
            for batch in file.iter_batches(step, [group], wanted):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1


def _arrow_rows(piece: Piece, wanted: list[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    with _arrow(piece.path) as (_, batches):
        for batch in batches:
            chosen = batch if wanted is None else batch.select(wanted)
            step = _batch_rows(batch.nbytes, batch.num_rows)
            for first in range(0, batch.num_rows, step):
                for row in chosen.slice(first, step).to_pylist():
                    yield number, row
                    number += 1


@contextmanager
def _arrow(path: Path) -> Iterator[tuple[Any, Iterator[Any]]]:
    """Schema and batches of a file of either of arrow's two formats."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        try:
            stream = pyarrow.ipc.open_stream(file)
            found = stream.schema, iter(stream)
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(file)
            found = reader.schema, map(reader.get_batch, range(reader.num_record_batches))
        yield found


def _batch_rows(size: int, rows: int) -> int:
    return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(size, 1)))
