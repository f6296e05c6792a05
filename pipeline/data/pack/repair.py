"""A data set without its bad samples: shards that are good are linked, the others written anew, the list is kept.

A sample is bad when a byte of it is not as it was indexed, when one of its fields does not decode, or when its key is
on a list. All others keep their bytes and their order. The result is another data set, with an identity of its own:
`data.train` must name it, and a run that has begun with the old one needs --new-order.

OUT/left_out.json has every sample that is missing, and why. What it gives up: the samples of a shard whose tar is gone,
or of which neither the index nor the headers can be read, are counted but not named. Memory holds a shard for each
process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.data import index, segment
from pipeline.data.damage import compare
from pipeline.data.decode import DECODERS, decode
from pipeline.data.index import Index, read_root, read_segment
from pipeline.data.pack.pieces import piece
from pipeline.data.pack.source import Bad, Item
from pipeline.data.pack.tars import beside, keys_of, sample
from pipeline.data.pack.work import json_bytes, link, read_json, work_folder
from pipeline.data.pack.writer import Progress, build_index, ended, silent
from pipeline.data.parallel import Mapping
from pipeline.data.root import Shard
from pipeline.data.segment import Segment, open_segment, scan_tar
from pipeline.data.storage import Folder, map_file
from pipeline.errors import DataError
from pipeline.whole_file import put, sync

LEFT_OUT = "left_out.json"


class LeftOut(NamedTuple):
    """A sample that is not taken over. key: None for all of a shard's, `samples` of them."""

    shard: str
    key: str | None
    why: str
    samples: int = 1


@dataclass(frozen=True)
class Repaired:
    """identity: of the new data set.  samples: in it.  rewritten: shards that are not those of the old one."""

    folder: Path
    identity: str
    samples: int
    rewritten: int
    left_out: tuple[LeftOut, ...]


def repair(
    folder: Path, out: Path, drop: Path | None = None, mapping: Mapping = map, progress: Progress = silent
) -> Repaired:
    """Write OUT. drop: a file with keys that are left out too, one a line. mapping: see parallel.py.

    Killed on its way, the same call goes on. Raises DataError when `folder` has no good root, `out` exists, or no
    sample is good.
    """
    old = read_root(folder)
    keys = keys_of(drop) if drop else frozenset()
    stats = [path.stat() for path in (Path(old.tar_path(i)) for i in range(len(old.shards))) if path.exists()]
    seen = [[stat.st_size, stat.st_mtime_ns] for stat in stats]
    with work_folder(out, {"repair": old.identity, "drop": sorted(keys), "seen": seen}) as work:
        work_on = partial(_repair, folder, work.out, keys)
        done, found, rewritten = 0, list[LeftOut](), 0
        for shard, (bad, anew) in zip(old.shards, mapping(work_on, old.shards)):
            found += bad
            rewritten += anew
            done += shard.bytes
            progress("repair", done, old.bytes)
        if sum(bad.samples for bad in found) >= old.samples:
            raise DataError(
                f"{folder}: none of its {old.samples} samples is good; bring good copies of its shards back"
            )
        build_index(work.out, mapping, progress)
        new = index.open_index(work.out)
        for name, content in beside(folder).items():
            put(work.out / name, [content])
        put(work.out / LEFT_OUT, [json_bytes([bad._asdict() for bad in found])])
        put(work.out / "card.json", [json_bytes(_card(folder, old, new, found))])
        sync(work.out)
        identity, samples = new.identity, new.samples
    return Repaired(out, identity, samples, rewritten, tuple(found))


def _repair(folder: Path, out: Path, drop: frozenset[str], shard: Shard) -> tuple[list[LeftOut], bool]:
    """Write what is good of one shard: what is not, and whether the shard is another one now."""
    path, target, notes = folder / shard.name, out / shard.name, out.with_name(f"{shard.name}.json")
    if notes.exists():  # it is written last
        bad, anew = json.loads(notes.read_bytes())
        return [LeftOut(*each) for each in bad], anew
    bad, kept = list[LeftOut](), list[bytes]()
    try:
        tar, found = map_file(path), _segment(Folder(folder), shard, path)
    except (OSError, DataError) as error:
        bad.append(LeftOut(shard.name, None, str(error), shard.samples))
        anew = True
    else:
        rows = list(_rows(tar, found, path, drop))
        bad = [row for row in rows if isinstance(row, LeftOut)]
        anew = bool(bad) or any(compare(tar, found, shard.name, str(path)))
        if not anew:
            link(path, target)
        elif len(bad) < len(rows):
            kept = [piece(row.key, row.fields) for row in rows if isinstance(row, Item)]
            put(target, ended(kept))
    put(notes, [json.dumps([bad, anew]).encode()])
    return bad, anew


def _segment(storage: Folder, shard: Shard, path: Path) -> Segment:
    """The index of a shard, or one made anew where that is damaged and the tar is not."""
    try:
        return read_segment(storage, shard)
    except DataError:
        content, _, _ = scan_tar(path)
        return open_segment(memoryview(content), segment.digest(content), str(path), "")


def _rows(tar: memoryview, found: Segment, path: Path, drop: frozenset[str]) -> Iterator[Item | LeftOut]:
    for row in range(found.samples):
        item = sample(tar, found, row, path)
        if isinstance(item, Bad):
            yield LeftOut(path.name, found.key(row), item.why.partition(";")[0])
        elif item.key in drop:
            yield LeftOut(path.name, item.key, "its key is on the list")
        else:
            why = _undecodable(item)
            yield LeftOut(path.name, item.key, why) if why else item


def _undecodable(item: Item) -> str | None:
    for field, data in item.fields.items():
        if field.rpartition(".")[2] in DECODERS:
            try:
                decode(field, data)
            except DataError as error:
                return f"{field}: {error}"
    return None


def _card(folder: Path, old: Index, new: Index, left_out: list[LeftOut]) -> dict[str, object]:
    """The card of the old one, with what is different now."""
    card = {"format": 1, **read_json(folder / "card.json")}
    card["samples"] = new.samples
    if isinstance(classes := card.get("classes"), dict):
        labels = [new.segment(shard).values("cls") for shard in range(len(new.shards))]
        known = np.concatenate([values for values in labels if values is not None] or [np.zeros(0, np.int64)])
        counts = np.bincount(known[(known >= 0) & (known < len(classes))], minlength=len(classes)).tolist()
        card["classes"] = dict(zip(classes, counts))
    card["repaired"] = {"from": old.identity, "left_out": sum(bad.samples for bad in left_out)}
    return card
