"""The driver: start an attempt, watch it, decide what comes after.

One attempt is one world size from its first step to its end. When it is lost, because a worker was killed or failed,
the next one goes on from the newest checkpoint that verifies. The driver reads the journal like everybody else: the
terminal and W&B are fed from it here, so they can neither stop nor slow training.

    run -> lease -> attempt 1 -> (lost) -> attempt 2 -> ... -> exit code: 0 done, 75 run me again, 78 mend the
                                                               configuration, 1 gave up
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from pipeline import config as configs
from pipeline.cluster import history, lease, output, watchdog, worker
from pipeline.cluster.board import Board
from pipeline.cluster.failure import Failure, diagnose
from pipeline.config import Config
from pipeline.track import journal
from pipeline.track.console import Console
from pipeline.track.wandb import Wandb

DONE, GIVE_UP, AGAIN = 0, 1, 75
LOOK_SECONDS = 1.0  # between two looks at whether all workers move
CRASH_LOOP = 3  # the same failure at the same step so many times in a row ends the run


class Attempt(Protocol):
    """One fit of fixed world size: under Ray, or in this process."""

    number: int
    folder: Path

    def run(self) -> BaseException | None: ...
    def record(self, record: dict[str, Any]) -> None: ...
    def request_stop(self) -> None: ...
    def heartbeats(self) -> dict[int, dict[str, Any]]: ...
    def signal(self, beat: Mapping[str, Any], number: int) -> str: ...
    def close(self) -> None: ...


class Solo:
    """An attempt in this very process, for debugging: no Ray, one rank; breakpoints work."""

    def __init__(self, config: Config, folder: Path, number: int, new_order: bool) -> None:
        self.config, self.folder, self.number, self.new_order = config, folder, number, new_order
        self.board = Board(folder / "journal.jsonl", number)
        self.record, self.close = self.board.record, self.board.close
        self.request_stop, self.heartbeats = self.board.request_stop, self.board.heartbeats

    def signal(self, beat: Mapping[str, Any], number: int) -> str:
        raise NotImplementedError("one process alone is not watched: it may stand at a breakpoint")

    def run(self) -> BaseException | None:
        try:
            worker.run(self.config, self.folder, self.number, self.board.deliver, self.new_order)
        except Exception as error:
            return error
        return None


def run(
    config: Config,
    *,
    folder: Path | None = None,
    fresh: bool = False,
    address: str | None = None,
    new_order: bool = False,
) -> int:
    """Train until done, stopped or given up; returns the exit code (0, 75, 78 or 1).

    The same configuration again goes on where its run stopped; `fresh` starts anew in a folder beside it and deletes
    nothing; `folder` goes on in that run folder whatever others the name has; `new_order` lets it go on with other
    data, or in another order of samples, which is refused otherwise. Raises ConfigError or RunError for what is found
    before the first attempt.
    """
    config = configs.resolve(config)
    if config.data.decoders:  # a wrong import path is found here, not in a worker
        from pipeline.data.decode import load_decoders

        load_decoders(config.data.decoders)
    folder = folder or history.run_folder(config, fresh)
    alone = config.cluster.workers == 0
    terminal = output.shared if alone else output.apart
    with lease.take(folder, say=print), terminal(folder / "logs" / "driver.log") as stream:
        console = Console(config, folder, stream)
        history.note_configuration(config, folder, console.say)
        if history.finished(config, folder):
            console.already_done()
            return DONE
        history.expect_checkpoint(config, folder)
        with stop_signals(console) as stop:
            if alone:
                return attempts(config, folder, console, stop, lambda number: Solo(config, folder, number, new_order))
            where = address or config.cluster.address or os.environ.get("RAY_ADDRESS")
            return under_ray(config, folder, console, stop, where, new_order)


def under_ray(
    config: Config, folder: Path, console: Console, stop: threading.Event, address: str | None, new_order: bool
) -> int:
    """Attempts on a Ray cluster. Raises RunError when it cannot be reached or can never hold the workers."""
    from pipeline.cluster import ray

    console.say(f"connecting to Ray at {address}" if address else "starting Ray on this machine", style="dim")
    with ray.cluster(config, address) as resources, stop_signals(console, stop):  # Ray took SIGTERM for itself
        use_gpu = ray.require(config, resources)

        def attempt(number: int) -> ray.Attempt:
            return ray.Attempt(config, folder, number, use_gpu, new_order)

        return attempts(config, folder, console, stop, attempt)


def attempts(
    config: Config, folder: Path, console: Console, stop: threading.Event, start: Callable[[int], Attempt]
) -> int:
    """Start attempts until one ends by itself, the restart budget is spent, or a failure repeats itself."""
    failures: list[Failure] = []
    with console, sinks(config, folder, console) as tracking:
        code = AGAIN if stop.is_set() else None  # asked for before anything began
        while code is None:
            attempt = start(lease.new_attempt(folder))
            attempt.record({"kind": "attempt", "workers": config.cluster.workers, "restarts": len(failures)})
            error = supervise(attempt, stop, config)
            records = [r for r in journal.read(folder / "journal.jsonl").records if r["attempt"] == attempt.number]
            reason = next((r["reason"] for r in reversed(records) if r["kind"] == "end"), None)
            if reason is not None:
                code = DONE if reason == "done" else AGAIN
            else:
                error = error or RuntimeError("the workers ended before the run did")
                failures.append(diagnose(records, attempt.heartbeats(), error))
                code, message = after(failures, config, stop.is_set())
                attempt.record({"kind": "failure", "message": message, "exit_code": code})
            attempt.close()
    console.end(code, journal.read(folder / "journal.jsonl").records, tracking.where)
    return code


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


def supervise(attempt: Attempt, stop: threading.Event, config: Config) -> BaseException | None:
    """Run an attempt to its end, passing a stop on to its workers, and end it when one of them has stalled.

    Returns what ended it, if it failed.
    """
    if isinstance(attempt, Solo):  # stays in the main thread, where a debugger is at home
        watcher = threading.Thread(target=lambda: stop.wait() and attempt.request_stop(), daemon=True)
        watcher.start()
        return attempt.run()
    ended: list[BaseException | None] = []
    fit = threading.Thread(target=lambda: ended.append(attempt.run()), name="fit", daemon=True)
    fit.start()
    told = stalled = False
    look_at = time.monotonic() + LOOK_SECONDS
    while fit.is_alive():
        if stop.is_set() and not told:
            attempt.request_stop()
            told = True
        if time.monotonic() > look_at and not stalled:
            stalled = watchdog.look(attempt, config.guard.stall)
            look_at = time.monotonic() + LOOK_SECONDS
        fit.join(timeout=0.1)
    return ended[0]


@contextmanager
def stop_signals(console: Console, stop: threading.Event | None = None) -> Iterator[threading.Event]:
    """SIGINT or SIGTERM asks for a stop after the step in hand; a second one leaves at once, the checkpoint intact."""
    stop = stop or threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield stop
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            console.say("leaving at once; the same command goes on from the last checkpoint", style="yellow")
            os._exit(AGAIN)
        stop.set()
        console.say("stopping: finishing the step and saving; once more to leave at once", style="yellow")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def sinks(config: Config, folder: Path, console: Console) -> Iterator[Wandb]:
    """Feed the terminal and W&B with the journal's new records, in a thread, until the block ends and all are shown."""
    path = folder / "journal.jsonl"
    seen = len(journal.read(path).records)
    tracking = Wandb(config.track, folder, config.name, config.model_dump(mode="json"), console.say)
    ended = threading.Event()

    def feed() -> None:
        for place, record in enumerate(journal.follow(path, ended)):
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
        tracking.close()


def evaluate(folder: Path, step: int | None = None) -> tuple[int, dict[str, float]]:
    """Score a run's held-out sets with its newest good checkpoint, or that of `step`: (step, metrics).

    Reads only, so it may be done while the run goes on. Raises CheckpointError when there is no such checkpoint.
    """
    config = configs.load_resolved(folder / "config.yaml")
    with output.shared(folder / "logs" / "evaluate.log"):
        return worker.evaluate(config, folder, step)
