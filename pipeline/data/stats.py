"""What is in a data set, in numbers: shards, fields, classes and their balance, and what the fields hold.

Counts, sizes and classes come from the index, over all samples, without reading a tar (from `SEGMENTS` shards, spread
evenly, when there are more). What only the bytes tell (lengths of rows and texts, sizes of pictures) comes from some
samples, spread evenly, and each section says over how many. What it gives up: it checks nothing but the bytes that it
looks into; `millstream data verify` checks all.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import contents
from pipeline.data.index import Index, open_index
from pipeline.data.reader import Dataset
from pipeline.data.segment import BY_VALUE, Segment
from pipeline.data.storage import Storage, beside
from pipeline.errors import DataError
from pipeline.object_store import StoreError

SEGMENTS = 1_000  # read at most
LOOK_BYTES, ASKED = (
    1 << 18,
    64,
)  # of a URL: bytes around a sample that are fetched with it, and samples asked for at once


@dataclass(frozen=True)
class Spread:
    """Of some numbers."""

    count: int
    min: float
    median: float
    mean: float
    max: float
    total: float

    @staticmethod
    def of(numbers: Any) -> Spread:
        """Of at least one number."""
        array = np.asarray(numbers, np.float64)
        middle = (array.min(), np.median(array), array.mean(), array.max(), array.sum())
        return Spread(len(array), *(float(value) for value in middle))


@dataclass(frozen=True)
class FieldStats:
    """One field over the samples that were counted. bytes: of those that have it.  lacking: a key that does not."""

    name: str
    missing: int
    bytes: Spread
    lacking: str | None


@dataclass(frozen=True)
class Content:
    """What a field holds, over the samples that were looked into.

    kinds: such as {"JPEG RGB": 2000}.  unreadable: how many could not be read, and why the first could not.
    """

    name: str
    looked: int
    kinds: dict[str, int]
    measures: dict[str, Spread]
    unreadable: int = 0
    why: str | None = None


@dataclass(frozen=True)
class Stats:
    """A data set in numbers. counted: samples in the shards whose index was read.  classes: samples of each class."""

    folder: str
    identity: str
    samples: int
    bytes: int
    shards: int
    shard_samples: Spread
    shard_bytes: Spread
    counted: int
    fields: list[FieldStats]
    classes: dict[str, dict[int, int]] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    contents: list[Content] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Made of what JSON has."""
        return asdict(self)


Progress = Callable[[str, int, int], None]


def stats(
    folder: Path | str | Storage, looked: int = 2000, progress: Progress = lambda stage, done, total: None
) -> Stats:
    """Count an indexed folder, and look into `looked` of its samples. Raises DataError as open_index does."""
    index = open_index(folder)
    fields, classes, counted = _count(index, progress)
    records = index.shards.records
    names = beside(index.storage, "classes.json")
    return Stats(
        folder=index.place,
        identity=index.identity,
        samples=index.samples,
        bytes=index.bytes,
        shards=len(index.shards),
        shard_samples=Spread.of(records["samples"]),
        shard_bytes=Spread.of(records["bytes"]),
        counted=counted,
        fields=fields,
        classes=classes,
        class_names=[str(name) for name in json.loads(names)] if names else [],
        contents=_look(index, looked, progress),
    )


class _Tally:
    """What is known of one field while segments are read."""

    def __init__(self) -> None:
        self.lengths: list[np.ndarray] = []
        self.samples = 0
        self.lacking: str | None = None
        self.classes: Counter[int] | None = Counter()  # None: not in every segment a whole number


def _count(index: Index, progress: Progress) -> tuple[list[FieldStats], dict[str, dict[int, int]], int]:
    """Fields, classes, and the number of samples that were counted."""
    filled = np.flatnonzero(index.shards.records["samples"])
    numbers = filled[_even(len(filled), SEGMENTS)]
    tallies: dict[str, _Tally] = {}
    counted, first = 0, ""
    for done, number in enumerate(numbers.tolist(), 1):
        segment = index.segment(number)
        for name in segment.names:
            if name not in tallies:
                tallies[name] = _Tally()
                tallies[name].lacking = first or None  # all samples before this one lacked it
        for name, tally in tallies.items():
            _add(tally, segment, name)
        counted, first = counted + segment.samples, first or segment.key(0)
        progress("count", done, len(numbers))
    fields = [
        FieldStats(name, counted - tally.samples, Spread.of(np.concatenate(tally.lengths)), tally.lacking)
        for name, tally in tallies.items()
    ]
    classes = {
        name: dict(sorted(tally.classes.items()))
        for name, tally in tallies.items()
        if name.rpartition(".")[2] == BY_VALUE and tally.classes
    }
    return fields, classes, counted


def _add(tally: _Tally, segment: Segment, name: str) -> None:
    column = segment.column(name)
    there = column >= 0
    tally.lengths.append(segment.table["length"][column[there]])
    tally.samples += int(there.sum())
    if tally.lacking is None and not there.all():
        tally.lacking = segment.key(int(np.argmin(there)))
    values = segment.values(name)
    if values is None:
        tally.classes = None if there.any() else tally.classes
    elif tally.classes is not None:
        tally.classes.update(dict(zip(*(part.tolist() for part in np.unique(values, return_counts=True)))))


class _Seen:
    """What is known of one field while samples are looked into."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.measures: defaultdict[str, list[float]] = defaultdict(list)
        self.unreadable = 0
        self.why: str | None = None

    def add(self, name: str, read: Callable[[], memoryview]) -> None:
        try:
            kind, measures = contents.look(name, read())
        except StoreError:
            raise
        except DataError as error:
            self.unreadable, self.why = self.unreadable + 1, self.why or str(error)
            return
        self.kinds[kind] += 1
        for measure, value in measures.items():
            self.measures[measure].append(value)

    def content(self, name: str) -> Content:
        measures = {measure: Spread.of(values) for measure, values in self.measures.items()}
        looked = self.kinds.total() + self.unreadable
        return Content(name, looked, dict(self.kinds.most_common()), measures, self.unreadable, self.why)


def _look(index: Index, looked: int, progress: Progress) -> list[Content]:
    seen: dict[str, _Seen] = {}
    numbers = _even(index.samples, looked)
    dataset = Dataset(index, block_bytes=LOOK_BYTES)
    try:
        for done, number in enumerate(numbers.tolist(), 1):
            if dataset.remote is not None and done % ASKED == 1:
                dataset.remote.ask_all(numbers[done - 1 : done - 1 + ASKED])
            sample = dataset.sample(number)
            for name in sample.fields:
                if contents.can_look(name):
                    seen.setdefault(name, _Seen()).add(name, partial(sample.raw, name))
            progress("look", done, len(numbers))
    finally:
        dataset.close()
    return [found.content(name) for name, found in seen.items()]


def _even(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` of the numbers 0 to count - 1, at even distances, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64))
