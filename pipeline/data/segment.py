"""The index of one shard: per sample its key, per field its place, length and digest, in a file that is mapped.

tar -> members (tar.py) -> samples by key -> NAME.tar.idx. Members belong together by WebDataset's rule: the key is the
name up to the first dot of its last part, the rest is the field ("a/0001.seg.png" -> key "a/0001", field "seg.png").
Members of one key need not be neighbours; samples are numbered by where their key comes first. Names without key or
without a dot, and WebDataset's own `__name__` members, are no samples and are left out, as WebDataset does.

Layout, little endian, each part at a multiple of 8 bytes, so that numpy reads the parts in place:
    HEADER                  magic, version, its own size, bytes of the tar, samples, fields, bytes of keys
    uint32[samples + 1]     first field of each sample
    uint32[samples + 1]     first byte of each key
    FIELD[fields]           offset and length in the tar, xxh3_64 of the bytes, number of the field's name
    keys, UTF-8; field names, a JSON list

What it gives up: the times, owners and modes that a tar keeps of its members.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

from pipeline.data.tar import members
from pipeline.errors import DataError

VERSION = 1
MAGIC = b"MILLSEG\0"  # refused when another program's file has the same name
HEADER = struct.Struct("<8sIIQQQQ16x")
FIELD = np.dtype([("offset", "<u8"), ("length", "<u8"), ("digest", "<u8"), ("name", "<u8")])
RECORD = struct.Struct("<QQQQ")  # FIELD, when only one sample's records are wanted
PAIR = struct.Struct("<II")
META = re.compile(r"__[^/]*__($|/)")


class Field(NamedTuple):
    """Where the bytes of one field lie in the tar, and their xxh3_64."""

    offset: int
    length: int
    digest: int


@dataclass(frozen=True)
class Segment:
    """A mapped segment: nothing in it changes, so threads share it.

    view: the whole file.  names: of the fields.  owners, keys, fields, text: where the parts begin, in bytes.
    """

    samples: int
    tar_bytes: int
    view: memoryview
    names: tuple[str, ...]
    owners: int
    keys: int
    fields: int
    text: int

    def key(self, row: int) -> str:
        """The key of the sample in this row (from 0)."""
        begin, end = PAIR.unpack_from(self.view, self.keys + 4 * row)
        return str(self.view[self.text + begin : self.text + end], "utf-8", "surrogateescape")

    def sample(self, row: int) -> dict[str, Field]:
        """The fields of the sample in this row, by name, in the order of the tar."""
        begin, end = PAIR.unpack_from(self.view, self.owners + 4 * row)
        size, names = RECORD.size, self.names
        part = self.view[self.fields + begin * size : self.fields + end * size]
        return {names[name]: Field(offset, length, digest) for offset, length, digest, name in RECORD.iter_unpack(part)}

    def member(self, field: int) -> str:
        """Key and field name of a record of `table`, as the tar has it but for the case of the field's name."""
        row = int(np.searchsorted(self.first_fields, field, side="right")) - 1
        return f"{self.key(row)}.{self.names[self.table['name'][field]]}"

    @property
    def first_fields(self) -> np.ndarray:
        """uint32[samples + 1]: row r has the fields first_fields[r] to first_fields[r + 1] - 1 of `table`."""
        return np.frombuffer(self.view, "<u4", self.samples + 1, self.owners)

    @property
    def table(self) -> np.ndarray:
        """FIELD[fields], all fields of the shard, sample after sample."""
        return np.frombuffer(self.view, FIELD, int(self.first_fields[-1]), self.fields)


def split_name(member: str) -> tuple[str, str] | None:
    """Key and field of a member by WebDataset's rule, None for a member that is no part of a sample."""
    folder, slash, base = member.rpartition("/")
    stem, dot, field = base.partition(".")
    if not stem or not dot or (member.startswith("__") and META.match(member)):
        return None
    return folder + slash + stem, field.lower()


def map_file(path: Path) -> memoryview:
    """The bytes of a file, mapped read-only; a file that is cut afterwards ends the process with SIGBUS."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def digest(segment: bytes | memoryview) -> str:
    """xxh3_128 of a segment, in hex: what the root keeps of it."""
    return xxh3_128_hexdigest(segment)


def scan_tar(path: Path) -> tuple[bytes, int, int]:
    """The segment of one tar, its number of samples, and the tar's size in bytes.

    Raises DataError for what tar.members refuses, two members of one name, and a tar without any sample but with files.
    """
    tar = map_file(path)
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
    return _pack(counts, table, list(rows), list(names), len(tar)), len(rows), len(tar)


def _refuse_twins(owner: np.ndarray, name: np.ndarray, rows: dict[str, int], names: dict[str, int], path: Path) -> None:
    both = np.sort(owner * len(names) + name)
    twins = both[1:][both[1:] == both[:-1]]
    if len(twins):
        row, field = divmod(int(twins[0]), len(names))
        member, times = f"{list(rows)[row]}.{list(names)[field]}", 1 + int((twins == twins[0]).sum())
        mend = "a tar that was added to (`tar -r`, `tar -u`) keeps old and new, write it anew"
        raise DataError(f"{path}: member {member} is there {times} times; {mend}")


def _pack(counts: np.ndarray, table: np.ndarray, keys: list[str], names: list[str], tar_bytes: int) -> bytes:
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    text = b"".join(encoded)
    parts = (
        HEADER.pack(MAGIC, VERSION, HEADER.size, tar_bytes, len(keys), len(table), len(text)),
        _starts(counts),
        _starts(np.array([len(key) for key in encoded], np.int64)),
        table.tobytes(),
        text,
        json.dumps(names).encode(),
    )
    return b"".join(part + bytes(-len(part) % 8) for part in parts[:-1]) + parts[-1]


def _starts(lengths: np.ndarray) -> bytes:
    return np.concatenate([[0], np.cumsum(lengths)]).astype("<u4").tobytes()


def open_segment(path: Path, expected_digest: str) -> Segment:
    """Map the segment at `path`; DataError when it is missing or is not the one the root was written with."""
    mend = f"run `millstream data index {path.parent}`"
    try:
        view = map_file(path)
    except FileNotFoundError:
        raise DataError(f"{path}: this part of the index is missing; {mend}") from None
    if view[: len(MAGIC)] != MAGIC:
        raise DataError(f"{path}: not a part of a Millstream index; {mend}")
    if digest(view) != expected_digest:
        raise DataError(f"{path}: damaged, or older or newer than {path.parent / 'index.json'}; {mend}")
    _, version, owners, tar_bytes, samples, fields, text_bytes = HEADER.unpack_from(view)
    if version != VERSION:
        raise DataError(f"{path}: format {version}, this Millstream reads format {VERSION}; {mend}")
    keys = owners + _padded(4 * (samples + 1))
    table = keys + _padded(4 * (samples + 1))
    text = table + fields * RECORD.size
    names = tuple(json.loads(bytes(view[text + _padded(text_bytes) :])))
    return Segment(samples, tar_bytes, view, names, owners, keys, table, text)


def _padded(size: int) -> int:
    return size + -size % 8
