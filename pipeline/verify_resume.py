"""Proof that a run can be resumed: N + M steps without a break, beside N steps, SIGKILL, and M steps more.

    whole     N + M steps, saved at the end only
    killed    saved after N steps; every worker is killed when it is about to save again, and what came after N is lost.
              The same command then goes on and ends
    other     a copy of what the kill left goes on with another number of workers

Each is `millstream train` in a process of its own, with the user's configuration and data, below a folder that is
removed at the end. Evaluation and tracking are off, checkpoints stay local, and the schedule of the learning rate is
shortened to N + M steps. What is compared, and what counts as kept, is said in same_run.py. What it gives up: on a
cluster that was running before, workers cannot be killed from here, so it is refused. Without /proc a stop ends the
run's own process only.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import config as configs
from pipeline.cluster import driver, history, ray
from pipeline.config import Config
from pipeline.errors import ConfigError, RunError
from pipeline.run import Run, newest_attempt
from pipeline.same_run import Check, compared

POLL_SECONDS = 0.2
TAIL_LINES = 15  # of a run's output, shown when it failed


@dataclass(frozen=True)
class Plan:
    """What will be run: `steps` until the checkpoint, `more` after it, all below `folder`."""

    config: Config
    steps: int
    more: int
    folder: Path
    other: int | None
    """Workers to go on with besides; None: for the reason `skipped`."""
    skipped: str = ""
    asked: bool = False  # somebody wants this other number

    @property
    def total(self) -> int:
        return self.steps + self.more

    def run(self, name: str, workers: int | None = None) -> Config:
        """The configuration of one of the runs. Raises ConfigError when so many workers do not fit."""
        values = self.config.model_dump(mode="json")
        if workers is not None:
            values["cluster"]["workers"] = workers
        if name == "whole":
            values["checkpoint"]["every"] = self.total
        return Config.model_validate(values | {"runs": str(self.folder / name)})


class Comparison(NamedTuple):
    """One run that was resumed, beside the one that was not."""

    workers: int
    checks: list[Check]


@dataclass(frozen=True)
class Report:
    """What came out. `environment`: processor, device, threads, versions, as the checkpoints tell them."""

    plan: Plan
    comparisons: list[Comparison]
    skipped: str
    seconds: float
    environment: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        return all(check.kept for comparison in self.comparisons for check in comparison.checks)

    def to_json(self) -> dict[str, Any]:
        config = self.plan.config
        return {
            "run": config.name,
            "passed": self.passed,
            "steps": self.plan.steps,
            "more": self.plan.more,
            "workers": workers(config),
            "zero_stage": config.zero.stage,
            "dtype": config.precision.dtype,
            "comparisons": [
                {"workers": each.workers, "checks": [check.to_json() for check in each.checks]}
                for each in self.comparisons
            ],
            "skipped": self.skipped or None,
            "seconds": round(self.seconds, 1),
            "environment": dict(self.environment),
        }


class NotStarted(RunError):
    """A run was refused before its first step, such as for want of GPUs."""


Progress = Callable[[str, int, int], None]


def workers(config: Config) -> int:
    """World size of a configuration; its 0 stands for this one process."""
    return max(1, config.cluster.workers)


@contextmanager
def planned(config: Config, steps: int, more: int, other: int | None = None, keep: bool = False) -> Iterator[Plan]:
    """The plan, with a folder of its own for as long as the block lasts (`keep`: for good).

    Raises ConfigError when the configuration cannot be run so, before anything is.
    """
    config = configs.resolve(config)
    if config.cluster.address or os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            "verify-resume kills workers, which it can on a Ray cluster of its own only: "
            "leave cluster.address out and unset RAY_ADDRESS"
        )
    if other == workers(config):
        raise ConfigError(f"--workers {other} is what the run has anyway; name another number, or leave it out")
    found = other or another(workers(config), config.micro_batches)
    skipped = "" if found else "a step has one micro batch, so one worker is all that fits"
    existed = config.runs.exists()
    config.runs.mkdir(parents=True, exist_ok=True)  # where the user wants such files to lie
    folder = Path(tempfile.mkdtemp(prefix="verify-resume-", dir=config.runs))
    try:
        plan = Plan(_short(config, steps, more), steps, more, folder, found, skipped, asked=other is not None)
        plan.run("other", found)
        yield plan
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
            if not existed:
                with suppress(OSError):  # somebody else has put something there
                    config.runs.rmdir()


def another(workers: int, micro_batches: int) -> int | None:
    """The next smaller number of workers that shares the micro batches evenly, else the next larger; None: neither."""
    fits = [count for count in range(1, micro_batches + 1) if micro_batches % count == 0 and count != workers]
    smaller = [count for count in fits if count < workers]
    return smaller[-1] if smaller else next(iter(fits), None)


def verify(plan: Plan, say: Callable[[str], None], progress: Progress) -> Report:
    """Run and compare. `say` gets a line for each run as it begins, `progress` (name of the run, steps done, steps).

    Raises RunError when a run fails for another reason than the kill.
    """
    began = time.perf_counter()
    world, comparisons, skipped = workers(plan.config), [], plan.skipped
    say(f"training {plan.total} steps without a break, {_count(world)}")
    whole = _finished(plan.run("whole"), plan, "whole", progress)
    killed, at = plan.run("killed"), min(2 * plan.steps, plan.total)
    say(f"training {at} steps with a checkpoint after {plan.steps}, then SIGKILL of {_count(world)}")
    _killed(killed, plan, at, progress)
    if plan.other is not None:
        shutil.copytree(_folder(killed), _folder(plan.run("other")))
    say(f"going on from step {plan.steps}, {_count(world)}")
    resumed = _finished(killed, plan, "resumed", progress)
    comparisons.append(Comparison(world, compared(whole, resumed, plan.steps, plan.total)))
    if plan.other is not None:
        say(f"going on from step {plan.steps}, {_count(plan.other)}")
        try:
            went = _finished(plan.run("other", plan.other), plan, "other", progress)
            comparisons.append(Comparison(plan.other, compared(whole, went, plan.steps, plan.total)))
        except NotStarted as error:
            if plan.asked:
                raise
            skipped = str(error)
    manifest = whole.checkpoints()[-1].manifest
    facts = {**manifest.environment, **manifest.versions} if manifest else {}
    return Report(plan, comparisons, skipped, time.perf_counter() - began, facts)


def train(config: Config, plan: Plan, name: str, progress: Progress, kills: str = "") -> int:
    """`millstream train` with `config`, until it ends; its exit code. However this is left, nothing of it stays."""
    path, log, run = plan.folder / f"{name}.yaml", plan.folder / f"{name}.log", Run(_folder(config))
    path.write_text(configs.dump(config))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "train", str(path)],
            env={**os.environ, "MILLSTREAM_KILL": kills},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a session of its own, by which all its processes can be found
        )
    try:
        while process.poll() is None:
            taken = [record["step"] + 1 for record in run.records() if record["kind"] == "step"]
            progress(name, max(taken, default=0), plan.total)
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
    finally:
        end(process)
    return process.returncode


def _killed(config: Config, plan: Plan, at: int, progress: Progress) -> None:
    """Train until every worker is killed at its save after `at` steps: the one before, of step N, is committed then."""
    kills = ",".join(f"{rank}:1:save:{at}" for rank in range(workers(config)))
    code = train(config, plan, "killed", progress, kills)
    run = Run(_folder(config))
    saved = [listed.step for listed in run.checkpoints() if not listed.damage]
    if code == driver.DONE or saved != [plan.steps] or any(record["kind"] == "end" for record in run.records()):
        raise RunError(
            f"the run that was to be killed after {at} steps ended with exit code {code} and the checkpoints {saved}"
            f"{_tail(plan, 'killed')}"
        )


def _finished(config: Config, plan: Plan, name: str, progress: Progress) -> Run:
    """The run after training to its end; RunError when it did not come there, or did not go on from step N."""
    folder = _folder(config)
    before = newest_attempt(folder)
    code = train(config, plan, name, progress)
    run = Run(folder)
    if newest_attempt(folder) == before:
        raise NotStarted(f"{_count(workers(config))}: not started{_tail(plan, name)}")
    if code != driver.DONE or not run.finished:
        raise RunError(f"the {name} run ended with exit code {code} before its last step{_tail(plan, name)}")
    from_step = [record["step"] for record in run.records() if record["kind"] in ("start", "restore")]
    expected = [0, plan.steps] if before else [0]
    if from_step != expected:
        raise RunError(f"the {name} run began from the steps {from_step}, not {expected}{_tail(plan, name)}")
    return run


def _short(config: Config, steps: int, more: int) -> Config:
    """The same run in `steps` + `more` steps, its schedule shortened alike, without what is beside the training."""
    values = config.model_dump(mode="json")
    schedule, total = values["optim"]["schedule"], steps + more
    if schedule["decay"] is not None:
        schedule["decay"] = max(1, schedule["decay"] * total // config.steps)
    schedule["warmup"] = min(schedule["warmup"] * total // config.steps, total - (schedule["decay"] or 0))
    values["steps"] = total
    values["data"]["evaluate"] = values["evaluate"] = {}
    values["track"] = {"wandb": "off"}
    values["checkpoint"] = {"every": steps, "background": config.checkpoint.background}
    values["cluster"]["restarts"] = 0
    return Config.model_validate(values)


def _folder(config: Config) -> Path:
    return history.run_folder(config, fresh=False)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a run, its Ray cluster too, wait until it is gone, and remove that cluster's folder."""
    give_up = time.monotonic() + 10
    while (left := _session(process.pid)) or process.poll() is None:
        for member in {*left, process.pid} if process.poll() is None else left:
            with suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        if time.monotonic() > give_up:  # a process that waits for a device cannot be killed
            break
        time.sleep(0.05)
    ray.sweep_scratch()


def _session(number: int) -> list[int]:
    """Processes whose session is `number` and that still run (proc(5), fields 3 and 6 of stat)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if session == str(number) and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def _tail(plan: Plan, name: str) -> str:
    """The end of a run's output, below a colon."""
    lines = (plan.folder / f"{name}.log").read_text(errors="replace").splitlines()
    return ":" + "".join(f"\n  {line}" for line in lines[-TAIL_LINES:])


def _count(workers: int) -> str:
    return f"{workers} worker{'s' * (workers > 1)}"
