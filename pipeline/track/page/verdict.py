"""How a run stands, in words: what became of it, and what a person should look at first.

Everything is judged from the journal and the run's lease alone, so it can be said of a folder that was copied from
elsewhere. What it gives up: the limits beyond which something is worth a look are those of this file, for every run.
"""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

import numpy as np

from pipeline.track import summary
from pipeline.track.page.columns import Curve
from pipeline.track.page.reading import Reading
from pipeline.track.page.thin import extremes
from pipeline.track.page.words import duration, number

WAITED = 0.1  # share of the time that may be waited for data
USEFUL = 0.8  # share of the time that should be useful, once a run has run for LONG
LONG = 600.0  # seconds
PAST = 5  # evaluations since the best one
UNEVEN = 1.2  # the slowest rank's own seconds beside the median rank's
RECENT = 200  # steps that tell how long the next will take

TONES = {"done": "good", "training": "plain", "not begun": "plain", "stopped": "warn", "interrupted": "warn"}
LOST = {
    "forward": "forward", "data": "waiting for data", "save": "saving", "evaluation": "evaluation",
    "restore": "reading checkpoints", "start": "starting", "rework": "work that was done twice", "idle": "pauses",
}  # fmt: skip


class Score(NamedTuple):
    """An evaluation metric: its last and best value, and the steps done at the best."""

    name: str
    last: float
    best: float
    step: int


class Verdict(NamedTuple):
    """state: in a word or two.  tone: good, plain, warn or bad.  sentence: all of it.  notes: what to look at."""

    state: str
    tone: str
    sentence: str
    notes: list[str]


def state(reading: Reading, owner: str | None) -> str:
    """training, done, stopped, interrupted, crash loop, refused, given up or not begun. `owner`: lease.owner."""
    if owner:
        return "training"
    if not reading.spans:
        return "not begun"
    told = (record for record in reversed(reading.events) if record["kind"] in ("attempt", "end", "failure"))
    match next(told, {"kind": "attempt"}):
        case {"kind": "end", "reason": "done"} if reading.last_step >= (reading.planned or 0):
            return "done"
        case {"kind": "end", "reason": "done" | "stopped"} | {"kind": "failure", "exit_code": 75}:
            return "stopped"
        case {"kind": "failure", "exit_code": 78}:
            return "refused"
        case {"kind": "failure", "exit_code": int(), "message": message}:
            return "crash loop" if "the same failure" in message else "given up"
    return "interrupted"  # its driver is gone without a word


def scores(reading: Reading) -> list[Score]:
    """The evaluation metrics, the configuration's `evaluate.best` first."""
    section = reading.config.get("evaluate")
    wanted = section if isinstance(section, dict) else {}
    best, mode = wanted.get("best"), str(wanted.get("mode"))
    curves = {name: curve for name, curve in reading.after.items() if name.startswith("eval/") and curve.steps}
    named = sorted(curves, key=lambda name: name != f"eval/{best}")
    return [Score(*summary.last_and_best(name[5:], *_lists(curves[name]), best, mode)) for name in named]


def judge(reading: Reading, owner: str | None) -> Verdict:
    """The verdict on a run as far as it has been read."""
    found = state(reading, owner)
    steps = reading.planned or reading.last_step
    last = reading.spans[-1].outcome if reading.spans else ""
    where = f"step {reading.last_step:,} of {steps:,}"
    sentence = {
        "not begun": "nothing has been recorded yet.",
        "done": f"{reading.last_step:,} steps in {duration(wall_seconds(reading))}.",
        "training": f"{where}{_left(reading, steps)}; by {owner}.",
        "stopped": f"{where} is saved; the same command goes on from there.",
        "interrupted": f"{where}; its driver is gone without a word. The same command goes on.",
        "refused": f"{where}; the configuration has to be mended: {last}",
        "crash loop": f"{where}; {last}",
        "given up": f"{where}; {last}",
    }[found]
    best = scores(reading)[:1]
    if best and best[0].best == best[0].best:
        sentence += f" Best {best[0].name} {number(best[0].best)} at step {best[0].step:,}."
    return Verdict(found, TONES.get(found, "bad"), sentence, list(_notes(reading)))


def wall_seconds(reading: Reading) -> float:
    """Summed over attempts, pauses between them left out."""
    return sum(span.end - span.begin for span in reading.spans)


def waited(reading: Reading) -> float | None:
    """Seconds waited for data per second of step time, on the slowest rank."""
    seconds, waits = (float(np.nansum(reading.done[name].values)) if name in reading.done else 0.0 for name in _TIMES)
    return waits / seconds if seconds else None


def usual(curve: Curve | None) -> float | None:
    """Median of the finite values, None without any."""
    values = np.array(curve.values) if curve else np.empty(0)
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None


_TIMES = ("time/step_seconds", "data/wait_seconds")


def _left(reading: Reading, steps: int) -> str:
    seconds = reading.done.get("time/step_seconds")
    if not seconds or not seconds.values or steps <= reading.last_step:
        return ""
    return f", about {duration((steps - reading.last_step) * median(seconds.values[-RECENT:]))} to go"


def _notes(reading: Reading) -> list[str]:
    notes, counts = [], reading.counts
    if "train/loss" in reading.done and (bad := extremes(*reading.done["train/loss"].arrays()).bad):
        notes.append(f"The loss was not finite at {_many(bad, 'step')}.")
    if reading.last_step and (share := waited(reading) or 0.0) > WAITED:
        notes.append(f"{share:.0%} of the step time went into waiting for data: see data/wait_share.")
    shares = reading.shares()
    if wall_seconds(reading) > LONG and shares.get("useful", 1.0) < USEFUL:
        kind = max((kind for kind in shares if kind != "useful"), key=shares.__getitem__)
        notes.append(
            f"{shares['useful']:.0%} of the time was useful; most of the rest, {shares[kind]:.0%}, went into "
            f"{LOST.get(kind, kind)}."
        )
    for score in scores(reading)[:1]:
        since = sum(step > score.step for step in reading.after[f"eval/{score.name}"].steps)
        if since >= PAST:
            notes.append(
                f"{score.name} was best at step {score.step:,}, {since} evaluations ago; now it is "
                f"{number(score.last)}. Does it fit the training data too closely?"
            )
    survived = [record for record in reading.events if record["kind"] == "failure" and record.get("exit_code") is None]
    if survived:
        reason = str(survived[-1].get("message")).partition("\n")[0]
        notes.append(f"{_many(len(survived), 'attempt')} failed and the run went on; the last: {reason}")
    if told := [_many(counts[kind], what) for kind, what in _COUNTED.items() if counts[kind]]:
        notes.append(f"Events tell of {', '.join(told)}.")
    if slow := _slowest(reading):
        notes.append(slow)
    if reading.damaged:
        notes.append(f"The journal has {_many(reading.damaged, 'damaged line')}, passed over here.")
    return notes


_COUNTED = {
    "skip": "skipped step",
    "spike": "spike",
    "rollback": "roll-back",
    "substitute": "replaced sample",
    "stall": "stalled worker",
    "slow": "slow worker or shard",
    "save_failed": "unwritten checkpoint",
    "upload_failed": "unsent checkpoint",
    "warning": "warning",
}


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count > 1)}"


def _slowest(reading: Reading) -> str | None:
    """Who computes longer than the rest: by the pace of the last steps, else by all forward passes, in which no rank
    waits for another (below ZeRO-3). In all other phases of a step there is a collective, where the fast ones wait.
    """
    seconds = {str(rank): own for rank, own in enumerate(reading.pace.get("compute") or ())}
    seconds = seconds or {rank: float(spent.get("forward") or 0.0) for rank, spent in reading.ranks.items()}
    middle = median(seconds.values()) if len(seconds) > 1 else 0.0
    rank = max(seconds, key=seconds.__getitem__, default=None)
    if rank is None or not middle or seconds[rank] < UNEVEN * middle:
        return None
    return f"Worker {rank} is slow: {seconds[rank] / middle:.2f} times the median worker's time in forward passes."


def _lists(curve: Curve) -> tuple[list[int], list[float]]:
    return list(curve.steps), list(curve.values)
