"""What the page is told, as JSON: a row for the list of runs, and all that is shown of one run.

Curves come thinned to a width in steps that the page asks for; from `begin` on, when it has the points before. Numbers
have seven digits, more than a screen shows and as many as fp32 has; one that is not finite is null.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cluster import lease
from pipeline.errors import RunError
from pipeline.track import pictures
from pipeline.track.page import verdict, words
from pipeline.track.page.reading import Reading
from pipeline.track.page.thin import extremes, thin

CURVES = 96  # of one run; further ones (norms of hundreds of layers) are counted, not sent
EVENTS = 500  # the newest
RANKS = 256
MOMENTS = 8  # evaluations whose samples are shown
MARKS = 400  # of a kind on a timeline; no screen shows more
FIRST = ("train/loss", "eval/", "train/", "optim/", "throughput/", "time/", "data/", "pace/", "memory/", "checkpoint/")


def rows(folder: Path) -> list[dict[str, Any]]:
    """The runs in `folder`, the one last heard of first. Raises RunError when there is none."""
    found = [row(path.parent.name, Reading(path.parent).all()) for path in folder.glob("*/config.yaml")]
    if not found:
        raise RunError(f"{folder} holds no runs; `millstream train CONFIG` makes one")
    return sorted(found, key=lambda row: row["heard"] or 0.0, reverse=True)


def row(name: str, reading: Reading) -> dict[str, Any]:
    """A run in a list.

    state: see verdict.state.  owner: who trains it now.  steps: of the whole run.  best: [metric, value, its step].
    useful: share of all workers' time.  speed: samples per second, median.  heard: seconds since 1970.
    """
    with reading.lock:
        owner = lease.owner(reading.folder)
        best = next(iter(verdict.scores(reading)), None)
        loss = reading.done.get("train/loss")
        return {
            "name": name,
            "state": verdict.state(reading, owner),
            "owner": owner,
            "last_step": reading.last_step,
            "steps": reading.planned,
            "loss": _number(loss.values[-1]) if loss and loss.values else None,
            "best": [best.name, _number(best.best), best.step] if best else None,
            "restarts": max(0, len(reading.spans) - 1),
            "useful": _number(reading.shares().get("useful")),
            "speed": _number(verdict.usual(reading.done.get("throughput/samples_per_second"))),
            "heard": reading.heard,
        }


def listed(name: str, reading: Reading, size: int) -> dict[str, Any]:
    """A row for the page. read: share of the journal's `size` bytes that it is about.  version: changes with it."""
    with reading.lock:
        told = row(name, reading)
        version = f"{reading.generation}.{reading.position}.{told['state']}"
        read = round(reading.position / size, 3) if size else 1.0
    return told | {"tone": verdict.TONES.get(told["state"], "bad"), "version": version, "read": read}


def run(
    name: str,
    reading: Reading,
    width: int,
    begin: int = 0,
    generation: int = -1,
    events: int = 0,
    moments: int = MOMENTS,
) -> dict[str, Any]:
    """All that is shown of one run.

    width: steps per point, a power of 2.  begin, events: the page has the points before that step, and so many events,
    if its generation is still right.  moments: evaluations whose samples are told, at the most; the newest is.
    """
    with reading.lock:
        judged = verdict.judge(reading, lease.owner(reading.folder))
        known = generation == reading.generation
        begin = begin // width * width if known else 0
        events = max(events if known else 0, len(reading.events) - EVENTS)
        arrays = {curve_name: curve.arrays() for curve_name, curve in reading.curves().items() if curve.steps}
        arrays |= _waited(arrays)
        names = sorted(arrays, key=_rank)
        told = {
            "name": name,
            "generation": reading.generation,
            "width": width,
            "begin": begin,
            "next": reading.last_step // width * width,
            "last_step": reading.last_step,
            "verdict": judged._asdict(),
            "facts": list(_facts(reading)),
            "attempts": [_span(reading, number) for number in range(len(reading.spans))],
            "marks": _marks(reading),
            "samples": _chosen(reading.samples, min(moments, MOMENTS)),
            "goodput": {kind: _number(share) for kind, share in reading.shares().items()},
            "ranks": dict(_ranks(reading)),
            "events": [_event(record) for record in reading.events[events:]],
            "event_count": len(reading.events),
            "config": dict(_leaves(reading.config)),
            "left_out": max(0, len(names) - CURVES),
        }
    told["curves"] = {name: _curve(*arrays[name], width, begin) for name in names[:CURVES]}
    return told


def text(told: Any) -> str:
    """As JSON that may stand inside a <script> of HTML: no sign there that could end it or begin a comment."""
    plain = json.dumps(told, separators=(",", ":"), allow_nan=False, default=str)
    for sign in "<>&\u2028\u2029":
        plain = plain.replace(sign, f"\\u{ord(sign):04x}")
    return plain


def title(folder: Path, others: Iterable[Path]) -> str:
    """The shortest end of a folder's path that none of the others has."""
    ends = [tuple(reversed(other.parts)) for other in others if other != folder]
    parts = tuple(reversed(folder.parts))
    for length in range(1, len(parts)):
        if all(parts[:length] != end[:length] for end in ends):
            return "/".join(reversed(parts[:length]))
    return str(folder)


def _curve(steps: np.ndarray, values: np.ndarray, width: int, begin: int) -> dict[str, Any]:
    first = int(np.searchsorted(steps, begin))
    points, whole = thin(steps[first:], values[first:], width), extremes(steps, values)
    mean, low, high = map(_numbers, points[1:])
    curve: dict[str, Any] = {"x": points.steps.tolist(), "mean": mean}
    if low != high:
        curve |= {"low": low, "high": high}
    ends = {key: [at[0], _number(at[1])] for key, at in whole._asdict().items() if isinstance(at, tuple)}
    return curve | {"points": whole.points, "bad": whole.bad, **ends}


def _waited(arrays: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The share of each step's time that went into waiting for data."""
    if "time/step_seconds" not in arrays or "data/wait_seconds" not in arrays:
        return {}
    (steps, seconds), (waited_at, waits) = arrays["time/step_seconds"], arrays["data/wait_seconds"]
    both, left, right = np.intersect1d(steps, waited_at, assume_unique=True, return_indices=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"data/wait_share": (both, waits[right] / seconds[left])}


def _facts(reading: Reading) -> Iterable[tuple[str, str]]:
    """(what, value) of the summary."""
    spans, steps = reading.spans, reading.planned
    if spans:
        ran = f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(spans[0].begin))}, {len(spans):,} attempt"
        yield "begun", ran + "s" * (len(spans) > 1)
        yield "time", words.duration(verdict.wall_seconds(reading))
    yield "steps", f"{reading.last_step:,}" + (f" of {steps:,}" if steps else "")
    for score in verdict.scores(reading)[:4]:
        best = "" if math.isnan(score.best) else f" (best {words.number(score.best)} at step {score.step:,})"
        yield score.name, words.number(score.last) + best
    if speed := verdict.usual(reading.done.get("throughput/samples_per_second")):
        yield "speed", f"{words.number(speed)} samples/s"
    if mfu := verdict.usual(reading.done.get("throughput/mfu")):
        yield "model FLOPs utilization", f"{mfu:.1%}"
    if (share := verdict.waited(reading)) is not None:
        yield "waiting for data", f"{share:.1%} of the step time"
    if useful := reading.shares().get("useful"):
        yield "goodput", f"{useful:.1%} of the time of all workers"
    if saved := reading.counts["save"]:
        yield "checkpoints", f"{saved:,} saved"
    began = next((record for record in reading.events if isinstance(record.get("parameters"), int)), None)
    if began:
        yield "network", f"{began['parameters']:,} parameters"


def _span(reading: Reading, number: int) -> dict[str, Any]:
    """An attempt; in its middle, where its steps began."""
    span = reading.spans[number]
    later = number + 1 < len(reading.spans)
    return {
        "number": span.number,
        "begin": span.begin,
        "end": span.end,
        "workers": span.workers,
        "first": span.first,
        "last": span.last,
        "outcome": span.outcome or ("lost without a word" if later else ""),
    }


def _marks(reading: Reading) -> list[tuple[float, str, int | None, str]]:
    """(time, kind, step, text) of what a timeline shows besides the attempts; of many only some, evenly chosen."""
    saves = [(at, kind, step, "") for at, kind, step in reading.marks]
    rare = [
        (record["time"], record["kind"], record.get("step"), words.event(record)[0])
        for record in reading.events
        if record["kind"] in words.TONES
    ]
    chosen: list[tuple[float, str, int | None, str]] = []
    for kind in dict.fromkeys(mark[1] for mark in (*saves, *rare)):
        own = [mark for mark in (*saves, *rare) if mark[1] == kind]
        chosen += own[:: -(-len(own) // MARKS)]
    return sorted(chosen, key=lambda mark: mark[0])


def _chosen(moments: Sequence[Mapping[str, Any]], most: int) -> list[dict[str, Any]]:
    """So many of the moments, evenly chosen, the newest among them; copies."""
    every = -(-len(moments) // most) if moments else 1
    chosen = moments[::-1][::every][::-1]
    return [
        {"step": moment["step"], "sets": {name: [_plain(row) for row in rows] for name, rows in moment["sets"].items()}}
        for moment in chosen
    ]


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as they are written; of what is neither text nor a number, only the name of a picture."""
    told: dict[str, Any] = {}
    for name, value in row.items():
        picture = pictures.name_in(value)
        told[name] = value if value is None or isinstance(value, str | bool | int) else None
        if isinstance(value, float):
            told[name] = _number(value)
        elif isinstance(picture, str):
            told[name] = {"picture": picture}
    return told


def _event(record: Mapping[str, Any]) -> list[Any]:
    line, rest = words.event(record)
    kind = record["kind"]
    return [record["time"], record["attempt"], record.get("step"), kind, words.TONES.get(kind, ""), line, rest]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def _rank(name: str) -> tuple[int, str]:
    """Where a curve stands on the page."""
    return next((place for place, prefix in enumerate(FIRST) if name.startswith(prefix)), len(FIRST)), name


def _ranks(reading: Reading) -> Iterable[tuple[str, dict[str, float | None]]]:
    """(rank, seconds by phase, and a step's own seconds of late); of very many those that compute longest."""
    pace: Mapping[str, Mapping[str, float]] = {
        name: {str(rank): seconds for rank, seconds in enumerate(reading.pace.get(key) or ())}
        for name, key in (("computes", "compute"), ("waits", "data"))
    }
    ranks = [*dict.fromkeys([*reading.ranks, *pace["computes"]])]
    if len(ranks) > RANKS:
        ranks.sort(key=lambda rank: -pace["computes"].get(rank, reading.ranks.get(rank, {}).get("forward") or 0.0))
    for rank in ranks[:RANKS]:
        own = {name: seconds[rank] for name, seconds in pace.items() if rank in seconds}
        yield rank, _rounded({**own, **reading.ranks.get(rank, {})})


def _rounded(spent: Mapping[str, Any]) -> dict[str, float | None]:
    return {phase: _number(seconds) for phase, seconds in spent.items()}


def _numbers(values: np.ndarray) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


def _number(value: float | None) -> float | None:
    return float(f"{value:.7g}") if value is not None and math.isfinite(value) else None
