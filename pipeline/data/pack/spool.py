"""Samples on their way to shards: read once, in the order of the source, and written once, in another order.

    units of a source -> one file of pieces (pieces.py) each, with a RECORD a sample -> shards in any order

So a source need not be readable at random, and memory holds a shard for each thread and some 160 bytes for each sample,
whatever the samples are. A file of the spool is whole or absent, and what is there is not read again; its content
follows from the unit alone, so threads, processes and machines, and kills on the way, change nothing.

A shard's pieces are read in the order in which they lie in the spool.

What it gives up: the spool takes as much space as the shards, until they are done.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from xxhash import xxh3_64, xxh3_64_intdigest

from pipeline.data.pack.pieces import piece
from pipeline.data.pack.source import Bad, Item, Source
from pipeline.data.pack.writer import Progress, ended, name_hash
from pipeline.data.parallel import Mapping
from pipeline.data.segment import split_name
from pipeline.errors import DataError
from pipeline.whole_file import put

RECORD = np.dtype([("bytes", "<u8"), ("key", "<u8"), ("name", "<u8"), ("content", "<u8"), ("label", "<i8")])
BUFFER_BYTES = 1 << 20
SHOWN = 10  # bad samples in a message


class Part(NamedTuple):
    """One file of the spool. bad: samples that could not be read, (where, why) each."""

    path: Path
    samples: int
    bad: list[tuple[str, str]]


class Spool:
    """All samples of a source, in its order. records: RECORD[n].

    Sample i's piece is bytes [begins[i], begins[i] + bytes) of file parts[part_of[i]]. The files are open until it is
    closed; they are not mapped, since what is mapped counts as memory of the process.
    """

    def __init__(self, parts: list[Part]) -> None:
        self.parts = [part for part in parts if part.samples]
        columns = [np.load(_records(part.path), allow_pickle=False) for part in self.parts]
        self.records = np.concatenate(columns)
        self.part_of = np.repeat(np.arange(len(columns), dtype=np.int32), [len(column) for column in columns])
        sizes = [column["bytes"].astype(np.int64) for column in columns]
        self.begins = np.concatenate([np.cumsum(size) - size for size in sizes])
        self._files = [os.open(part.path, os.O_RDONLY | os.O_CLOEXEC) for part in self.parts]

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def __len__(self) -> int:
        return len(self.records)

    def tar(self, numbers: np.ndarray) -> bytearray:
        """A whole tar of the samples int64[k], in their order."""
        sizes = self.records["bytes"][numbers].astype(np.int64)
        ends = np.cumsum(sizes)
        parts, begins = self.part_of[numbers], self.begins[numbers]
        tar = bytearray(int(ends[-1]))
        view = memoryview(tar)
        there = np.lexsort((begins, parts))
        columns = (column[there].tolist() for column in (parts, begins, sizes, ends))
        for part, begin, size, at in zip(*columns):
            while size:
                read = os.preadv(self._files[part], [view[at - size : at]], begin)
                if not read:
                    raise DataError(f"{self.parts[part].path} was cut while it was read; pack again")
                size, begin = size - read, begin + read
        return tar

    def key(self, number: int) -> str:
        """Of one sample, from its first header."""
        begin = int(self.begins[number])
        header = os.pread(self._files[self.part_of[number]], 512, begin)
        name, prefix = (header[a:b].partition(b"\0")[0].decode("utf-8", "replace") for a, b in ((0, 100), (345, 500)))
        member = f"{prefix}/{name}" if prefix else name
        return (split_name(member) or (member,))[0]


def gather(source: Source, folder: Path, mapping: Mapping, progress: Progress) -> Spool:
    """Read every unit that is not in `folder` yet. Raises DataError naming the samples that are bad. To be closed."""
    folder.mkdir(exist_ok=True)
    work = ((source.read, unit, folder / f"{number:06d}") for number, unit in enumerate(source.units))
    parts: list[Part] = []
    done, total = 0, source.samples if source.samples is not None else len(source.units)
    for part in mapping(_gather, work):
        parts.append(part)
        done += part.samples + len(part.bad) if source.samples is not None else 1
        progress("read", done, total)
    bad = [f"{where}: {why}" for part in parts for where, why in part.bad]
    if bad:
        listed = "\n  ".join(bad[:SHOWN] + ([f"and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []))
        total = sum(part.samples for part in parts) + len(bad)
        raise DataError(
            f"{len(bad)} of {total} {source.what} in {source.place} are bad; mend or remove them:\n  {listed}"
        )
    if not sum(part.samples for part in parts):
        raise DataError(f"{source.place} holds no {source.what}, nothing is left to pack")
    spool = Spool(parts)
    try:
        _refuse_twins(spool, source)
    except DataError:
        spool.close()
        raise
    return spool


def _gather(work: tuple[Callable[[object], Iterator[Item | Bad]], object, Path]) -> Part:
    """Read one unit into a file, or find that it is there."""
    read, unit, path = work
    notes = path.with_suffix(".json")
    if not notes.exists():  # it is written last
        records: list[tuple[int, int, int, int, int]] = []
        bad: list[Bad] = []
        put(path, _pieces(read(unit), records, bad))
        put(_records(path), [_npy(np.array(records, RECORD))])
        put(notes, [json.dumps([len(records), bad]).encode()])
    samples, bad = json.loads(notes.read_bytes())
    return Part(path, samples, [(where, why) for where, why in bad])


def _pieces(
    items: Iterator[Item | Bad], records: list[tuple[int, int, int, int, int]], bad: list[Bad]
) -> Iterator[bytes]:
    buffer = bytearray()
    for item in items:
        if isinstance(item, Bad):
            bad.append(item)
            continue
        try:
            made = piece(item.key, item.fields)
        except DataError as error:
            bad.append(Bad(f"{item.key[:40]}...", str(error)))
            continue
        content = xxh3_64()
        for extension, data in item.fields.items():
            if extension != "cls":
                content.update(data)
        if item.fields.keys() == {"cls"}:  # no content by which samples could be the same
            content.update(item.key.encode("utf-8", "surrogateescape"))
        key, name = xxh3_64_intdigest(item.key.encode("utf-8", "surrogateescape")), name_hash(item.name or item.key)
        records.append((len(made), key, name, content.intdigest(), item.label))
        buffer += made
        if len(buffer) >= BUFFER_BYTES:
            yield bytes(buffer)
            buffer.clear()
    yield bytes(buffer)


def write(spool: Spool, shards: list[tuple[Path, np.ndarray]], mapping: Mapping) -> Iterator[int]:
    """Write (path, samples int64[k]) each, but those that are there; yields how many samples each has."""
    return mapping(partial(_write, spool), shards)


def _write(spool: Spool, shard: tuple[Path, np.ndarray]) -> int:
    path, numbers = shard
    if not path.exists():
        put(path, ended([spool.tar(numbers)]))
    return len(numbers)


def _refuse_twins(spool: Spool, source: Source) -> None:
    keys = spool.records["key"]
    order = np.argsort(keys, kind="stable")
    alike = np.flatnonzero(keys[order][1:] == keys[order][:-1]).tolist()  # in 64 bits of them
    twins = [key for i in alike if (key := spool.key(int(order[i]))) == spool.key(int(order[i + 1]))]
    if twins:
        raise DataError(
            f"{source.place}: {len(twins)} {source.what} have the key of another, such as {twins[0]}; {source.twins}"
        )


def _records(path: Path) -> Path:
    return path.with_suffix(".npy")


def _npy(records: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, records, allow_pickle=False)
    return file.getvalue()
