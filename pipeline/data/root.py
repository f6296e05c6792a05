"""The root of an index: one file, shards.idx, that says which shards a data set has; read in place, never parsed.

Layout, little endian:
    one line of JSON        format, version, identity, shards, samples, bytes; spaces fill it up to a multiple of 64
    RECORD[shards]          samples, bytes of the tar, xxh3_128 of the segment, where the shard's name ends
    names, UTF-8            of the tars, in order, one after the other

`identity` is the sha256 of the table (what follows the line), so it depends on names and contents of the shards and not
on folder, time or machine. Names end where the record says, counted from the first name, so the table of the first k
shards is made of the first k records and the names up to there, and its identity can be had without writing it.

What it gives up: a table is written whole; a shard more is another file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np

from pipeline.errors import DataError

FORMAT, VERSION = "millstream index", 2
ROOT = "shards.idx"
MAGIC = f'{{"format": "{FORMAT}"'.encode()
RECORD = np.dtype([("samples", "<u8"), ("bytes", "<u8"), ("digest", "V16"), ("name_end", "<u8")])
LINE = 64  # bytes; the first line is a multiple of it, so that the records are aligned


class Shard(NamedTuple):
    """One shard. name: of the tar in its folder.  bytes: of the tar.  digest: xxh3_128 of its segment, in hex."""

    name: str
    samples: int
    bytes: int
    digest: str


class Shards(Sequence[Shard]):
    """The table of a root, over mapped bytes: a Shard is made when it is asked for.

    records: RECORD[shards].  names: of all tars, one after the other.
    """

    def __init__(self, records: np.ndarray, names: memoryview) -> None:
        self.records, self.names = records, names
        self.ends = records["name_end"].astype(np.int64)

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, at: int) -> Shard: ...
    @overload
    def __getitem__(self, at: slice) -> list[Shard]: ...
    def __getitem__(self, at: int | slice) -> Shard | list[Shard]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        samples, size, digest, _ = self.records[at].item()
        return Shard(self.name(at), samples, size, digest.hex())

    def name(self, at: int) -> str:
        """Of one tar."""
        at = at + len(self) if at < 0 else at
        begin = int(self.ends[at - 1]) if at else 0
        return str(self.names[begin : int(self.ends[at])], "utf-8", "surrogateescape")

    def all_names(self) -> Iterator[str]:
        """Of all tars, in order; many times faster than asking for each."""
        text, begin = bytes(self.names), 0
        for end in self.ends.tolist():
            yield text[begin:end].decode("utf-8", "surrogateescape")
            begin = end

    def identity(self, shards: int) -> str:
        """Of the table that has only the first `shards` of these."""
        found = hashlib.sha256(b"%d shards\n" % shards)
        found.update(np.ascontiguousarray(self.records[:shards]).view(np.uint8).data)
        found.update(self.names[: int(self.ends[shards - 1]) if shards else 0])
        return found.hexdigest()


def write(shards: Iterable[Shard]) -> bytes:
    """The root of these shards, in their order."""
    table = list(shards)
    names = [shard.name.encode("utf-8", "surrogateescape") for shard in table]
    records = np.zeros(len(table), RECORD)
    records["samples"] = [shard.samples for shard in table]
    records["bytes"] = [shard.bytes for shard in table]
    records["digest"] = [bytes.fromhex(shard.digest) for shard in table]
    records["name_end"] = np.cumsum([len(name) for name in names], dtype=np.int64)
    made = Shards(records, memoryview(b"".join(names)))
    return _line(made, made.identity(len(made))) + records.tobytes() + bytes(made.names)


def read(view: memoryview, place: str, mend: str) -> tuple[Shards, str]:
    """The table and its identity. DataError, with `place` and `mend`, when a single bit is not as it was written."""
    line = bytes(view[:4096]).partition(b"\n")[0] + b"\n"
    try:
        head = json.loads(line)
    except ValueError:
        head = None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise DataError(f"{place}: damaged, or not Millstream's; remove it and {mend}")
    if isinstance(version := head.get("version"), int) and version != VERSION:
        raise DataError(f"{place}: format {version}, this Millstream reads format {VERSION}; {mend}")
    count, first = head.get("shards"), len(line)
    shards = count if isinstance(count, int) else -1
    names = first + shards * RECORD.itemsize
    if first <= names <= len(view):
        table = Shards(np.frombuffer(view, RECORD, shards, first), view[names:])
        end = int(table.ends[-1]) if shards else 0
        identity = table.identity(shards)
        if end == len(table.names) and line == _line(table, identity):
            return table, identity
    raise DataError(f"{place}: damaged or edited, it is not as it was written; {mend}")


def _line(table: Shards, identity: str) -> bytes:
    counts = {name: int(table.records[name].sum()) for name in ("samples", "bytes")}
    head = {"format": FORMAT, "version": VERSION, "identity": identity, "shards": len(table), **counts}
    text = json.dumps(head).encode()
    return text + b" " * (-(len(text) + 1) % LINE) + b"\n"
