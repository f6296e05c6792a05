"""Tars that are there -> samples again: to shuffle them, to cut them otherwise, to hold some out, to keep a part.

Members keep their names and bytes. A folder with an index is read through it, so that bytes that changed since are
found; one without is scanned. What lies beside the shards and says what is in them (class names, tokenizer) comes
along. What it gives up: the times, owners and modes that a tar keeps of its members.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from xxhash import xxh3_64_intdigest

from pipeline.data import index, segment
from pipeline.data.pack.source import Bad, Item, Source, fingerprint, grouped
from pipeline.data.pack.work import json_bytes, read_json
from pipeline.data.root import ROOT
from pipeline.data.segment import Segment, open_segment, scan_tar
from pipeline.data.storage import Folder, find_shards, map_file
from pipeline.errors import DataError

BESIDE = ("classes.json", "tokenizer.json")
OF_TEXT = ("format", "vocab_size", "length", "eot_id", "lossless")  # what text.json says of any part of the text


@dataclass(frozen=True)
class Chosen:
    """Which samples are taken. keys: a file with a key, as in the tars, a line.  without: take all but those.

    prefix: put the tar's name before its keys, for tars that use the same ones.
    """

    keys: Path | None = None
    without: bool = False
    prefix: bool = False


def tar_source(place: Path, chosen: Chosen) -> Source:
    """The tars of a folder. Raises DataError when there are none, or when the list of keys cannot be read."""
    if place.is_file() and place.suffix == ".tar":
        raise DataError(f"{place} is a file, and folders of tars are packed: {place.parent}")
    there = find_shards(place)
    indexed = (place / ROOT).exists()
    if indexed:
        index.open_index(place)  # says so when tars have changed since
    files = [place / name for name in there]
    lists = [chosen.keys] if chosen.keys else []
    alongside = beside(place)
    if chosen.keys:
        keys_of(chosen.keys)  # says so when there are none
    return Source(
        kind="tars",
        place=place,
        units=grouped(files, [*there.values()]),
        read=partial(_read, chosen, indexed),
        seen=fingerprint([*files, *lists], ["tars", chosen.without, chosen.prefix]),
        twins="put the names of the tars before their keys (--prefix-keys)",
        classes=json.loads(alongside["classes.json"]) if "classes.json" in alongside else None,
        beside=alongside,
        licence=read_json(place / "card.json").get("licence"),
    )


def beside(place: Path) -> dict[str, bytes]:
    """What lies beside the shards and holds for any of their samples."""
    found = {name: (place / name).read_bytes() for name in BESIDE if (place / name).is_file()}
    if facts := read_json(place / "text.json"):
        found["text.json"] = json_bytes({name: facts[name] for name in OF_TEXT if name in facts})
    return found


def keys_of(path: Path) -> frozenset[str]:
    """The keys in a file, one a line. DataError when it cannot be read or holds none."""
    try:
        return _keys(path, path.stat().st_size, path.stat().st_mtime_ns)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a list of keys: {error}") from error


@lru_cache(maxsize=1)  # once in a process, whichever unit is read
def _keys(path: Path, size: int, modified: int) -> frozenset[str]:
    keys = frozenset(filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines())))
    if not keys:
        raise DataError(f"{path} holds no keys; write one a line")
    return keys


def _read(chosen: Chosen, indexed: bool, files: Sequence[Path]) -> Iterator[Item | Bad]:
    wanted = keys_of(chosen.keys) if chosen.keys else None
    for path in files:
        try:
            found = _segment(path, indexed)
            tar = map_file(path)
        except (DataError, OSError) as error:
            yield Bad(path.name, str(error))
            continue
        for row in range(found.samples):
            key = found.key(row)
            if wanted is None or (key in wanted) is not chosen.without:
                item = sample(tar, found, row, path)
                yield item._replace(key=f"{path.stem}/{key}") if chosen.prefix and isinstance(item, Item) else item


def _segment(path: Path, indexed: bool) -> Segment:
    if indexed:
        shards = index.read_root(path.parent).shards
        shard = next(shard for shard in shards if shard.name == path.name)
        return index.read_segment(Folder(path.parent), shard)
    content, _, _ = scan_tar(path)
    return open_segment(memoryview(content), segment.digest(content), str(path), "")


def sample(tar: memoryview, found: Segment, row: int, path: Path) -> Item | Bad:
    """One sample of a tar, its bytes compared with their digests."""
    key, fields = found.key(row), {}
    for name, place in found.sample(row).items():
        data = tar[place.offset : place.offset + place.length]
        if xxh3_64_intdigest(data) != place.digest:
            mend = f"copy the shard again, or leave it out with `millstream data repair {path.parent} OUT`"
            return Bad(f"{path.name}, member {key}.{name}", f"its bytes are not those indexed; {mend}")
        fields[name] = bytes(data)
    label = fields.get("cls", b"").strip()
    return Item(key, fields, label=int(label) if label.isdigit() else -1)
