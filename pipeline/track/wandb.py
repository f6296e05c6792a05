"""W&B as a reader of the journal: online, offline or off, never able to stop or slow a run.

The driver hands it every new record. A thread of its own opens the W&B run, joins the metrics of a step into one row
and logs it; the driver only ever puts a record into a queue. After a restart the steps that W&B already holds are
skipped and those that it lost are filled in from the journal, so its history has each step once, with
`_step == train/step`, through kills and rewinds. Step k's row is sent when step k is recorded, together with what was
measured after k steps (evaluations); so those appear one step late.

It gives up: the values W&B shows for a step done twice are those of the first time (the same but for rounding). When
W&B fails or falls 10,000 records behind, it is left alone with one line of notice; the journal has everything.
"""

from __future__ import annotations

import json
import math
import netrc
import os
import queue
import secrets
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pipeline.sections import Track
from pipeline.track.journal import lineage, read

INIT_SECONDS = 30.0
CLOSE_SECONDS = 10.0
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
        mode = _mode(track.wandb)
        if mode == "off":
            self._off.set()
            return
        if mode == "offline" and track.wandb == "auto" and not os.environ.get("WANDB_MODE"):
            self._tell("W&B: no key found, so it records offline (`wandb login` once, or track.wandb: off)")
        self._thread = threading.Thread(target=self._work, args=(mode,), name="wandb", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record of the journal; returns at once."""
        if self._off.is_set():
            return
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._fail("it does not keep up")

    def close(self) -> None:
        """Send what is left and finish the W&B run; given up after 10 s, with what is on the disk kept."""
        if self._off.is_set():
            return
        deadline = time.monotonic() + CLOSE_SECONDS
        try:
            self._records.put(None, timeout=CLOSE_SECONDS)
        except queue.Full:
            self._fail("it does not keep up")
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._fail(f"it did not finish within {CLOSE_SECONDS:.0f} s")

    def _work(self, mode: str) -> None:
        try:
            self._open(mode)
            while (record := self._records.get()) is not None and not self._off.is_set():
                self._take(record)
            self._send(self._rows)
            self._run.finish(exit_code=self._exit_code)
        except Exception as error:  # whatever it is, the training goes on
            self._fail(_first_line(error))

    def _open(self, mode: str) -> None:
        identity = _identity(self._folder)
        have = -1
        for segment in sorted(self._folder.glob(f"wandb/*run-*-{identity}/run-{identity}.wandb")):
            have = max(have, _repair(segment))
        if mode == "online":
            try:
                self._run = self._init("online", identity)
                self._sent = self._run.starting_step - 1  # what the server has; the rest comes again from the journal
                self.where = self._run.url
                return
            except Exception as error:
                self._tell(f"W&B: {_first_line(error)}; going on offline")
                import wandb

                wandb.teardown()  # else the id counts as in use, and offline cannot have it
        self._run = self._init("offline", identity)
        self._sent = have
        self.where = f"offline; `wandb sync {os.path.relpath(self._folder / 'wandb')}/offline-run-*` sends it"

    def _init(self, mode: Literal["online", "offline"], identity: str) -> Any:
        import wandb

        wandb.setup(wandb.Settings(silent=True))  # the log-in speaks before it has seen the settings of the run
        while list(self._folder.glob(f"wandb/*run-{time.strftime('%Y%m%d_%H%M%S')}-{identity}")):
            time.sleep(0.1)  # W&B names folders by the second: two attempts in one would write into the same file
        run = wandb.init(
            id=identity, name=self._name, job_type="train", dir=self._folder, config=dict(self._config),
            project=self._track.project, entity=self._track.entity, group=self._track.group, tags=self._track.tags,
            mode=mode, resume="allow", settings=_settings(wandb.Settings),
        )  # fmt: skip
        run.define_metric("train/step")
        run.define_metric("*", step_metric="train/step")
        return run

    def _take(self, record: Mapping[str, Any]) -> None:
        step = record.get("step", 0)
        if record["kind"] in ("start", "restore"):
            known = _rows(lineage(read(self._folder / "journal.jsonl").records), upto=step)
            self._rows = {at: row for at, row in known.items() if at > self._sent}
            self._send(at for at in list(self._rows) if at < step)
        elif record["kind"] == "rollback":
            self._run.alert("Gone back", record["message"], level="WARN")
        elif record["kind"] == "end":
            self._exit_code = int(record.get("reason") == "failed")
        elif record.get("metrics") and (step > self._sent or record["kind"] == "save"):
            step = max(step, self._sent + 1)  # a save that ended behind the training stands where it ended
            self._rows.setdefault(step, {}).update(_numbers(record["metrics"]))
            if record["kind"] == "step":
                self._send(at for at in list(self._rows) if at <= step)

    def _send(self, steps: Iterable[int]) -> None:
        for step in sorted(steps):
            self._run.log({**self._rows.pop(step), "train/step": step}, step=step, commit=True)
            self._sent = step

    def _tell(self, line: str) -> None:
        self.notice = line
        if self._say is not None:
            self._say(line)

    def _fail(self, reason: str) -> None:
        if not self._off.is_set():
            self._off.set()
            self._tell(f"W&B: {reason}; left alone, the journal has everything")


def steps_in(path: Path) -> list[int]:
    """The `_step` of each row in a .wandb file, in order; up to its torn end, if it has one."""
    return [json.loads(row["_step"]) for row in rows_in(path) if "_step" in row]


def rows_in(path: Path) -> Iterator[dict[str, str]]:
    """The rows logged into a .wandb file: key to value in JSON."""
    from wandb.proto import wandb_internal_pb2

    for payload, _ in _frames(path.read_bytes()):
        record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
        record.ParseFromString(payload)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {item.key or "/".join(item.nested_key): item.value_json for item in items}


def _repair(path: Path) -> int:
    """Cuts a torn end off, where `wandb sync` would stop and leave out later segments; returns the last step."""
    content = path.read_bytes()
    end = max((end for _, end in _frames(content)), default=0)
    if 0 < end < len(content):
        os.truncate(path, end)
    return max(steps_in(path), default=-1)


def _frames(content: bytes) -> Iterator[tuple[bytes, int]]:
    """(payload, where it ends) of each whole record, up to the first torn one.

    The file is a LevelDB log with plain crc32: a head of 7 bytes, blocks of 32 KiB, in them parts of type 1 (a whole
    record), 2, 3, 4 (its first, middle, last part), each behind crc, length and type.
    """
    if content[:4] != b":W&B":
        return
    position, record = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        crc, length, kind = struct.unpack_from("<IHB", content, position)
        part = content[position + 7 : position + 7 + length]
        if kind == 0 or len(part) < length or zlib.crc32(bytes([kind]) + part) != crc:
            return
        position += 7 + length
        record = part if kind in (1, 2) else record + part
        if kind in (1, 4):
            yield record, position


def _rows(records: Iterable[Mapping[str, Any]], upto: int) -> dict[int, dict[str, float]]:
    """Metrics by step, of all that was recorded up to `upto` steps done, the evaluation after them included."""
    rows: dict[int, dict[str, float]] = {}
    for record in records:
        if record.get("metrics") and record["step"] <= upto:
            rows.setdefault(record["step"], {}).update(_numbers(record["metrics"]))
    return rows


def _numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def _mode(asked: str) -> str:
    """ "online", "offline" or "off". "auto": what WANDB_MODE says, else online where a key lies ready, else offline."""
    if asked == "auto":
        asked = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    return {"online": "online", "offline": "offline", "dryrun": "offline"}.get(asked, "off")


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if path and netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _identity(folder: Path) -> str:
    """The W&B id of this run, kept in run.json: the same in every attempt."""
    path = folder / "run.json"
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    if "wandb_id" not in known:
        known["wandb_id"] = secrets.token_hex(4)
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(known, indent=2) + "\n")
        draft.replace(path)
    return known["wandb_id"]


def _settings(kind: Any) -> Any:
    """W&B's settings. Those beginning with x_ are half private: the ones that a version does not know are left out."""
    wanted = {
        "x_transaction_log_flush_interval": 1.0,  # 15 s by default: a young run that is killed would be lost whole
        "init_timeout": INIT_SECONDS,
        "finish_timeout": CLOSE_SECONDS - 2,  # also honoured at the exit of the process
        "console": "off",
        "silent": True,
        "reinit": "create_new",  # leaves a run of the caller's own alone
        "x_file_stream_retry_max": 8,
        "x_file_stream_retry_wait_max_seconds": 15,
        "x_graphql_retry_max": 5,
        "x_graphql_retry_wait_max_seconds": 10,
        "x_file_transfer_retry_max": 3,
        "x_stats_sampling_interval": 15,
        "x_stats_track_process_tree": True,
    }
    return kind(**{name: value for name, value in wanted.items() if name in kind.model_fields})


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
