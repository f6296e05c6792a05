"""What can be packed, whatever it is: units of samples, each read by itself, in the same way each time.

A source is made by a look at names and sizes (folders.py, table.py, arrays.py, tars.py). Its units are read later, in
any order and in several threads, processes or machines; so the function that reads them can be pickled, and a unit
carries all that is needed to read it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

UNIT_BYTES = 16 << 20  # about; what is read between two places from which a stopped packing can go on
UNITS = 256  # about, at most: each becomes a file of the spool, and all are open while shards are written

T = TypeVar("T")


class Item(NamedTuple):
    """One sample. fields: {extension: bytes}.  name: what decides who is held out, the key when it is empty.

    label: place in the source's `classes`, -1 without.
    """

    key: str
    fields: Mapping[str, bytes]
    name: str = ""
    label: int = -1


class Bad(NamedTuple):
    """One sample that cannot be packed: where it is, and what is wrong with it."""

    where: str
    why: str


@dataclass(frozen=True)
class Source:
    """kind: a word for the card.  place: the file or folder.  what: its samples are called, such as images.

    units: read one by one by `read`.  classes: their names, when samples have a label.  beside: files that go beside
    the shards.  seen: what tells it from other sources, see `fingerprint`.  samples: how many, None when only reading
    tells.  twins: how to mend keys that are not all different.  licence: that comes with it.
    """

    kind: str
    place: Path
    units: Sequence[Any]
    read: Callable[[Any], Iterator[Item | Bad]]
    seen: str
    what: str = "samples"
    samples: int | None = None
    classes: Sequence[str] | None = None
    beside: Mapping[str, bytes] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    twins: str = "rename one"
    licence: str | None = None


def fingerprint(paths: Iterable[Path], options: Any) -> str:
    """Of files by their names, sizes and times, and of how they are read: another one is another source."""
    found = hashlib.sha256(json.dumps(options, default=str).encode())
    for path in paths:
        stat = path.stat()
        found.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()


def grouped(items: Sequence[T], sizes: Sequence[int]) -> list[list[T]]:
    """Neighbours together, in units of about UNIT_BYTES or more, so that there are not many more than UNITS."""
    wanted = unit_bytes(sum(sizes))
    groups: list[list[T]] = []
    size = wanted
    for item, bytes_ in zip(items, sizes):
        if size >= wanted:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += bytes_
    return groups


def unit_bytes(total: int) -> int:
    """How large the units of a source of `total` bytes are."""
    return max(UNIT_BYTES, total // UNITS)


def plain_keys(names: Iterable[tuple[str, ...]]) -> list[str]:
    """Keys in ASCII that every tar reader takes, without dots, each different from all others.

    Each name's last part may have 80 characters, those before it 60; equal ones get -2, -3, ...
    """
    keys: list[str] = []
    seen: set[str] = set()
    for *folders, last in names:
        parts = [re.sub(r"[^A-Za-z0-9_-]", "_", folder)[:60] for folder in folders]
        key = plain = "/".join([*parts, re.sub(r"[^A-Za-z0-9_-]", "_", last)[:80]])
        again = 2
        while key in seen:
            key, again = f"{plain}-{again}", again + 1
        seen.add(key)
        keys.append(key)
    return keys
