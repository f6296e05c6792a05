"""Compare tars, byte for byte, with their segments: which members are damaged, and how.

Every field's bytes are digested again; then the headers and the end marker are walked, which training never reads but
every other reader of the tar does. What is left are the zeros that pad members, and what lies outside of samples: those
no reader of samples looks at.

What it gives up: it cannot say which of the two is right, the tar or the index, and it reads everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest

from pipeline.data.index import Index, read_root, read_segment
from pipeline.data.parallel import Mapping
from pipeline.data.root import Shard
from pipeline.data.segment import Segment, split_name
from pipeline.data.storage import Storage
from pipeline.data.tar import members
from pipeline.errors import DataError


class Damage(NamedTuple):
    """Something found wrong.

    shard: the tar's name.  member: None when it is the whole shard.  kind: "missing", "size", "digest" or "header" of a
    tar, "index" of its segment, "new" for what is in no index.  message: what, where, and how to mend it.
    """

    shard: str
    member: str | None
    kind: str
    message: str


class ShardReport(NamedTuple):
    """A shard that was read to its end. bytes: of the tar.  damages: how many were reported before this."""

    shard: str
    samples: int
    bytes: int
    damages: int


def verify(place: Path | str | Storage, mapping: Mapping = map) -> Iterator[Damage | ShardReport]:
    """Read every byte of every shard and compare with the index; each Damage comes before the ShardReport of its shard.

    mapping: who does it, see parallel.py. Raises DataError only when there is no good root to compare with.
    """
    index = read_root(place)
    try:
        yield from _verify(index, mapping)
    finally:
        index.storage.close()


def _verify(index: Index, mapping: Mapping) -> Iterator[Damage | ShardReport]:
    for found, report in mapping(partial(check, index.storage), index.shards):
        yield from found
        yield report
    try:
        there = index.storage.sizes() or {}
    except DataError as error:  # such as a compressed shard beside the others
        yield Damage("", None, "new", str(error))
        return
    for name in sorted(there.keys() - set(index.shards.all_names())):
        mend = f"run `millstream data index {index.storage.place}`"
        yield Damage(name, None, "new", f"{index.storage.place}/{name}: not in the index; {mend}")


def check(storage: Storage, shard: Shard) -> tuple[list[Damage], ShardReport]:
    """All damages of one shard, and its report."""
    found = list(_damages(storage, shard))
    return found, ShardReport(shard.name, shard.samples, shard.bytes, len(found))


def _damages(storage: Storage, shard: Shard) -> Iterator[Damage]:
    place = f"{storage.place}/{shard.name}"
    try:
        tar = storage.map(shard.name)
    except OSError as error:
        yield Damage(shard.name, None, "missing", f"{place}: cannot be read ({error.strerror}); copy it again")
        return
    try:
        segment = read_segment(storage, shard)
    except DataError as error:
        yield Damage(shard.name, None, "index", str(error))
        return
    yield from compare(tar, segment, shard.name, place)


def compare(tar: memoryview, segment: Segment, shard: str, place: str) -> Iterator[Damage]:
    """Every difference of a tar from its segment, in the order of its samples. shard: its name; place: its path."""
    table = segment.table
    offsets, lengths, digests = (table[column].tolist() for column in ("offset", "length", "digest"))
    whole = [offset + length <= len(tar) for offset, length in zip(offsets, lengths)]
    if len(tar) != segment.tar_bytes:
        first = segment.member(whole.index(False)) if False in whole else None
        cut = f"{whole.count(False)} of {len(whole)} members are cut"
        what = f"{place}: had {segment.tar_bytes} bytes when it was indexed, has {len(tar)}; {cut}"
        yield Damage(shard, first, "size", f"{what}; copy it again")
    for i in range(len(table)):
        if whole[i] and xxh3_64_intdigest(tar[offsets[i] : offsets[i] + lengths[i]]) != digests[i]:
            member = segment.member(i)
            what = f"{place}: the {lengths[i]} bytes of member {member}, from byte {offsets[i]}, are not those indexed"
            yield Damage(shard, member, "digest", f"{what}; copy the shard again")
    if len(tar) == segment.tar_bytes:
        yield from _headers(tar, segment, shard, place)


def _headers(tar: memoryview, segment: Segment, shard: str, place: str) -> Iterator[Damage]:
    expected = {offset: i for i, offset in enumerate(segment.table["offset"].tolist())}
    rows = np.repeat(np.arange(segment.samples), np.diff(segment.first_fields)).tolist()
    fields = [segment.names[number] for number in segment.table["name"].tolist()]
    try:
        for name, offset, _ in members(tar, place):
            split = split_name(name)
            if split is None:
                continue
            i = expected.pop(offset, None)
            if i is None or (segment.key(rows[i]), fields[i]) != split:
                noted = None if i is None else segment.member(i)
                what = f"{place}: the tar has {name} at byte {offset}, the index has {noted or 'nothing'} there"
                yield Damage(shard, noted, "header", f"{what}; copy the shard again")
        for offset, i in expected.items():
            what = f"{place}: the index has {segment.member(i)} at byte {offset}, the tar has no such file"
            yield Damage(shard, segment.member(i), "header", f"{what}; copy the shard again")
    except DataError as error:
        unread = segment.member(expected[min(expected)]) if expected else None
        yield Damage(shard, unread, "header", str(error))
