"""A run's state as gauges for Prometheus, through Ray's metrics: each node of a Ray cluster serves them with its own.

Read from the journal's records, in the driver. Ray forgets a gauge that is not set again for some seconds, so all are
set every two. What it gives up: with `workers: 0` there is no Ray, and no gauges.

Names are `ray_millstream_<name>` with the label `run`; k8s/monitoring has a scrape configuration and a dashboard.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from typing import Any

from pipeline.config import Config

SET_SECONDS = 2.0
GAUGES = {
    "step": "steps done",
    "steps": "steps of the whole run",
    "attempt": "number of the attempt",
    "restarts": "attempts after the first, of all commands",
    "workers": "training processes",
    "loss": "mean training loss of the last step",
    "grad_norm": "norm of the gradient before it is clipped, of the last step",
    "learning_rate": "of the last step",
    "samples_per_second": "over all workers, of the last step",
    "step_seconds": "of the last step",
    "data_wait_share": "of the last step's time, spent waiting for samples by the worker that waited longest",
    "skipped_steps": "steps that were not applied",
    "warnings": "in the journal",
    "checkpoint_step": "of the newest checkpoint",
    "checkpoint_age_seconds": "since the newest checkpoint; before the first, since this command",
    "checkpoint_save_seconds": "that the newest checkpoint took",
    "checkpoint_bytes": "of the newest checkpoint",
    "silent_seconds": "since the journal's last record",
}
_OF_STEP = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "optim/lr",
    "samples_per_second": "throughput/samples_per_second",
    "step_seconds": "time/step_seconds",
}
_OF_SAVE = {"checkpoint_save_seconds": "checkpoint/save_seconds", "checkpoint_bytes": "checkpoint/bytes"}


class State:
    """The values as the records have left them; times are those of the records."""

    def __init__(self, steps: int, began: float) -> None:
        self.values: dict[str, float] = {"steps": steps, "skipped_steps": 0, "warnings": 0}
        self.evaluations: dict[str, float] = {}
        self._saved = self._heard = began

    def take(self, record: Mapping[str, Any]) -> None:
        """One record of the journal."""
        values, metrics = self.values, record.get("metrics", {})
        self._heard = max(self._heard, record["time"])
        match record["kind"]:
            case "attempt":
                values |= {"attempt": record["attempt"], "restarts": record["attempt"] - 1}
                values["workers"] = record["workers"]
            case "start" | "restore":
                values["step"] = record["step"]
            case "step":
                values["step"] = record["step"] + 1
                values |= {name: _number(metrics[key]) for name, key in _OF_STEP.items() if key in metrics}
                waited, seconds = metrics.get("data/wait_seconds"), metrics.get("time/step_seconds")
                if waited is not None and seconds:
                    values["data_wait_share"] = min(waited / seconds, 1.0)
            case "evaluation":
                self.evaluations |= {name.removeprefix("eval/"): _number(value) for name, value in metrics.items()}
            case "save":
                values["checkpoint_step"], self._saved = record["step"], record["time"]
                values |= {name: _number(metrics[key]) for name, key in _OF_SAVE.items() if key in metrics}
            case "skip":
                values["skipped_steps"] += 1
            case "warning":
                values["warnings"] += 1

    def at(self, now: float) -> dict[str, float]:
        """All values, with the ages as they are `now` (seconds since the epoch)."""
        ages = {"checkpoint_age_seconds": now - self._saved, "silent_seconds": now - self._heard}
        return self.values | {name: max(age, 0.0) for name, age in ages.items()}


class Gauges:
    """Sets the gauges of one run from `write` to `close`. The process must be connected to Ray."""

    def __init__(self, config: Config) -> None:
        from ray.util.metrics import Gauge

        self._state, self._tags = State(config.steps, time.time()), {"run": config.name}
        self._gauges = {name: Gauge(f"millstream_{name}", said, ("run",)) for name, said in GAUGES.items()}
        self._evaluation = Gauge("millstream_evaluation", "last value of a held-out metric", ("run", "metric"))
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="gauges", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record of the journal; returns at once."""
        with self._lock:
            self._state.take(record)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(SET_SECONDS):
            with self._lock:
                values, evaluations = self._state.at(time.time()), dict(self._state.evaluations)
            for name, value in values.items():
                self._gauges[name].set(value, self._tags)
            for name, value in evaluations.items():
                self._evaluation.set(value, self._tags | {"metric": name})


def _number(value: float | None) -> float:
    return math.nan if value is None else value
