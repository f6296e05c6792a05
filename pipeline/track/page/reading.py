"""A run's journal folded into what a page needs, while it grows: numbers as arrays, rare records whole.

A million steps are a million records of which a page wants a few curves. So each line is read once, from where the last
look ended, and its numbers go to arrays of 16 bytes a value. When a later attempt goes on from an earlier step, what it
does again is cut off, so that every step stands once, as `journal.lineage` has it. For the ledger of time (goodput.py),
which adds the seconds of steps, one record stands for many.

What it gives up: traceback and other details of rare records are kept in memory, 4,000 characters each.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

try:
    from yaml import CSafeLoader as Loader  # ten times as fast, if PyYAML has it
except ImportError:
    from yaml import SafeLoader as Loader

from pipeline import node
from pipeline.track import goodput, journal
from pipeline.track.page.columns import Curve, Spent

READ_BYTES = 4 << 20  # at a time; other threads look in between
DETAIL = 4000  # characters of a traceback that are kept
EACH_RANK = ("skip", "spike")  # written by each rank, but one of them is enough to count
MOMENTS = 24  # evaluations whose samples are kept, at the most, about evenly
_BEGIN = ("start", "restore", "rollback")  # after whose `step` steps the run goes on
# Kinds that come by the thousand: no events.
NUMBERS = ("step", "evaluation", "samples", "save", "time", "health", "pace", "node")


@dataclass(slots=True)
class Span:
    """One attempt: from when to when it was heard of, its workers, the step it began with, steps done at its end.

    `first` is None and `outcome` "" while nothing has been said of that.
    """

    number: int
    begin: float
    end: float
    workers: int
    last: int
    first: int | None = None
    outcome: str = ""


class Reading:
    """What the journal of the run in `folder` has said so far. `lock` is held by who looks at it while it grows.

    done: curves by name that stand at a step's own number.  after: those that stand at the number of steps done.
    events: rare records in order, texts shortened.  marks: (time, kind, step) of evaluations and saves that count.
    ranks: {rank: {phase: seconds}} of the newest attempt.  pace: its last record of every rank's pace.
    samples: {step, sets} of evaluations that count, from the first to the newest.
    generation: counts what made earlier points invalid.
    damaged: lines that could not be read.  heard: time of the last record.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, threading.RLock()
        self._config: tuple[float, dict[str, Any]] = (-1.0, {})
        self.generation = -1
        self._anew()

    def _anew(self) -> None:
        self.generation += 1
        self.position = self.damaged = self.last_step = 0
        self.done: dict[str, Curve] = {}
        self.after: dict[str, Curve] = {}
        self.spans: list[Span] = []
        self.events: list[dict[str, Any]] = []
        self.marks: list[tuple[float, str, int]] = []
        self.counts: Counter[str] = Counter()
        self.ranks: Mapping[str, Mapping[str, float]] = {}
        self.pace: Mapping[str, Any] = {}
        self.samples: list[dict[str, Any]] = []
        self.heard: float | None = None
        self._ledger: dict[int, list[dict[str, Any] | Spent]] = {}
        self._times: dict[int, Mapping[str, Any]] = {}
        self._shares: tuple[int, dict[str, float]] = (0, {})

    def advance(self, most: int = READ_BYTES) -> bool:
        """Read what has come since, about `most` bytes of it; whether there was any."""
        path = self.folder / "journal.jsonl"
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            size = 0
        if size == self.position:
            return False
        with self.lock:
            if size < self.position:  # another file
                self._anew()
            records, position = journal.since(path, self.position, most)
            for record in records:
                try:
                    if record is None:
                        self.damaged += 1
                    elif not self.spans or record["attempt"] >= self.spans[-1].number:  # else it was superseded
                        self._take(record)
                except (AttributeError, KeyError, TypeError, ValueError):  # whole, but not what its kind should be
                    self.damaged += 1
            moved, self.position = position > self.position, position
        return moved

    def all(self) -> Reading:
        """Read to the end."""
        while self.advance():
            pass
        return self

    def curves(self) -> dict[str, Curve]:
        """All curves by name."""
        return self.done | self.after

    def shares(self) -> dict[str, float]:
        """goodput.shares of the whole journal."""
        if self._shares[0] == self.position:
            return self._shares[1]
        records: list[Mapping[str, Any]] = []
        cuts = sorted({record["step"] for record in self.events if record["kind"] in _BEGIN})
        for span in self.spans:
            number, time = {"attempt": span.number}, self._times.get(span.number)
            records.append({"time": span.begin, "kind": "first"} | number)
            for item in self._ledger[span.number]:
                if isinstance(item, Spent):
                    records += [record | number for record in item.records(cuts, time["time"] if time else -math.inf)]
                else:
                    records.append(item)
            records += [time] if time else []
            records.append({"time": span.end, "kind": "last"} | number)
        self._shares = self.position, goodput.shares(records)
        return self._shares[1]

    @property
    def config(self) -> dict[str, Any]:
        """The run's configuration as it lies in its folder, unchecked: it may be of another version or machine."""
        path = self.folder / "config.yaml"
        try:
            written = path.stat().st_mtime
            if written != self._config[0]:
                found = yaml.load(path.read_text(encoding="utf-8"), Loader)
                self._config = written, found if isinstance(found, dict) else {}
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return self._config[1]

    @property
    def planned(self) -> int | None:
        """Steps of the whole run, as its configuration has them."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) else None

    def _take(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        self.heard = record["time"]
        if kind not in EACH_RANK or record.get("rank", 0) == 0:
            self.counts[kind] += 1
        span = self._span(record)
        if kind == "step":
            own = self._ledger[span.number]
            spent = own[-1] if own else None
            if not isinstance(spent, Spent):
                spent = Spent()
                own.append(spent)
            spent.add(record)
            self.last_step = span.last = record["step"] + 1
        elif kind in _BEGIN:
            span.first = record["step"] if span.first is None else span.first
            self._rewind(record["step"])
        elif kind in ("evaluation", "save"):
            self.marks.append((record["time"], kind, record["step"]))
        elif kind == "samples":
            self._keep(record)
        elif kind == "node":
            record = record | {"step": self.last_step, "metrics": node.metrics(record)}
        elif kind == "time":
            self._times[span.number] = record
            self.ranks = record["ranks"]
        elif kind == "pace":
            self.pace = record
            record = record | {"metrics": _spread(record)}
        elif kind == "end":
            span.outcome = str(record["reason"])
        elif kind == "failure":
            span.outcome = str(record.get("message")).partition("\n")[0]
        if "metrics" in record:
            curves = self.after if kind in ("evaluation", "save") else self.done
            for name, value in record["metrics"].items():
                _curve(curves, name).put(record["step"], value)
        if kind not in NUMBERS:
            self.events.append({key: _short(value) for key, value in record.items()})
            self._ledger[span.number].append(self.events[-1])

    def _keep(self, record: Mapping[str, Any]) -> None:
        sets = {name: [{key: _short(row[key]) for key in row} for row in rows] for name, rows in record["sets"].items()}
        before = [moment for moment in self.samples if moment["step"] < record["step"]]
        self.samples = [*before, {"step": record["step"], "sets": sets}]
        steps = [moment["step"] for moment in self.samples]
        if len(steps) > MOMENTS:  # the one that leaves the smallest gap goes
            del self.samples[min(range(1, MOMENTS), key=lambda place: steps[place + 1] - steps[place - 1])]

    def _span(self, record: Mapping[str, Any]) -> Span:
        """The span of the record's attempt, up to its time."""
        now = record["time"]
        if not self.spans or record["attempt"] != self.spans[-1].number:
            self.spans.append(Span(record["attempt"], now, now, 0, self.last_step))
            self._ledger[record["attempt"]] = []
            self.ranks, self.pace = {}, {}
        span = self.spans[-1]
        span.end = max(span.end, now)
        if record["kind"] == "attempt":
            span.workers = record["workers"]
        return span

    def _rewind(self, step: int) -> None:
        """An attempt goes on after `step` steps: what came later is done again."""
        if self.last_step > step:
            self.generation += 1
        for curve in self.done.values():
            curve.cut(step)
        for curve in self.after.values():
            curve.cut(step + 1)
        self.marks = [mark for mark in self.marks if mark[2] <= step]
        self.samples = [moment for moment in self.samples if moment["step"] <= step]
        self.last_step = self.spans[-1].last = step


def _curve(curves: dict[str, Curve], name: str) -> Curve:
    found = curves.get(name)
    if found is None:
        found = curves[name] = Curve()
    return found


def _spread(pace: Mapping[str, Any]) -> dict[str, float | None]:
    """How far the slowest rank is from the median one: times its computing, and in waiting what share of a step."""
    compute, data = (sorted(pace.get(what) or [0.0]) for what in ("compute", "data"))
    middle, usual = compute[len(compute) // 2], pace.get("seconds")
    return {
        "pace/slowest_compute": compute[-1] / middle if middle else None,
        "pace/slowest_data_share": (data[-1] - data[len(data) // 2]) / usual if usual else None,
    }


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= DETAIL else f"{value[:DETAIL]} ..."
    if isinstance(value, Mapping):
        return {key: _short(entry) for key, entry in value.items()}
    return value
