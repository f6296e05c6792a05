"""The journal: what happened in a run, one JSON object a line, each with a checksum of its own.

One `Journal` writes, any number of readers read the same file while it grows: `read` all of it, `follow` it live, go
on where one stopped (`since`), the `curve` of one metric. A line is written whole by one system call and is lost only
with the machine; `sync` waits until it cannot be lost even then. A kill can tear the last line: the next writer cuts it
and says so, readers pass over it. A line that is damaged in the middle is passed over and named.

    {"v":1,"attempt":1,"seq":17,"time":1700000000.1,"kind":"step","step":3,"metrics":{"train/loss":2.3},"crc":"8 hex"}

Kinds and keys stand in schema.py. `seq` counts all lines of the file. `time` is for people; order never follows from
it. A number that is not finite is written as null, since JSON has none. It gives up compactness (about 400 bytes a
step) for being readable by anything.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json  # a quarter of the time of `json.loads` on bytes

from pipeline.errors import RunError

VERSION = 1
HEAD = ("v", "attempt", "seq", "time")  # what the journal itself puts before a record
POLL_SECONDS = 0.1
_CRC = b',"crc":"'
_TAIL = len(_CRC) + len('01234567"}')

Record = dict[str, Any]


class Journal:
    """The only writer of a run's journal during one attempt. Threads may share it.

    Opening cuts a torn last line and records that as a `warning`. Raises RunError when the file cannot be written; a
    batch that fails half way is taken back, so the file never holds a torn line that is not the last.
    """

    def __init__(self, path: Path, attempt: int) -> None:
        self.path, self.attempt = path, attempt
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _not_written(path, error) from error
        self._size, self._seq, self.torn_bytes = _good_end(self._file)
        if self.torn_bytes:
            os.ftruncate(self._file, self._size)
            message = f"cut a torn line of {self.torn_bytes} bytes from the end of {path.name}, left by a kill"
            self.write({"kind": "warning", "message": message})

    @property
    def position(self) -> dict[str, int]:
        """Attempt and sequence number of the last record written, as a checkpoint's manifest holds them."""
        return {"attempt": self.attempt, "seq": self._seq}

    def write(self, record: Mapping[str, Any]) -> int:
        """Append one record; returns its sequence number. It has its `kind` and may bring its own `time`."""
        return self.write_many([record])

    def write_many(self, records: Iterable[Mapping[str, Any]]) -> int:
        """Append records by one system call; returns the last sequence number."""
        with self._lock:
            seq, lines = self._seq, []
            for record in records:
                seq += 1
                head = {"v": VERSION, "attempt": self.attempt, "seq": seq, "time": round(time.time(), 3)}
                lines.append(_line(head | dict(record)))
            self._append(b"".join(lines))
            self._seq = seq
            return seq

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise _not_written(self.path, error) from error

    def close(self) -> None:
        """Sync and close; a second time does nothing."""
        with self._lock:
            if self._file >= 0:
                self.sync()
                os.close(self._file)
                self._file = -1

    def _append(self, content: bytes) -> None:
        try:
            written = os.write(self._file, content)
            while written < len(content):  # a nearly full disk takes a part; the next call tells the reason
                written += os.write(self._file, content[written:])
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise _not_written(self.path, error) from error
        self._size += len(content)


class Reading(NamedTuple):
    """The records of a journal in order, and one sentence for each damaged line that was passed over."""

    records: list[Record]
    problems: list[str]


def as_read(record: Mapping[str, Any]) -> Record:
    """The record as `read` gives it back: numbers of numpy as Python's, what is not finite as None."""
    return _record(_line(dict(record)).rstrip(b"\n")) or {}


def read(path: Path) -> Reading:
    """All records; none when there is no file yet. A torn last line is normal and passed over without a word."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return Reading([], [])
    records, problems = [], []
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline: nothing, or a torn line
        record = _record(line)
        if record is None:
            problems.append(f"{path}:{number}: damaged line of {len(line)} bytes passed over")
        else:
            records.append(record)
    return Reading(records, problems)


def since(path: Path, position: int, most: int = -1) -> tuple[list[Record | None], int]:
    """The lines that stand whole behind a byte position, about `most` bytes of them, and the position behind those.

    A damaged line is None. A line that is just being written comes with the next call; should it be torn, the next
    writer cuts it. Nothing, at the same position, when there is no file.
    """
    try:
        with path.open("rb") as file:
            file.seek(position)
            lines = file.readlines(most)
    except FileNotFoundError:
        return [], position
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    return [_record(line[:-1]) for line in lines], position + sum(map(len, lines))


def follow(path: Path, stop: threading.Event) -> Iterator[Record]:
    """Records as they come, from the first one on; ends once `stop` is set and all that had been written is out."""
    position = 0
    while True:
        stopping = stop.is_set()  # before reading: what was written before the stop still comes
        found, position = since(path, position)
        yield from (record for record in found if record is not None)
        if stopping:
            return
        stop.wait(POLL_SECONDS)


def lineage(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records that count: without the steps that a later attempt did again, from a checkpoint or from the start,
    and those that a run has gone back to before.
    """
    kept: list[Mapping[str, Any]] = []
    newest = 0
    for record in records:
        if record["attempt"] < newest:
            continue
        newest = record["attempt"]
        if record["kind"] in ("start", "restore", "rollback"):
            kept = [earlier for earlier in kept if not _undone(earlier, record["step"])]
        kept.append(record)
    return kept


def curve(records: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric: one value a step, rising, the latest attempt's. What was not finite is nan.

    Step k's own metrics stand at k (the first is 0); those of evaluations and saves at the number of steps done.
    """
    points = {
        record["step"]: record["metrics"][name] for record in lineage(records) if name in record.get("metrics", ())
    }
    steps = sorted(points)
    return steps, [math.nan if points[step] is None else float(points[step]) for step in steps]


def _undone(record: Mapping[str, Any], step: int) -> bool:
    """Whether going on after `step` steps does again what the record is about."""
    if record["kind"] in ("step", "skip", "spike", "left_out", "health"):
        return record["step"] >= step
    return record["kind"] in ("evaluation", "samples", "save", "restore", "end") and record["step"] > step


def _line(record: Record) -> bytes:
    try:
        text = json.dumps(record, separators=(",", ":"), allow_nan=False, default=_plain)
    except ValueError:  # rare: a number that is not finite
        text = json.dumps(_finite(record), separators=(",", ":"), default=_plain)
    body = text[:-1].encode()
    return body + _CRC + b"%08x" % zlib.crc32(body) + b'"}\n'


def _record(line: bytes) -> Record | None:
    """The record of a whole, undamaged line."""
    body, end = line[:-_TAIL], line[-_TAIL:]
    if end != _CRC + b"%08x" % zlib.crc32(body) + b'"}':
        return None
    return from_json(body + b"}")


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as Python's; the rest as text, so that no record fails."""
    return _finite(value.tolist()) if hasattr(value, "tolist") else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value


def _good_end(file: int) -> tuple[int, int, int]:
    """(bytes up to the last newline, sequence number of the last good line, bytes after the last newline)."""
    size = os.fstat(file).st_size
    span = 1 << 16
    while True:
        start = max(0, size - span)
        content = os.pread(file, size - start, start)
        end = content.rfind(b"\n") + 1
        lines = content[:end].split(b"\n")[0 if start == 0 else 1 :]  # the first may have begun before `start`
        seq = next((record["seq"] for line in reversed(lines) if (record := _record(line)) is not None), 0)
        if start == 0 or (end and seq):
            return start + end, seq, len(content) - end
        span *= 16


def _not_written(path: Path, error: OSError) -> RunError:
    return RunError(
        f"the journal cannot be written: {path}: {error.strerror or error}. Nothing is trained without a record: "
        "free some space or mend the permissions and run the same command again; it goes on from the last checkpoint."
    )
