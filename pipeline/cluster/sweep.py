"""One run for each point of a grid, or for points drawn at random, by Ray Tune; the weak ones ended early.

    KEY=V1,V2,V3          each value: the grid is the product of all such keys
    KEY=uniform(A,B)      drawn evenly from A to B; log(A,B): evenly in the logarithm; int(A,B): whole numbers
    KEY=VALUE             for all runs

Every trial is a run like any other: a folder of its own below the sweep's, a process of its own that is
`millstream train`, its name in W&B's group of the sweep. Tune only says which trials run and which are ended, by what
their journals say of `evaluate.best`. Early stopping is ASHA (Li et al. 2020, arXiv 1810.05934): at 1, 3, 9 ... times
the steps of an evaluation the better third goes on. An ended trial has committed a checkpoint and can be resumed by
itself. What it gives up: searches that learn from earlier trials; Tune has them, a run's file has not.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from pipeline import config as configs
from pipeline.cluster import ray, trials
from pipeline.cluster.trials import STATE, Plan, scores, shown
from pipeline.config import Config
from pipeline.errors import ConfigError, RunError
from pipeline.submit import config_lint
from pipeline.track import journal
from pipeline.yaml_file import Loader

DRAWN = re.compile(r"(uniform|log|int)\(([^,()]+),([^,()]+)\)")
MOST_TRIALS = 10_000


class Words(NamedTuple):
    """What is said of a sweep. fixed: KEY=VALUE for all runs.  grid: key -> values.  drawn: key -> range."""

    fixed: tuple[str, ...]
    grid: dict[str, list[str]]
    drawn: dict[str, trials.Drawn]


class Trial(NamedTuple):
    """What became of one: its run folder, its keys, the best score and its step, "done", "ended early" or "failed"."""

    folder: Path
    keys: dict[str, str]
    best: float | None
    step: int
    state: str


def read(overrides: Sequence[str]) -> Words:
    """The words of a sweep, told apart. Raises ConfigError for a range that is none."""
    fixed, grid, drawn = [], {}, {}
    for text in overrides:
        key, _, value = text.partition("=")
        if found := DRAWN.fullmatch(value.replace(" ", "")):
            drawn[key] = _range(key, *found.groups())
        elif len(values := _several(value)) > 1:
            grid[key] = values
        else:
            fixed.append(text)
    return Words(tuple(fixed), grid, drawn)


def plan(
    file: Path, overrides: Sequence[str], samples: int = 1, parallel: int | None = None, early: bool = False
) -> tuple[Plan, Config]:
    """The sweep that the overrides describe, every run of it checked; and the configuration of the first.

    Raises ConfigError with all that is wrong at any point of the grid, or either end of a range.
    """
    fixed, grid, drawn = read(overrides)
    if not grid and not drawn:
        raise ConfigError("nothing to sweep over: give a key several values, KEY=V1,V2, or a range, KEY=log(1e-5,1e-2)")
    if samples > 1 and not drawn:
        raise ConfigError("--samples draws from ranges, and no key has one: KEY=uniform(A,B), log(A,B) or int(A,B)")
    taken = sorted({"name", "runs", "track.group", "cluster.address"} & (grid.keys() | drawn.keys()))
    if taken:
        raise ConfigError(f"{', '.join(taken)}: a sweep sets that itself, for each of its runs")
    ends = {key: [str(each.low), str(each.high)] for key, each in drawn.items()}
    first = _check(file, fixed, {**grid, **ends})
    if first.evaluate.best is None:
        raise ConfigError("evaluate.best is not set: a sweep compares its runs by it, such as evaluate.best=test/loss")
    folder = (first.runs / f"{first.name}-sweep").absolute()
    found = Plan(file.absolute(), folder, fixed, grid, drawn, samples, parallel, early)
    if found.trials > MOST_TRIALS:
        raise ConfigError(f"{found.trials:,} runs are more than {MOST_TRIALS:,}; take fewer values, or ranges")
    return found, first


def run(planned: Plan, first: Config, address: str | None, resume: bool, say: Callable[[str], None]) -> list[Trial]:
    """Run the sweep to its end, the best first in what it returns.

    Raises RunError when there is one already, none to go on with, or one over other points.
    """
    state = planned.folder / STATE
    if state.exists() and not resume:
        raise RunError(f"{planned.folder} holds a sweep; go on with it by --resume, or give the run another name=...")
    if resume and not state.exists():
        raise RunError(f"{planned.folder} holds no sweep to go on with; leave --resume out")
    points, told = planned.folder / "points.json", json.dumps(planned.points, indent=2) + "\n"
    if resume and points.read_text() != told:
        raise RunError(f"{planned.folder} holds a sweep over other points ({points}); give the command that began it")
    planned.folder.mkdir(parents=True, exist_ok=True)
    points.write_text(told)
    with ray.cluster(first, address) as resources:
        each = max(1, first.cluster.workers) * first.cluster.threads_per_worker
        width = max(1, int(resources.get("CPU", 1)) // each)
        trials.tuner(planned, first, planned.parallel or width, resume, say).fit()
    return outcome(planned, first)


def outcome(planned: Plan, first: Config) -> list[Trial]:
    """What became of every trial that has begun, from the run folders alone; the best first."""
    lower = first.evaluate.mode == "min"
    found = []
    for folder in sorted(path.parent for path in planned.folder.glob("*/journal.jsonl")):
        config = configs.load_resolved(folder / "config.yaml").model_dump(mode="json")
        keys = {key: shown(config_lint.value(config, key)) for key in (*planned.grid, *planned.drawn)}
        finite = [(value, step) for step, value in scores(folder / "journal.jsonl", first) if math.isfinite(value)]
        best, step = (min if lower else max)(finite, key=lambda pair: pair[0]) if finite else (None, 0)
        records = journal.read(folder / "journal.jsonl").records
        ends = [record["reason"] for record in records if record["kind"] == "end"]
        state = "failed" if not ends else "done" if ends[-1] == "done" else "ended early"
        found.append(Trial(folder, keys, best, step, state))
    worst = math.inf if lower else -math.inf
    return sorted(found, key=lambda trial: worst if trial.best is None else trial.best, reverse=not lower)


def _check(file: Path, fixed: Sequence[str], values: Mapping[str, Sequence[str]]) -> Config:
    """Load every combination of values, or, when they are very many, every value by itself; the first of them."""
    every: Iterable[tuple[str, ...]] = itertools.product(*values.values())
    if math.prod(map(len, values.values())) > 200:
        firsts = [each[0] for each in values.values()]
        every = [(*firsts[:i], v, *firsts[i + 1 :]) for i, each in enumerate(values.values()) for v in each]
    good, wrong = [], {}
    for point in every:
        keys = [f"{key}={value}" for key, value in zip(values, point, strict=True)]
        try:
            good.append(configs.load(file, [*fixed, *keys]))
        except ConfigError as error:
            wrong.setdefault(str(error), " ".join(keys))
    if wrong:
        raise ConfigError("\n".join(f"with {keys}:\n{error}" for error, keys in wrong.items()))
    return good[0]


def _several(value: str) -> list[str]:
    """V1,V2 apart, as YAML would in brackets: a comma inside of a list, a mapping or quotes is part of a value."""
    text = f"[{value}]"
    try:
        node = Loader(text).get_single_node()
    except yaml.YAMLError:
        node = None
    if not isinstance(node, yaml.SequenceNode):
        return [value]
    return [text[each.start_mark.index : each.end_mark.index].strip() for each in node.value]


def _range(key: str, kind: str, low: str, high: str) -> trials.Drawn:
    try:
        found = trials.Drawn(kind, *(int(each) if kind == "int" else float(each) for each in (low, high)))
    except ValueError:
        numbers = "two whole numbers" if kind == "int" else "two numbers"
        raise ConfigError(f"{key}: {kind}({low},{high}) needs {numbers}") from None
    if not found.low < found.high or (kind == "log" and found.low <= 0):
        raise ConfigError(f"{key}: {kind}({low},{high}) needs a smaller number first" + ", above 0" * (kind == "log"))
    return found
