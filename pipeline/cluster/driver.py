"""The driver: start an attempt, watch it, decide what comes after.

One attempt is one world size from its first step to its end. When it is lost, because a worker was killed or failed,
the next one goes on from the newest checkpoint that verifies, with as many workers as the cluster can hold then. The
driver reads the journal like everybody else: the terminal and W&B are fed from it here, so they can neither stop nor
slow training.

    run -> lease -> attempt 1 -> (lost) -> attempt 2 -> ... -> exit code: 0 done, 75 run me again, 78 mend the
                                                               configuration, 1 gave up
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from pipeline import config as configs
from pipeline.cluster import history, lease, metrics, output, worker
from pipeline.cluster.attempt import Attempt, Solo
from pipeline.cluster.failure import Failure, diagnose, first_line
from pipeline.cluster.supervise import supervise
from pipeline.config import Config
from pipeline.track import journal
from pipeline.track.code import version as code_version
from pipeline.track.console import Console, Lines
from pipeline.track.wandb import Wandb

DONE, GIVE_UP, AGAIN = 0, 1, 75
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # finish the step, save, leave
CRASH_LOOP = 3  # the same failure at the same step so many times in a row ends the run


def run(
    config: Config,
    *,
    folder: Path | None = None,
    fresh: bool = False,
    address: str | None = None,
    new_order: bool = False,
    as_json: bool = False,
) -> int:
    """Train until done, stopped or given up; returns the exit code (0, 75, 78 or 1).

    The same configuration again goes on where its run stopped; `fresh` starts anew in a folder beside it and deletes
    nothing; `folder` goes on in that run folder whatever others the name has; `new_order` lets it go on with other
    data, or in another order of samples, which is refused otherwise; `as_json` says what happens in lines for programs
    (console.Lines). Raises ConfigError or RunError for what is found
    before the first attempt.
    """
    config = configs.resolve(config)
    say, display = (partial(print, file=sys.stderr), Lines) if as_json else (print, Console)
    from pipeline.doctor.examine import refuse

    refuse(config, say)
    folder = folder or history.run_folder(config, fresh)
    alone = config.cluster.workers == 0
    terminal = output.shared if alone else output.apart
    with lease.take(folder, say=say), terminal(folder / "logs" / "driver.log") as stream:
        console = display(config, folder, stream)
        history.note_configuration(config, folder, console.say)
        if history.finished(config, folder):
            console.already_done()
            return DONE
        history.expect_checkpoint(config, folder)
        with stop_signals(console) as stop:
            if alone:
                solo = Launcher(lambda number, workers: Solo(config, folder, number, new_order), lambda: 0)
                return attempts(config, folder, console, stop, solo)
            where = address or config.cluster.address or os.environ.get("RAY_ADDRESS")
            return under_ray(config, folder, console, stop, where, new_order)


def under_ray(
    config: Config, folder: Path, console: Console, stop: threading.Event, address: str | None, new_order: bool
) -> int:
    """Attempts on a Ray cluster. Raises RunError when it cannot be reached or can never hold the workers."""
    from pipeline.cluster import nodes, ray

    console.say(f"connecting to Ray at {address}" if address else "starting Ray on this machine", style="dim")
    with ray.cluster(config, address) as resources, stop_signals(console, stop):  # Ray took SIGTERM for itself
        use_gpu = ray.require(config, resources)

        launcher = Launcher(
            lambda number, workers: ray.Attempt(config, folder, number, workers, use_gpu, new_order),
            lambda: nodes.capacity(config.cluster, use_gpu, asking=True),
        )
        try:
            return attempts(config, folder, console, stop, launcher)
        except ray.lost_actor() as error:
            why = f"Ray has lost the actor that keeps the journal ({first_line(error)})"
            console.say(f"{why}; the same command goes on from the last checkpoint", style="red")
            return AGAIN


class Launcher(NamedTuple):
    """start: an attempt of this number and so many workers.  room: how many workers could be held now."""

    start: Callable[[int, int], Attempt]
    room: Callable[[], int]


def attempts(config: Config, folder: Path, console: Console, stop: threading.Event, launcher: Launcher) -> int:
    """Start attempts until one ends by itself, the restart budget is spent, or a failure repeats itself."""
    failures: list[Failure] = []
    with console, sinks(config, folder, console) as tracking:
        code = AGAIN if stop.is_set() else None  # asked for before anything began
        relaunch = False
        while code is None:
            workers = world_size(config, launcher.room, stop, console.say)
            if workers is None:
                code = AGAIN
                break
            attempt = launcher.start(lease.new_attempt(folder), workers)
            facts = {"workers": workers, "restarts": len(failures), "relaunch": relaunch, "code": code_version()}
            attempt.record({"kind": "attempt", **facts})
            relaunch = True
            error, resize = supervise(attempt, stop, config)
            records = [r for r in journal.read(folder / "journal.jsonl").records if r["attempt"] == attempt.number]
            reason = next((r["reason"] for r in reversed(records) if r["kind"] == "end"), None)
            if reason is not None:
                again = bool(resize) or reason == "rollback"
                code = DONE if reason == "done" else None if again and not stop.is_set() else AGAIN
            else:
                error = error or RuntimeError("the workers ended before the run did")
                failures.append(diagnose(records, attempt.heartbeats(), error, attempt.fate))
                code, message = after(failures, config, stop.is_set())
                attempt.record({"kind": "failure", "cause": failures[-1].kind, "message": message, "exit_code": code})
            attempt.close()
    console.end(code, journal.read(folder / "journal.jsonl").records, tracking.where)
    return code


def world_size(config: Config, room: Callable[[], int], stop: threading.Event, say: Callable[..., None]) -> int | None:
    """Workers of the next attempt: as many as fit, within the bounds. Waits for nodes when too few are there.

    None when they do not come in time, or a stop was asked for.
    """
    cluster = config.cluster
    least = cluster.workers if cluster.min_workers is None else cluster.min_workers
    give_up, told = time.monotonic() + cluster.wait_seconds, False
    while True:
        fit = min(room(), cluster.workers)
        if fit >= least:
            return fit
        if stop.is_set() or time.monotonic() > give_up:
            say(f"{fit} workers fit, at least {least} are needed: run the same command when there are nodes", "yellow")
            return None
        if not told:
            say(f"{fit} workers fit, at least {least} are needed: waiting up to {cluster.wait_seconds:.0f} s", "yellow")
            told = True
        stop.wait(1.0)


def after(failures: list[Failure], config: Config, stopping: bool) -> tuple[int | None, str]:
    """What a failure leads to: an exit code, or None to go on with another attempt; and what to say."""
    last, restarts = failures[-1], config.cluster.restarts
    if last.final:
        return last.exit_code, last.reason
    if stopping:
        return AGAIN, f"stopped without a new checkpoint: {last.reason}"
    again = [failure for failure in failures[-CRASH_LOOP:] if failure.same(last)]
    if len(again) == CRASH_LOOP or len(failures) > restarts:
        why = f"the same failure {CRASH_LOOP} times" if len(again) == CRASH_LOOP else f"{restarts} restart(s) used up"
        return GIVE_UP, f"giving up, {why}: {last.reason}\n{again[0].traceback}".rstrip()
    return None, f"{last.reason}; going on from the last checkpoint (restart {len(failures)} of {restarts})"


@contextmanager
def stop_signals(console: Console, stop: threading.Event | None = None) -> Iterator[threading.Event]:
    """SIGINT or SIGTERM asks for a stop after the step in hand; a later SIGINT leaves at once, the checkpoint intact.

    A later SIGTERM does not: a cluster that takes its machines back says so more than once. SIGUSR1 asks for a stop
    too: by Slurm's custom it announces the end of a job's time (sbatch --signal=USR1@120).
    """
    stop = stop or threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield stop
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and number != signal.SIGINT:
            return
        if stop.is_set():
            console.say("leaving at once; the same command goes on from the last checkpoint", style="yellow")
            os._exit(AGAIN)
        stop.set()
        console.say("stopping: finishing the step and saving; Ctrl-C once more to leave at once", style="yellow")

    before = {number: signal.signal(number, on_signal) for number in STOPS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def sinks(config: Config, folder: Path, console: Console) -> Iterator[Wandb]:
    """Feed the terminal and W&B with the journal's new records, the gauges with all, in a thread, until the block ends
    and all are shown.
    """
    path = folder / "journal.jsonl"
    seen = len(journal.read(path).records)
    gauges = None if config.cluster.workers == 0 else metrics.Gauges(config)
    tracking = Wandb(config.track, folder, config.name, config.model_dump(mode="json"), console.say)
    ended = threading.Event()

    def feed() -> None:
        for place, record in enumerate(journal.follow(path, ended)):
            if gauges:
                gauges.write(record)
            if place >= seen:
                if record["kind"] in ("start", "restore"):  # not before: one that is refused is not the run's
                    history.save_configuration(config, folder)
                console.show(record)
                tracking.write(record)

    thread = threading.Thread(target=feed, name="sinks", daemon=True)
    thread.start()
    try:
        yield tracking
    finally:
        ended.set()
        thread.join()
        if gauges:
            gauges.close()
        tracking.close()


def evaluate(folder: Path, step: int | None = None) -> tuple[int, dict[str, float]]:
    """Score a run's held-out sets with its newest good checkpoint, or that of `step`: (step, metrics).

    Reads only, so it may be done while the run goes on. Raises CheckpointError when there is no such checkpoint.
    """
    config = configs.load_resolved(folder / "config.yaml")
    with output.shared(folder / "logs" / "evaluate.log"):
        return worker.evaluate(config, folder, step)
