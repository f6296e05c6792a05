"""W&B's own files: one `.wandb` a start, a *segment* of its run's history. Read, mended, and written in part.

A segment is a LevelDB log with plain crc32: a head of 7 bytes, blocks of 32 KiB, in them parts of type 1 (a whole
record), 2, 3, 4 (its first, middle, last part), each behind crc, length and type; a record is one message of W&B's
protocol. W&B 0.31 has no reader of its own any more. A kill leaves a torn end, at which `wandb sync` stops and leaves
out all later segments; so it is cut off.

It gives up: nothing is kept in memory between two calls, a segment is read anew (14 MB, 10,000 steps, in 2 s).
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_HEAD, _BLOCK, _PART = 7, 32768, struct.Struct("<IHB")
_FOLDER = re.compile(r"(offline-)?run-(\d{8}_\d{6})-(.+)")


class Segment(NamedTuple):
    """What one `.wandb` file holds."""

    path: Path
    identity: str
    """W&B's id of the run that it belongs to."""
    online: bool
    """Whether it was sent while it was written; an offline one waits for `track sync`."""
    sent: bool
    """Whether a sync has marked it as sent."""
    torn: int
    """Bytes behind the last whole record."""
    steps: list[int]
    """`_step` of each row, in order."""
    lost: bool
    """Whether a copy of a table's files is not where W&B put it: sent and removed, or moved with the run's folder."""
    rewound: int | None
    """The last step of the history before it that still counts; None when all does."""

    @property
    def mark(self) -> Path:
        """W&B's own sign beside a file that was sent."""
        return self.path.with_suffix(".wandb.synced")

    @property
    def begun(self) -> Path:
        """Ours, while it is sent: where it stays, the rows may be there and what their tables show not."""
        return self.path.with_suffix(".wandb.begun")


def find(folder: Path, identity: str = "*") -> list[Segment]:
    """The segments of a run folder, of one W&B id or of all, in the order in which they were begun."""
    found = []
    for path in folder.glob(f"wandb/*run-*-{identity}/run-{identity}.wandb"):
        if (name := _FOLDER.fullmatch(path.parent.name)) and not path.parent.is_symlink():
            found.append((name[2], name[3], name[1] is None, path))
    return [_scan(path, which, online) for _, which, online, path in sorted(found)]


def held(segments: Iterable[Segment]) -> int:
    """The last step that these segments of one run hold together; -1 when there is none."""
    last = -1
    for segment in segments:
        if segment.rewound is not None and (segment.steps or not segment.online):
            last = min(last, segment.rewound)
        last = max([last, *segment.steps])
    return last


def cut(segment: Segment) -> Segment:
    """Cut its torn end off. A file without a whole record stays as it is: there is nothing in it."""
    size = segment.path.stat().st_size
    if 0 < segment.torn < size - _HEAD:
        os.truncate(segment.path, size - segment.torn)
        return segment._replace(torn=0)
    return segment


def rows_in(path: Path) -> Iterator[dict[str, str]]:
    """The rows logged into a `.wandb` file, up to its torn end: key to value in JSON."""
    for _, record in _records(path):
        if record.WhichOneof("record_type") == "history":
            yield {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}


def write_part(segment: Segment, steps: Sequence[int], rewind: bool, folder: Path) -> Path:
    """A copy of the segment below `folder` with the rows of these `steps` alone; returns its folder.

    System metrics and console lines are left out: how much of them is there already cannot be asked. `rewind`: whether
    it still asks the server to rewind first. An artifact whose copied files are gone is left out: they have been sent.
    """
    target = folder / segment.path.parent.name
    target.mkdir(parents=True)
    wanted, content = set(steps), bytearray(segment.path.read_bytes()[:_HEAD])
    for payload, record in _records(segment.path):
        kind = record.WhichOneof("record_type")
        if kind in ("stats", "output", "output_raw") or (kind == "history" and _step(record) not in wanted):
            continue
        if kind == "artifact":
            if not _find_copies(record, segment.path.parents[1]):
                continue
            payload = record.SerializeToString()
        if kind == "run" and not rewind:
            record.run.ClearField("branch_point")
            payload = record.SerializeToString()
        _append(content, payload)
    (target / segment.path.name).write_bytes(content)
    if (segment.path.parent / "files").is_dir():
        (target / "files").symlink_to(segment.path.parent / "files")
    return target


def _scan(path: Path, identity: str, online: bool) -> Segment:
    steps: list[int] = []
    content = path.read_bytes()
    rewound, whole, lost = None, _HEAD, False
    for payload, whole in _frames(content):  # noqa: B007
        record = _parse(payload)
        kind = record.WhichOneof("record_type")
        if kind == "history" and (step := _step(record)) is not None:
            steps.append(step)
        elif kind == "run" and record.run.HasField("branch_point"):
            rewound = int(record.run.branch_point.value)
        elif kind == "artifact":
            lost = lost or not all(Path(entry.local_path).is_file() for entry in _copied(record))
    found = Segment(path, identity, online, False, max(0, len(content) - whole), steps, lost, rewound)
    return found._replace(sent=found.mark.exists())


def _copied(record: Any) -> list[Any]:
    """The entries of an artifact's manifest that are copies of files, and no references."""
    return [entry for entry in record.artifact.manifest.contents if entry.local_path and not entry.ref]


def _find_copies(record: Any, folder: Path) -> bool:
    """Whether all copies are there. Those that have moved are looked for below the run's `wandb` folder, and noted."""
    for entry in _copied(record):
        if not Path(entry.local_path).is_file():
            moved = folder / "artifacts" / "staging" / Path(entry.local_path).name
            if not moved.is_file():
                return False
            entry.local_path = str(moved)
    return True


def _step(record: Any) -> int | None:
    found = (item.value_json for item in record.history.item if item.key == "_step" or item.nested_key == ["_step"])
    return next((int(json.loads(value)) for value in found), None)


def _records(path: Path) -> Iterator[tuple[bytes, Any]]:
    return ((payload, _parse(payload)) for payload, _ in _frames(path.read_bytes()))


def _parse(payload: bytes) -> Any:
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
    record.ParseFromString(payload)
    return record


def _frames(content: bytes) -> Iterator[tuple[bytes, int]]:
    """(payload, where it ends) of each whole record, up to the first torn one."""
    if content[:4] != b":W&B":
        return
    position, record = _HEAD, b""
    while position + _PART.size <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _PART.size:
            position += left
            continue
        crc, length, kind = _PART.unpack_from(content, position)
        part = content[position + _PART.size : position + _PART.size + length]
        if kind == 0 or len(part) < length or zlib.crc32(bytes([kind]) + part) != crc:
            return
        position += _PART.size + length
        record = part if kind in (1, 2) else record + part
        if kind in (1, 4):
            yield record, position


def _append(content: bytearray, payload: bytes) -> None:
    """Write one record behind what is there."""
    first, rest = True, memoryview(payload)
    while first or rest:
        left = _BLOCK - len(content) % _BLOCK
        if left < _PART.size:
            content.extend(bytes(left))
            continue
        part, rest = rest[: left - _PART.size], rest[left - _PART.size :]
        kind = (1 if not rest else 2) if first else (4 if not rest else 3)
        content += _PART.pack(zlib.crc32(bytes([kind]) + bytes(part)), len(part), kind) + part
        first = False
