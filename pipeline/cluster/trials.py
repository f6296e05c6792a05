"""A sweep's runs under Ray Tune: each trial is one process that trains, told apart by its journal alone.

    Tune starts a trial -> `millstream train` in a process of its own -> its journal -> a score -> Tune ends it, or not

What it gives up: Tune sees scores when held-out sets are scored, and nothing in between.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.track import journal

LOOK_SECONDS = 0.5
STOP_SECONDS = 600.0  # that a trial has to finish its step and save
HELD_BYTES = 2**27  # about what the process that follows a run takes
STATE = "sweep"  # folder of Tune's own state, inside the sweep's


class Drawn(NamedTuple):
    """Where a value is drawn from: kind "uniform", "log" or "int", both ends included."""

    kind: str
    low: float
    high: float


class Plan(NamedTuple):
    """A sweep. grid: key -> values.  drawn: key -> range.  samples: draws for each point of the grid."""

    file: Path
    folder: Path
    fixed: tuple[str, ...]
    grid: dict[str, list[str]]
    drawn: dict[str, Drawn]
    samples: int
    parallel: int | None
    early: bool

    @property
    def trials(self) -> int:
        return self.samples * math.prod(len(values) for values in self.grid.values())

    @property
    def points(self) -> dict[str, Any]:
        """What all runs have in common, and where they differ; a sweep that goes on has the same."""
        return {"fixed": self.fixed, "grid": self.grid, "drawn": self.drawn, "samples": self.samples}


def tuner(planned: Plan, first: Config, parallel: int, resume: bool, say: Callable[[str], None]) -> Any:
    """Tune, ready to `fit` the sweep, or to go on with it."""
    # Our journals say it all, and `say` what is worth a line; Tune's new output prints a box whatever `verbose` is.
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search import BasicVariantGenerator

    # A run under Ray asks for its workers' slots itself; what starts it must hold something, and takes no slot.
    held: dict[str, float] = {"memory": HELD_BYTES} if first.cluster.workers else {"CPU": 1}
    trainable = tune.with_resources(_trainable(planned, first), held)
    if resume:
        return tune.Tuner.restore(str(planned.folder / STATE), trainable, resume_unfinished=True, resume_errored=True)
    draw = {"uniform": tune.uniform, "log": tune.loguniform, "int": lambda low, high: tune.randint(low, high + 1)}
    space = {key: tune.grid_search(values) for key, values in planned.grid.items()}
    space |= {key: draw[kind](low, high) for key, (kind, low, high) in planned.drawn.items()}
    asha = ASHAScheduler(
        time_attr="step", max_t=first.steps, grace_period=first.evaluate.every or first.steps, reduction_factor=3
    )
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="score",
            mode=first.evaluate.mode,
            num_samples=planned.samples,
            scheduler=asha if planned.early else None,
            search_alg=BasicVariantGenerator(max_concurrent=parallel, random_state=first.seed),
        ),
        run_config=tune.RunConfig(
            name=STATE, storage_path=str(planned.folder), verbose=0, callbacks=[_teller(planned, say)]
        ),
    )


def _teller(planned: Plan, say: Callable[[str], None]) -> Any:
    """A line for every score and every end of a trial."""
    from ray import tune

    ended = 0

    class Teller(tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            keys = "  ".join(f"{key.rpartition('.')[2]}={shown(value)}" for key, value in trial.config.items())
            say(f"{_number(trial.trial_id)}  {keys}  step {result['step']:,}  {result['score']:.5g}")

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            nonlocal ended
            ended += 1
            say(f"{_number(trial.trial_id)}  ended, {ended} of {planned.trials}")

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            nonlocal ended
            ended += 1
            say(f"{_number(trial.trial_id)}  failed, {ended} of {planned.trials}; see {planned.folder}")

    return Teller()


def _trainable(planned: Plan, first: Config) -> Any:
    """Tune's view of a trial: a process that trains, told apart by its journal alone."""
    from ray import get_runtime_context, tune

    home, workers = Path.cwd(), first.cluster.workers

    class TrialRun(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            name = f"{first.name}-{_number(self.trial_id)}"
            self.journal, self.seen = planned.folder / name / "journal.jsonl", 0
            keys = [*planned.fixed, *(f"{key}={shown(value)}" for key, value in config.items())]
            keys += [f"name={name}", f"runs={planned.folder}", f"track.group={first.track.group or first.name}"]
            where = ["--address", get_runtime_context().gcs_address] if workers else []
            (planned.folder / "logs").mkdir(parents=True, exist_ok=True)
            self.log = planned.folder / "logs" / f"{name}.log"
            with self.log.open("ab") as log:
                command = [sys.executable, "-m", "pipeline", "train", str(planned.file), *keys, *where]
                self.process = subprocess.Popen(command, cwd=home, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

        def step(self) -> dict[str, Any]:
            """Until the next score, or the end."""
            while True:
                over = self.process.poll()  # before the journal is read: nothing is written after it
                found = scores(self.journal, first)
                if len(found) > self.seen:
                    step, score = found[self.seen]
                    self.seen += 1
                    return {"step": step, "score": score, "done": step >= first.steps}
                if over is not None:
                    tail = self.log.read_text(errors="replace")[-2000:]
                    raise RunError(f"the run ended with exit code {over} before its last evaluation:\n{tail}")
                time.sleep(LOOK_SECONDS)

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Nothing: the run's own checkpoints are what a trial goes on from."""

        def load_checkpoint(self, checkpoint: Any) -> None:
            """Nothing, likewise."""

        def cleanup(self) -> None:
            if self.process.poll() is None and not self._ends_by_itself():
                self.process.send_signal(signal.SIGTERM)
            self.process.wait(STOP_SECONDS)

        def _ends_by_itself(self) -> bool:
            found = scores(self.journal, first)
            return bool(found) and found[-1][0] >= first.steps

    return TrialRun


def scores(path: Path, first: Config) -> list[tuple[int, float]]:
    """(step, value) of `evaluate.best` by a run's journal, each step once."""
    if not path.exists():
        return []
    return [*zip(*journal.curve(journal.read(path).records, f"eval/{first.evaluate.best}"))]


def _number(trial_id: str) -> str:
    """Tune's "3f2a1_00007" -> "00007"."""
    return trial_id.rpartition("_")[2]


def shown(value: Any) -> str:
    """As YAML reads it again."""
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
