"""Tables -> samples, a row each: .csv, .tsv, .jsonl, .parquet, .arrow, and folders written by `datasets`.

rows.py reads them, columns.py says what of a row becomes which member. Keys are those of a column, or the file's name
and the row's number. Classes in words are numbered by the order of the words, which takes a pass over that column.

What it gives up: several splits at once; each is packed by itself, or held out here.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.data.pack.columns import Columns, distinct, members_of
from pipeline.data.pack.rows import DELIMITERS, SUFFIXES, Piece, cut, names_of, rows, unit
from pipeline.data.pack.source import Bad, Item, Source, fingerprint, grouped, plain_keys, unit_bytes
from pipeline.data.pack.work import json_bytes, read_json
from pipeline.data.pack.writer import Progress, silent
from pipeline.errors import DataError

SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # what `datasets` leaves in its folders


def is_table(file: Path) -> bool:
    """Whether a file is a table of columns; a .csv of nothing but numbers is an array of pixels."""
    suffix = file.suffix.lower()
    if suffix not in DELIMITERS:
        return suffix in (".parquet", ".arrow")
    with open(file, encoding="utf-8", errors="replace", newline="") as opened:
        lines = [row for row, _ in zip(csv.reader(opened, delimiter=DELIMITERS[suffix]), range(2))]
    return bool(lines) and not all(_is_number(cell) for cell in lines[-1])


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote this folder."""
    return (folder / SAVED).is_file() or (folder / SAVED_SPLITS).is_file()


def table_files(place: Path) -> list[Path]:
    """The tables of a folder but .jsonl, which may as well be text; the file itself, if it is one."""
    if place.is_file():
        return [place]
    tables = (path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES if path.suffix.lower() != ".jsonl")
    return sorted(path for path in tables if not path.name.startswith(".") and path.is_file())


def table_source(place: Path, columns: Columns, progress: Progress = silent) -> Source:
    """Raises DataError when there is no table, a column is missing, or a file cannot be read."""
    names: list[str] | None = None
    if is_saved(place):
        files, features = _saved(place)
    else:
        files, features = sorted({*table_files(place), *(place.rglob("[!.]*.jsonl") if place.is_dir() else ())}), {}
    if not files or files[0].suffix.lower() not in SUFFIXES:
        raise DataError(f"no tables in {place}; these are read: {' '.join(SUFFIXES)}")
    parts = (path.relative_to(place).with_suffix("").parts if path != place else (path.stem,) for path in files)
    wanted = unit_bytes(sum(path.stat().st_size for path in files))
    pieces: list[Piece] = []
    sizes: list[int] = []
    there: list[str] = []
    for i, (path, key) in enumerate(zip(files, plain_keys(parts))):
        there = names_of(path)
        if path.suffix.lower() != ".jsonl":  # whose lines may differ: each is looked at when it is read
            columns.check(there, str(path))
        for piece, size in cut(path, key, wanted):
            pieces.append(piece)
            sizes.append(size)
        progress("look", i + 1, len(files))
    if labelled := columns.class_column(there):
        names = features.get(labelled) or distinct(_column(pieces, sizes, labelled, progress), labelled)
        if labelled not in features:
            columns = replace(columns, words={word: number for number, word in enumerate(names)})
    return Source(
        kind="table",
        place=place,
        units=grouped(pieces, sizes),
        read=partial(_read, columns),
        seen=fingerprint(files, ["table", columns.members, columns.key, columns.together, columns.folder]),
        what="rows",
        twins="give a column whose values are all different as the key, or none, and rows are numbered",
        classes=names or None,
        beside={"classes.json": json_bytes(names)} if names else {},
    )


def _saved(place: Path) -> tuple[list[Path], dict[str, list[str]]]:
    """The files of a folder that `datasets` wrote, and the names of the classes of columns that have some."""
    if not (place / SAVED).is_file():
        splits = read_json(place / SAVED_SPLITS).get("splits", [])
        each = ", ".join(str(place / split) for split in splits)
        raise DataError(f"{place} holds several data sets; pack each by itself: {each}")
    listed = [entry.get("filename", "") for entry in read_json(place / SAVED).get("_data_files", [])]
    files = [place / name for name in listed]
    if not files or not all(path.is_file() for path in files):
        raise DataError(f"{place / SAVED} tells of files that are not there; copy the whole folder again")

    features = read_json(place / "dataset_info.json").get("features") or {}
    typed = {column: feature for column, feature in features.items() if isinstance(feature, dict)}
    return files, {c: feature["names"] for c, feature in typed.items() if feature.get("_type") == "ClassLabel"}


def _column(pieces: Sequence[Piece], sizes: Sequence[int], column: str, progress: Progress) -> Iterator[Any]:
    """Every value of one column."""
    done = 0
    for piece, size in zip(pieces, sizes):
        try:
            for _, row in rows(piece, [column]):
                yield row.get(column)
        except DataError as error:
            raise DataError(f"{piece.path}: {error}") from error
        done += size
        progress("classes", done, sum(sizes))


def _read(columns: Columns, pieces: Sequence[Piece]) -> Iterator[Item | Bad]:
    for piece in pieces:
        try:
            for number, row in rows(piece, columns.wanted):
                where = f"{piece.path}, {unit(piece)} {number}"
                try:
                    fields = members_of(row, columns, piece.path.parent)
                    key = (
                        f"{piece.key}/{number:09d}" if columns.key is None else _key(row.get(columns.key), columns.key)
                    )
                    name = "" if columns.together is None else _group(row.get(columns.together), columns.together)
                except DataError as error:
                    yield Bad(where, str(error))
                else:
                    label = int(fields["cls"]) if "cls" in fields else -1
                    yield Item(key, fields, name, label)
        except DataError as error:
            yield Bad(str(piece.path), str(error))


def _key(value: Any, column: str) -> str:
    key = "" if value is None else str(value)
    if not key or "." in key.rpartition("/")[2] or key.startswith(("/", "__")) or ".." in key.split("/") or "\0" in key:
        raise DataError(
            f"column {column} holds {key!r}, which cannot be a key: keys have no dot in their last part, "
            "do not begin with / or __, and are not empty"
        )
    return key


def _group(value: Any, column: str) -> str:
    if value is None or value == "":
        raise DataError(f"column {column} is empty; what is held out together needs a value in every row")
    return str(value)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
