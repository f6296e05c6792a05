"""The index of one shard: per sample its key, per field its place, length and digest, in a file that is mapped.

tar -> members (tar.py) -> samples by key -> NAME.tar.idx. Members belong together by WebDataset's rule: the key is the
name up to the first dot of its last part, the rest is the field ("a/0001.seg.png" -> key "a/0001", field "seg.png").
Members of one key need not be neighbours; samples are numbered by where their key comes first. Names without key or
without a dot, and WebDataset's own `__name__` members, are no samples and are left out, as WebDataset does.

Layout, little endian, each part at a multiple of 8 bytes, so that numpy reads the parts in place:
    HEADER                  magic, version, its own size, bytes of the tar, samples, fields, bytes of keys, of the end
    uint32[samples + 1]     first field of each sample
    uint32[samples + 1]     first byte of each key
    FIELD[fields]           offset and length in the tar, xxh3_64 of the bytes, number of the field's name
    int64[samples]          for each field that is kept by value: classes, when every sample has a whole number
    keys, UTF-8
    JSON                    {"fields": names of the fields, "values": those of them that are kept by value}

What it gives up: the times, owners and modes that a tar keeps of its members.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

from pipeline.data.storage import map_file
from pipeline.data.tar import members
from pipeline.errors import DataError

VERSION = 2
MAGIC = b"MILLSEG\0"  # refused when another program's file has the same name
HEADER = struct.Struct("<8sIIQQQQQ8x")
FIELD = np.dtype([("offset", "<u8"), ("length", "<u8"), ("digest", "<u8"), ("name", "<u8")])
RECORD = struct.Struct("<QQQQ")  # FIELD, when only one sample's records are wanted
PAIR = struct.Struct("<II")
META = re.compile(r"__[^/]*__($|/)")
BY_VALUE = "cls"  # last part of the names of fields that are kept by value
LONGEST_NUMBER = 20  # characters of an int64


class Field(NamedTuple):
    """Where the bytes of one field lie in the tar, and their xxh3_64."""

    offset: int
    length: int
    digest: int


@dataclass(frozen=True)
class Segment:
    """A mapped segment: nothing in it changes, so threads share it. What is computed from it is kept.

    view: the whole file.  names: of the fields.  by_value: of those kept by value.
    """

    view: memoryview
    tar_bytes: int
    samples: int
    names: tuple[str, ...]
    by_value: tuple[str, ...]
    starts: tuple[int, ...]  # in bytes: first_fields, key_starts, table, values, keys

    def key(self, row: int) -> str:
        """The key of the sample in this row (from 0)."""
        begin, end = PAIR.unpack_from(self.view, self.starts[1] + 4 * row)
        text = self.starts[4]
        return str(self.view[text + begin : text + end], "utf-8", "surrogateescape")

    def sample(self, row: int) -> dict[str, Field]:
        """The fields of the sample in this row, by name, in the order of the tar."""
        new, table, fields = tuple.__new__, self.starts[2], {}  # `new`: half of the time that Field(...) takes
        if self._alike is not None:
            parts, record = self._alike
            numbers = record.unpack_from(self.view, table + row * record.size)
            for name, part in parts:
                fields[name] = new(Field, numbers[part])
            return fields
        begin, end = PAIR.unpack_from(self.view, self.starts[0] + 4 * row)
        records = self.view[table + begin * RECORD.size : table + end * RECORD.size]
        for *place, name in RECORD.iter_unpack(records):
            fields[self.names[name]] = new(Field, place)
        return fields

    def column(self, field: str) -> np.ndarray:
        """int64[samples]: which record of `table` this field is in each row, -1 where the row has no such field."""
        column = self._columns.get(field)
        if column is None:
            column = self._columns[field] = self._column(field)
        return column

    def values(self, field: str) -> np.ndarray | None:
        """int64[samples]: this field of every row, as decoding it gives it; None when it is not kept by value."""
        if field not in self.by_value:
            return None
        return np.frombuffer(
            self.view, "<i8", self.samples, self.starts[3] + 8 * self.samples * self.by_value.index(field)
        )

    def member(self, field: int) -> str:
        """Key and field name of a record of `table`, as the tar has it but for the case of the field's name."""
        row = int(np.searchsorted(self.first_fields, field, side="right")) - 1
        return f"{self.key(row)}.{self.names[self.table['name'][field]]}"

    @cached_property
    def first_fields(self) -> np.ndarray:
        """uint32[samples + 1]: row r has the fields first_fields[r] to first_fields[r + 1] - 1 of `table`."""
        return np.frombuffer(self.view, "<u4", self.samples + 1, self.starts[0])

    @cached_property
    def table(self) -> np.ndarray:
        """FIELD[fields], all fields of the shard, sample after sample."""
        return np.frombuffer(self.view, FIELD, int(self.first_fields[-1]), self.starts[2])

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        return {}

    @cached_property
    def _alike(self) -> tuple[list[tuple[str, slice]], struct.Struct] | None:
        """How a row reads when all rows have the same fields in one order, None when they do not.

        That is each name with its part of the numbers that the struct unpacks from a row's records.
        """
        if not self.samples or len(self.table) % self.samples:
            return None
        width = len(self.table) // self.samples
        numbers = self.table["name"].reshape(self.samples, width)
        if (np.diff(self.first_fields) != width).any() or (numbers != numbers[0]).any():
            return None
        parts = [(self.names[number], slice(3 * i, 3 * i + 3)) for i, number in enumerate(numbers[0].tolist())]
        return parts, struct.Struct("<" + "QQQ8x" * width)

    def _column(self, field: str) -> np.ndarray:
        names = [name for name, _ in self._alike[0]] if self._alike else []
        if field in names:
            column = np.arange(names.index(field), len(self.table), len(names))
        else:
            column = np.full(self.samples, -1)
            if field in self.names:
                records = np.flatnonzero(self.table["name"] == self.names.index(field))
                column[np.searchsorted(self.first_fields, records, side="right") - 1] = records
        column.flags.writeable = False
        return column


def split_name(member: str) -> tuple[str, str] | None:
    """Key and field of a member by WebDataset's rule, None for a member that is no part of a sample."""
    folder, slash, base = member.rpartition("/")
    stem, dot, field = base.partition(".")
    if not stem or not dot or (member.startswith("__") and META.match(member)):
        return None
    return folder + slash + stem, field.lower()


def digest(segment: bytes | memoryview) -> str:
    """xxh3_128 of a segment, in hex: what the root keeps of it."""
    return xxh3_128_hexdigest(segment)


def scan_tar(path: Path) -> tuple[bytes, int, int]:
    """The segment of one tar, its number of samples, and the tar's size in bytes.

    Raises DataError for what tar.members refuses, two members of one name, and a tar without any sample but with files.
    """
    return scan(map_file(path), str(path))


def scan(tar: memoryview, path: str) -> tuple[bytes, int, int]:
    """`scan_tar` of a tar's bytes; `path` is for messages."""
    rows: dict[str, int] = {}
    names: dict[str, int] = {}
    owners: list[int] = []
    fields: list[tuple[int, int, int, int]] = []
    left_out = ""
    for member, offset, length in members(tar, path):
        split = split_name(member)
        if split is None:
            left_out = left_out or member
            continue
        owners.append(rows.setdefault(split[0], len(rows)))
        name = names.setdefault(split[1], len(names))
        fields.append((offset, length, xxh3_64_intdigest(tar[offset : offset + length]), name))
    if left_out and not rows:
        raise DataError(f"{path}: no member is named KEY.EXTENSION, so there are no samples; the first is {left_out}")
    table = np.array(fields, FIELD) if fields else np.zeros(0, FIELD)
    owner = np.array(owners, np.int64)
    _refuse_twins(owner, table["name"], rows, names, path)
    counts = np.bincount(owner, minlength=len(rows))
    table = table[np.argsort(owner, kind="stable")]
    keys = [key.encode("utf-8", "surrogateescape") for key in rows]
    if sum(map(len, keys)) >= 2**32:
        raise DataError(f"{path}: the names of its members take 4 GiB; split this tar into several")
    by_value = {
        name: values
        for name, number in names.items()
        if name.rpartition(".")[2] == BY_VALUE
        and (values := _whole_numbers(tar, table[table["name"] == number], len(rows))) is not None
    }
    return pack(len(tar), counts, table, keys, list(names), by_value), len(rows), len(tar)


def _whole_numbers(tar: memoryview, records: np.ndarray, samples: int) -> np.ndarray | None:
    """int64[samples]; None when a sample lacks the field, or has something else in it than a whole number."""
    if len(records) != samples or (records["length"] > LONGEST_NUMBER).any():
        return None
    places = zip(records["offset"].tolist(), records["length"].tolist())
    try:
        return np.array([int(bytes(tar[offset : offset + length])) for offset, length in places], np.int64)
    except (ValueError, OverflowError):
        return None


def _refuse_twins(owner: np.ndarray, name: np.ndarray, rows: dict[str, int], names: dict[str, int], path: str) -> None:
    both = np.sort(owner * len(names) + name)
    twins = both[1:][both[1:] == both[:-1]]
    if len(twins):
        row, field = divmod(int(twins[0]), len(names))
        member, times = f"{list(rows)[row]}.{list(names)[field]}", 1 + int((twins == twins[0]).sum())
        mend = "a tar that was added to (`tar -r`, `tar -u`) keeps old and new, write it anew"
        raise DataError(f"{path}: member {member} is there {times} times; {mend}")


def pack(
    tar_bytes: int,
    counts: np.ndarray,
    table: np.ndarray,
    keys: Sequence[bytes],
    names: Sequence[str],
    by_value: Mapping[str, np.ndarray],
) -> bytes:
    """A segment. counts: int64[samples], fields of each.  table: FIELD, sample after sample.  by_value: int64[samples]
    each.
    """
    text = b"".join(keys)
    end = json.dumps({"fields": list(names), "values": list(by_value)}).encode()
    sizes = (tar_bytes, len(counts), len(table), len(text), len(end))
    parts = (
        HEADER.pack(MAGIC, VERSION, HEADER.size, *sizes),
        _edges(counts),
        _edges(np.fromiter(map(len, keys), np.int64, len(keys))),
        table.tobytes(),
        *(values.astype("<i8").tobytes() for values in by_value.values()),
        text,
        end,
    )
    return b"".join(part + bytes(-len(part) % 8) for part in parts)


def _edges(lengths: np.ndarray) -> bytes:
    return np.concatenate([[0], np.cumsum(lengths)]).astype("<u4").tobytes()


def open_segment(view: memoryview, expected_digest: str, place: str, mend: str) -> Segment:
    """The segment in these bytes; DataError, with `place` and `mend`, when it is not the one that the root tells of."""
    if view[: len(MAGIC)] != MAGIC or len(view) < HEADER.size:
        raise DataError(f"{place}: not a part of a Millstream index; {mend}")
    _, version, header, tar_bytes, samples, fields, text, end = HEADER.unpack_from(view)
    if version != VERSION:
        raise DataError(f"{place}: format {version}, this Millstream reads format {VERSION}; {mend}")
    if digest(view) != expected_digest:
        raise DataError(f"{place}: damaged, or older or newer than the root of its index; {mend}")
    edges = _padded(4 * (samples + 1))
    sizes = (edges, edges, fields * FIELD.itemsize)
    last = len(view) - _padded(end)
    names = json.loads(bytes(view[last : last + end]))
    starts = (*accumulate(sizes, initial=header), last - _padded(text))
    return Segment(view, tar_bytes, samples, tuple(names["fields"]), tuple(names["values"]), starts)


def _padded(size: int) -> int:
    return size + -size % 8
