"""W&B as a reader of the journal: online, offline or off, never able to stop or slow a run.

The driver hands it every new record. A thread of its own opens the W&B run, joins the metrics of a step into one row
and logs it; the driver only ever puts a record into a queue. The run keeps its id over restarts. Those steps that W&B
holds already are skipped, and those that it lost are filled in from the journal, so its history has each step once,
with `_step == train/step`, through kills and rewinds. `track.on_rewind` says what becomes of steps that are done again:

    skip     the first time's values stay, which are the same but for rounding; works with every server
    rewind   W&B is asked to forget them; a server that cannot is asked once, then they are skipped
    new_run  another W&B run of the same group, with the history so far, beside the one that is left as it was

Step k's row is sent when step k is recorded, together with what was measured after k steps (evaluations and their
samples, as tables), so those appear one step late, and with how the hosts were doing before it. Checkpoints and data
sets are noted there by reference, nothing of them is copied.

It gives up: when W&B fails or falls 10,000 records behind, it is left alone with one line of notice; the journal has
everything, and `millstream track sync` sends it later. A run's end waits for W&B 10 s at the most.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pipeline import node
from pipeline.sections import Track
from pipeline.track.console import relative
from pipeline.track.journal import lineage, read
from pipeline.track.wandb import account, references, segments, tables

INIT_SECONDS = 30.0
CLOSE_SECONDS = 10.0
NOTES_SECONDS, FINISH_SECONDS = 2.0, 6.0  # of these, for artifacts and alerts, and for what is left of the rows
BEHIND = 10_000


class Wandb:
    """The sink. Nothing here raises, and only `close` waits, 10 s at the most.

    `notice`: one line a person should see (no key, server away, failed), the newest; `say`, if given, gets each of them
    as it comes. `where`: how to look at the run, for the end of the training.
    """

    def __init__(
        self,
        track: Track,
        folder: Path,
        name: str,
        config: Mapping[str, Any],
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.notice: str | None = None
        self.where: str | None = None
        self._track, self._folder, self._name, self._config, self._say = track, folder, name, config, say
        self._records: queue.Queue[Mapping[str, Any] | None] = queue.Queue(BEHIND)
        self._off, self._exit_code = threading.Event(), 1
        self._run: Any = None
        self._sent, self._rows = -1, {}
        self._system: dict[str, float] = {}  # of the hosts, since the last step
        self._notes: references.References | None = None
        self._mode = account.mode(track.wandb)
        if self._mode == "off":
            self._off.set()
            return
        if self._mode == "offline" and track.wandb == "auto" and not os.environ.get("WANDB_MODE"):
            self._tell("W&B: no key found, so it records offline (`wandb login` once, or track.wandb: off)")
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record of the journal; returns at once."""
        if self._off.is_set():
            return
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._fail("it does not keep up")

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Send what is left and finish the W&B run; given up after so many seconds, what is on the disk is kept."""
        if self._mode == "off":
            return
        if not self._off.is_set():
            deadline = time.monotonic() + seconds
            with suppress(queue.Full):
                self._records.put(None, timeout=seconds)
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                self._fail(f"it did not finish within {seconds:.0f} s")
        if self._off.is_set():
            account.end_service()  # it would hold the process's exit up, for as long as it waits for its server

    def _work(self) -> None:
        try:
            self._begin(account.identity(self._folder))
            while (record := self._records.get()) is not None and not self._off.is_set():
                self._take(record)
            self._send(self._rows)
            self._finish(self._exit_code)
        except Exception as error:  # whatever it is, the training goes on
            self._fail(_first_line(error))

    def _begin(self, identity: str) -> None:
        """Open the W&B run of this id, online if that can be, and learn which steps it has."""
        before = [segments.cut(segment) for segment in segments.find(self._folder, identity)]
        if self._mode == "online":
            try:
                self._open("online", identity)
                self._sent = self._run.starting_step - 1  # what the server has; the rest comes again from the journal
                return
            except Exception as error:
                if self._off.is_set():  # by now nobody waits for it
                    raise
                self._tell(f"W&B: {_first_line(error)}; going on offline")
                self._mode = "offline"
                _release()
        self._open("offline", identity)
        self._sent = segments.held(before)

    def _open(self, mode: Literal["online", "offline"], identity: str, rewind: int | None = None) -> None:
        import wandb

        wandb.setup(wandb.Settings(silent=True))  # the log-in speaks before it has seen the settings of the run
        while list(self._folder.glob(f"wandb/*run-{time.strftime('%Y%m%d_%H%M%S')}-{identity}")):
            time.sleep(0.1)  # W&B names folders by the second: two attempts in one would write into the same file
        how: dict[str, Any] = {"resume": "allow"}
        if rewind is not None:
            how = {"resume_from": f"{identity}?_step={rewind}"}
        group = self._track.group or (self._name if self._track.on_rewind == "new_run" else None)
        self._run = wandb.init(
            id=identity, name=self._name, job_type="train", dir=self._folder, config=dict(self._config),
            project=self._track.project, entity=self._track.entity, group=group, tags=self._track.tags,
            mode=mode, settings=account.settings(wandb.Settings, INIT_SECONDS, FINISH_SECONDS), **how,
        )  # fmt: skip
        self._run.define_metric("train/step")
        self._run.define_metric("*", step_metric="train/step")
        self._notes = references.References(self._run, identity, self._folder, self._config, self._tell)
        later = f"offline; `millstream track sync {relative(self._folder)}` sends it"
        self.where = self._run.url if mode == "online" else later

    def _take(self, record: Mapping[str, Any]) -> None:
        step = record.get("step", 0)
        if record["kind"] in ("start", "restore"):
            if step <= self._sent:
                self._rewind(step)
            known = _rows(lineage(read(self._folder / "journal.jsonl").records), upto=step)
            self._rows = {at: row for at, row in known.items() if at > self._sent}
            self._send(at for at in list(self._rows) if at < step)
        elif record["kind"] == "end":
            self._exit_code = int(record.get("reason") == "failed")
        elif record["kind"] == "node":
            self._system |= node.metrics(record)
        elif (values := _values(record)) and (step > self._sent or record["kind"] == "save"):
            step = max(step, self._sent + 1)  # a save that ended behind the training stands where it ended
            self._rows.setdefault(step, {}).update(values)
            if record["kind"] == "step":
                self._rows[step] |= self._system
                self._send(at for at in list(self._rows) if at <= step)
        if record["kind"] in ("start", "restore", "step"):
            self._system = {}
        if self._notes is not None:
            self._notes.take(record)

    def _rewind(self, step: int) -> None:
        """The run goes on after `step` steps, and W&B has later ones already: do with them as track.on_rewind says."""
        if self._track.on_rewind == "skip" or (self._track.on_rewind == "rewind" and step == 0):
            return
        self._finish(int(self._track.on_rewind == "new_run"))
        if self._track.on_rewind == "new_run":
            self._begin(account.identity(self._folder, new=True))
            return
        identity = account.identity(self._folder)
        mode: Literal["online", "offline"] = "online" if self._mode == "online" else "offline"
        try:
            self._open(mode, identity, rewind=step - 1)
            self._sent = step - 1
        except Exception as error:
            self._tell(f"W&B: {_first_line(error)}; the steps that it has are skipped")
            _release()
            self._begin(identity)

    def _finish(self, exit_code: int) -> None:
        if self._notes is not None:
            self._notes.close(NOTES_SECONDS)
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            raise TimeoutError(f"its server did not take everything within {FINISH_SECONDS:.0f} s") from None

    def _send(self, steps: Iterable[int]) -> None:
        for step in sorted(steps):
            with tables.staged(self._folder):
                row = tables.with_tables(self._rows.pop(step), self._folder)
                self._run.log({**row, "train/step": step}, step=step, commit=True)
            self._sent = step

    def _tell(self, line: str) -> None:
        self.notice = line
        if self._say is not None:
            self._say(line)

    def _fail(self, reason: str) -> None:
        if not self._off.is_set():
            self._off.set()
            later = f"the journal has everything (`millstream track sync {relative(self._folder)}` sends it)"
            self._tell(f"W&B: {reason}; left alone, {later}")


def _release() -> None:
    """After a failed start; else the run's id counts as in use, and the next start cannot have it."""
    import wandb

    with suppress(SystemExit):  # of W&B's own process, when that has failed
        wandb.teardown()


def missing(records: Iterable[Mapping[str, Any]], last: int) -> list[int]:
    """The steps whose rows W&B lacks when it holds all up to `last`: what `track repair` adds."""
    return sorted(step for step in _rows(lineage(records)) if step > last)


def fill(track: Track, folder: Path, name: str, config: Mapping[str, Any], upto: int, seconds: float) -> str | None:
    """Write the rows up to step `upto` that W&B's files lack into another offline segment; what went wrong, if any."""
    sink = Wandb(track.model_copy(update={"wandb": "offline", "on_rewind": "skip"}), folder, name, config)
    sink.write({"kind": "restore", "step": upto})
    sink.write({"kind": "end", "reason": "repaired"})
    sink.close(seconds)
    return sink.notice


def _rows(records: Iterable[Mapping[str, Any]], upto: float = math.inf) -> dict[int, dict[str, Any]]:
    """What stands in W&B by step, of all that was recorded up to `upto` steps done, the evaluation after them included.

    How the hosts are doing is put to the next step: it makes no row of its own.
    """
    rows: dict[int, dict[str, Any]] = {}
    system: dict[str, float] = {}
    for record in records:
        if record["kind"] == "node":
            system |= node.metrics(record)
        elif record["kind"] in ("start", "restore"):
            system = {}
        elif (values := _values(record)) and record["step"] <= upto:
            rows.setdefault(record["step"], {}).update(values)
            if record["kind"] == "step":
                rows[record["step"]] |= system
                system = {}
    return rows


def _values(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record puts into the row of its step: numbers, and lists of samples."""
    if record["kind"] == "samples":
        return {f"samples/{name}": rows for name, rows in record["sets"].items()}
    metrics: Mapping[str, float | None] = record.get("metrics") or {}
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
