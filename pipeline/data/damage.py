"""Compare one tar, byte for byte, with its segment: which members are damaged, and how.

Every field's bytes are digested again; then the headers and the end marker are walked, which training never reads but
every other reader of the tar does. What is left are the zeros that pad members, and those no reader looks at.

What it gives up: it cannot say which of the two is right, the tar or the index, and it reads everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from pipeline.data.segment import Segment, map_file, split_name
from pipeline.data.tar import members
from pipeline.errors import DataError


class Damage(NamedTuple):
    """Something found wrong.

    shard: the tar's name.  member: None when it is the whole shard.  kind: "missing", "size", "digest" or "header" of a
    tar, "index" of its segment, "new" for a tar that is in no index.  message: what, where, and how to mend it.
    """

    shard: str
    member: str | None
    kind: str
    message: str


def compare(path: Path, segment: Segment) -> Iterator[Damage]:
    """Every difference between the tar at `path` and its segment, in the order of its samples."""
    tar, table = map_file(path), segment.table
    offsets, lengths, digests = (table[column].tolist() for column in ("offset", "length", "digest"))
    whole = [offset + length <= len(tar) for offset, length in zip(offsets, lengths)]
    if len(tar) != segment.tar_bytes:
        first = segment.member(whole.index(False)) if False in whole else None
        cut = f"{whole.count(False)} of {len(whole)} members are cut"
        what = f"{path}: had {segment.tar_bytes} bytes when it was indexed, has {len(tar)}; {cut}"
        yield Damage(path.name, first, "size", f"{what}; copy it again")
    for i in range(len(table)):
        if whole[i] and xxh3_64_intdigest(tar[offsets[i] : offsets[i] + lengths[i]]) != digests[i]:
            member = segment.member(i)
            what = f"{path}: the {lengths[i]} bytes of member {member}, from byte {offsets[i]}, are not those indexed"
            yield Damage(path.name, member, "digest", f"{what}; copy the shard again")
    if len(tar) == segment.tar_bytes:
        yield from _headers(path, tar, segment)


def _headers(path: Path, tar: memoryview, segment: Segment) -> Iterator[Damage]:
    expected = {offset: i for i, offset in enumerate(segment.table["offset"].tolist())}
    try:
        for name, offset, _ in members(tar, path):
            split = split_name(name)
            if split is None:
                continue
            noted = segment.member(expected.pop(offset)) if offset in expected else None
            if noted != ".".join(split):
                what = f"{path}: the tar has {name} at byte {offset}, the index has {noted or 'nothing'} there"
                yield Damage(path.name, noted, "header", f"{what}; copy the shard again")
    except DataError as error:
        unread = segment.member(expected[min(expected)]) if expected else None
        yield Damage(path.name, unread, "header", str(error))
