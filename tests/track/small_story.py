"""Made-up runs for tests of the page: folders with a configuration and the journal that such a run would have written.

The journal is written by the real `Journal`; what stands in it is invented, with a clock of its own, so that a run of
hours is there at once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pipeline.track.journal import Journal, Record

BEGAN = 1_700_000_000.0
RANKS = {
    "0": {"start": 8.0, "data": 2.0, "forward": 30.0, "backward": 55.0, "step": 9.0, "evaluation": 4.0, "silent": 0.0},
    "1": {"start": 8.0, "data": 2.0, "forward": 45.0, "backward": 40.0, "step": 9.0, "evaluation": 4.0, "silent": 0.0},
}


def run_folder(folder: Path, steps: int, **changes: Any) -> Path:
    """A run folder with a configuration, and no journal yet."""
    folder.mkdir(parents=True)
    config = {
        "name": folder.name,
        "steps": steps,
        "optim": {"name": "adamw", "lr": 0.001},
        "evaluate": {"best": "test/accuracy", "mode": "max"},
        **changes,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


_NONE: Mapping[str, float | None] = {}


class Story:
    """Writes what happens in a run; `now` is its clock, in seconds since 1970."""

    def __init__(self, folder: Path, seed: int = 0, now: float = BEGAN) -> None:
        self.folder, self.now, self.attempt = folder, now, 0
        self.random = random.Random(seed)

    def begin(self, step: int, workers: int = 2, seconds: float = 8.0) -> None:
        """A new attempt, that goes on after `step` steps."""
        self.attempt += 1
        facts = {"workers": workers, "restarts": self.attempt - 1, "relaunch": self.attempt > 1}
        self.write("attempt", **facts)
        self.now += seconds
        if step:
            self.write("restore", step=step, notes=["not bitwise: workers 2 -> 1"] if workers == 1 else [])
        else:
            self.write("start", step=0, parameters=1_234_567, notes=[], data="5,000 samples", window_bytes=4e6)

    def steps(self, begin: int, end: int, seconds: float = 0.5, metrics: Mapping[str, float | None] = _NONE) -> None:
        """Steps with a loss that falls, evaluated and saved every 100; `metrics` are laid over theirs."""
        written: list[Record] = []
        for step in range(begin, end):
            self.now += seconds
            written.append(self._step(step, seconds) | {"time": round(self.now, 3)})
            written[-1]["metrics"] |= metrics
            if (step + 1) % 100 == 0:
                written += [record | {"time": round(self.now, 3)} for record in self._rest(step + 1)]
        self._write(written)

    def show(self, step: int) -> None:
        """Samples of an evaluation: pictures, of which some are taken for another, and texts."""
        place = self.folder / "samples" / f"{step:08d}"
        place.mkdir(parents=True)
        rows = []
        for number in range(8):
            pixels = [[max(0, 255 - 40 * abs(x - number) - 600 // step * y) for x in range(8)] for y in range(8)]
            Image.fromarray(np.array(pixels, np.uint8)).save(place / f"test-{number}-0.png")
            told = {"label": number, "prediction": number // 3 * 3, "probability": 1 - 50 / step}
            rows.append({"picture": {"picture": f"{step:08d}/test-{number}-0.png"}, **told})
        text = {
            "context": "def f(x):\n    return",
            "continuation": " x +" * (step // 200),
            "truth": " x + 1\n",
            "loss": 0.7,
        }
        self.write("samples", step=step, sets={"test": rows, "prose": [text] * 2})

    def write(self, kind: str, **fields: Any) -> None:
        """One record, a tenth of a second later."""
        self.now += 0.1
        self._write([{"kind": kind, "time": round(self.now, 3), **fields}])

    def _step(self, step: int, seconds: float) -> Record:
        noise = self.random.random()
        metrics: Mapping[str, float] = {
            "train/loss": 2.3 * math.exp(-step / 300) + 0.2 + 0.1 * noise,
            "train/accuracy": 1 - math.exp(-step / 200) * 0.9,
            "train/grad_norm": 1.0 + noise * noise,
            "optim/lr": 1e-3 * min(1.0, (step + 1) / 50),
            "throughput/samples_per_second": 128 / seconds * (0.95 + 0.1 * noise),
            "time/step_seconds": seconds,
            "data/wait_seconds": seconds * 0.02 * noise,
        }
        return {"kind": "step", "step": step, "metrics": dict(metrics), "samples": 1 << 40}

    def _rest(self, done: int) -> list[Record]:
        scores = {"eval/test/accuracy": 1 - math.exp(-done / 200) * 0.9, "eval/test/loss": 0.3 + math.exp(-done / 300)}
        saved = {"checkpoint/bytes": 5e6, "checkpoint/save_seconds": 0.4, "checkpoint/blocked_seconds": 0.02}
        path = f"checkpoint-{done:08d}"
        return [
            {"kind": "evaluation", "step": done, "metrics": scores, "seconds": 0.3},
            {"kind": "save", "step": done, "path": path, "metrics": saved, "removed": []},
        ]

    def _write(self, records: list[Record]) -> None:
        journal = Journal(self.folder / "journal.jsonl", self.attempt)
        journal.write_many(records)
        journal.close()


def killed_once(folder: Path, seed: int = 0) -> Path:
    """600 steps by 2 workers; killed at 350, gone on from 300; a skip, a warning, ranks of unequal speed; done."""
    story = Story(run_folder(folder, 600, seed=seed), seed)
    story.begin(0)
    story.steps(0, 350)
    story.write("time", ranks=RANKS)
    story.write(
        "failure", message="worker 1 was lost in forward of step 350 (killed, or out of memory)", exit_code=None
    )
    story.begin(300)
    story.steps(300, 420)
    story.write("skip", step=420, rank=0, reason="loss or gradient not finite")
    story.steps(420, 421, metrics={"train/loss": None})
    story.steps(421, 600)
    story.write("warning", message="cut a torn line of 20 bytes from the end of journal.jsonl, left by a kill")
    story.write("time", ranks=RANKS)
    story.write("end", reason="done", step=600)
    return folder


def shown(folder: Path) -> Path:
    """A run that has been killed once, with samples at three evaluations, and what its two hosts were doing."""
    killed_once(folder)
    story = Story(folder)
    story.attempt = 2
    for step in (200, 400, 600):
        story.show(step)
    for host in ("n1", "n2"):
        story.write("node", host=host, values={"cpu": 0.5, "memory": 0.25, "disk_free_bytes": 1e12})
    return folder


def crash_loop(folder: Path) -> Path:
    """Three attempts that fail at step 40, and the driver's last word."""
    story = Story(run_folder(folder, 600, optim={"name": "adamw", "lr": 0.1}), 3)
    for number in range(3):
        story.begin(0)
        story.steps(0, 40)
        why = "worker 0, forward of step 40: ValueError: bad sample"
        story.write(
            "error", rank=0, phase="forward", step=40, type="ValueError", message="bad sample", final=False,
            traceback="Traceback (most recent call last):\n  ...\nValueError: bad sample\n", exit_code=1,
        )  # fmt: skip
        given_up = f"giving up, the same failure 3 times: {why}\nTraceback (most recent call last):\n  ..."
        again = f"{why}; going on from the last checkpoint (restart {number + 1} of 5)"
        story.write("failure", message=given_up if number == 2 else again, exit_code=1 if number == 2 else None)
    return folder
