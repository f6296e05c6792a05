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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from pipeline import config as configs
from pipeline.checkpoint import format as checkpoints
from pipeline.checkpoint.uploads import home_of
from pipeline.cluster import lease, output, worker
from pipeline.cluster.board import Board
from pipeline.cluster.failure import Failure, diagnose
from pipeline.config import Config
from pipeline.errors import CheckpointError
from pipeline.track import journal
from pipeline.track.console import Console
from pipeline.track.wandb import Wandb

DONE, GIVE_UP, AGAIN = 0, 1, 75
CRASH_LOOP = 3  # the same failure at the same step so many times in a row ends the run


class Attempt(Protocol):
    """One fit of fixed world size: under Ray, or in this process."""

    number: int

    def run(self) -> BaseException | None: ...
    def record(self, record: dict[str, Any]) -> None: ...
    def request_stop(self) -> None: ...
    def heartbeats(self) -> dict[int, dict[str, Any]]: ...
    def close(self) -> None: ...


class Solo:
    """An attempt in this very process, for debugging: no Ray, one rank; breakpoints work."""

    def __init__(self, config: Config, folder: Path, number: int, new_order: bool) -> None:
        self.config, self.folder, self.number, self.new_order = config, folder, number, new_order
        self.board = Board(folder / "journal.jsonl", number)
        self.record, self.close = self.board.record, self.board.close
        self.request_stop, self.heartbeats = self.board.request_stop, self.board.heartbeats

    def run(self) -> BaseException | None:
        try:
            worker.run(self.config, self.folder, self.number, self.board.deliver, self.new_order)
        except Exception as error:
            return error
        return None


def run(config: Config, *, fresh: bool = False, address: str | None = None, new_order: bool = False) -> int:
    """Train until done, stopped or given up; returns the exit code (0, 75, 78 or 1).

    The same configuration again goes on where its run stopped; `fresh` starts anew in a folder beside it and deletes
    nothing; `new_order` lets it go on with other data, or in another order of samples, which is refused otherwise.
    Raises ConfigError or RunError for what is found before the first attempt.
    """
    config = configs.resolve(config)
    if config.data.decoders:  # a wrong import path is found here, not in a worker
        from pipeline.data.decode import load_decoders

        load_decoders(config.data.decoders)
    folder = run_folder(config, fresh)
    alone = config.cluster.workers == 0
    terminal = output.shared if alone else output.apart
    with lease.take(folder, say=print), terminal(folder / "logs" / "driver.log") as stream:
        console = Console(config, folder, stream)
        note_configuration(config, folder, console)
        if finished(config, folder):
            console.already_done()
            return DONE
        expect_checkpoint(config, folder)
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
            error = supervise(attempt, stop)
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


def supervise(attempt: Attempt, stop: threading.Event) -> BaseException | None:
    """Run an attempt to its end, passing a stop on to its workers. Returns what ended it, if it failed."""
    if isinstance(attempt, Solo):  # stays in the main thread, where a debugger is at home
        watcher = threading.Thread(target=lambda: stop.wait() and attempt.request_stop(), daemon=True)
        watcher.start()
        return attempt.run()
    ended: list[BaseException | None] = []
    fit = threading.Thread(target=lambda: ended.append(attempt.run()), name="fit", daemon=True)
    fit.start()
    told = False
    while fit.is_alive():
        if stop.is_set() and not told:
            attempt.request_stop()
            told = True
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
                if record["kind"] in (
                    "start",
                    "restore",
                ):  # not before: a configuration that is refused is not the run's
                    save_configuration(config, folder)
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


def run_folder(config: Config, fresh: bool) -> Path:
    """The run's folder: `<runs>/<name>`, or the newest of `<name>-2`, `<name>-3`, ... that `fresh` started.

    Raises CheckpointError when the second home has to be asked for that and does not answer.
    """
    runs = Path(config.runs)
    taken = {1: runs / config.name} if (runs / config.name).exists() else {}
    for path in runs.glob(f"{config.name}-*"):
        number = path.name.removeprefix(f"{config.name}-")
        if number.isdigit() and (path / "config.yaml").exists():
            taken[int(number)] = path
    newest = max(taken, default=0)
    if newest and not fresh:
        return taken[newest]

    def named(number: int) -> Path:
        return runs / (config.name if number == 1 else f"{config.name}-{number}")

    try:
        while (home := home_of(config, named(newest + 1))) and home.steps():  # it lives in its second home, not here
            newest += 1
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\nWhether the run lives there cannot be told, and it is not in {runs}. Mend that, or go on "
            "without the second home: checkpoint.url=null"
        ) from error
    return named(newest + 1 if fresh else max(newest, 1))


def note_configuration(config: Config, folder: Path, console: Console) -> None:
    """Name what differs from the configuration that the run had before; a new run has this one."""
    path = folder / "config.yaml"
    if not path.exists():
        save_configuration(config, folder)
    changes = configs.difference(configs.load_resolved(path), config)
    if changes:
        console.say(f"changed since the last attempt: {', '.join(changes)}", style="yellow")


def save_configuration(config: Config, folder: Path) -> None:
    """Put the resolved configuration into the run folder, all at once."""
    draft = folder / "config.yaml.tmp"
    draft.write_text(configs.dump(config))
    draft.replace(folder / "config.yaml")


def expect_checkpoint(config: Config, folder: Path) -> None:
    """Raises CheckpointError when the journal knows of a checkpoint and none is there: no fresh start by accident."""
    saved = [record for record in journal.read(folder / "journal.jsonl").records if record["kind"] == "save"]
    if saved and not checkpoints.list_checkpoints(folder / "checkpoints"):
        home = home_of(config, folder)
        if home is not None and home.steps():
            return
        raise CheckpointError(
            f"{folder}/checkpoints is empty{f' and {home.url} too' if home else ''}, but step {saved[-1]['step']} was "
            "saved there. Bring the folder back, or start anew on purpose with --fresh (a new run folder; nothing is "
            "deleted)."
        )


def finished(config: Config, folder: Path) -> bool:
    """Whether the last step of this configuration is committed."""
    return any(found.step >= config.steps for found in checkpoints.list_checkpoints(folder / "checkpoints"))


def evaluate(folder: Path, step: int | None = None) -> tuple[int, dict[str, float]]:
    """Score a run's held-out sets with its newest good checkpoint, or that of `step`: (step, metrics).

    Reads only, so it may be done while the run goes on. Raises CheckpointError when there is no such checkpoint.
    """
    config = configs.load_resolved(folder / "config.yaml")
    with output.shared(folder / "logs" / "evaluate.log"):
        return worker.evaluate(config, folder, step)
