"""What the person at the terminal sees: one progress bar, a line for each event, a summary at the end.

Fed with the journal's records by the driver, and by nothing else, so it shows exactly what is recorded. Without a
terminal (a log file, CI) the bar becomes one line every ten seconds.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console as Terminal
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipeline.config import Config
from pipeline.data.vocabulary import xz_bits_per_byte
from pipeline.track import goodput, summary

LINE_SECONDS = 10.0


class Console:
    """The terminal of one run. Use as a context manager around all attempts."""

    def __init__(self, config: Config, folder: Path, stream: TextIO) -> None:
        self.config, self.folder = config, folder
        self.terminal = Terminal(file=stream, highlight=False, soft_wrap=True)
        self.bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.terminal,
            disable=not self.terminal.is_terminal,
            transient=True,
        )
        self._task: TaskID | None = None
        self._line_at = 0.0
        self._began = time.monotonic()

    def __enter__(self) -> Console:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def say(self, text: str, style: str = "") -> None:
        """One line above the bar."""
        self.terminal.print(escape(text), style=style)

    def show(self, record: Mapping[str, Any]) -> None:
        """Show one record of the journal."""
        match record["kind"]:
            case "attempt":
                self._heading(record["attempt"], record["workers"])
            case "failure":
                self.say(record["message"], style="yellow" if record["exit_code"] in (None, 75) else "red")
            case "resize":
                self.say(record["message"], style="yellow")
            case "start":
                window = f"shuffled in windows of {record['window_bytes'] / 1e6:,.1f} MB per worker"
                self.say(f"training from step 0: {record['parameters']:,} parameters; {record['data']}, {window}")
                for note in record["notes"]:
                    self.say(note)
            case "restore":
                self.say(f"going on from step {record['step']}" + "".join(f"; {note}" for note in record["notes"]))
            case "step":
                self._progress(record)
            case "evaluation":
                self.say(f"step {record['step']:>6}  " + "  ".join(metric_texts(record["metrics"])))
            case "save":
                metrics = record["metrics"]
                size, seconds = metrics["checkpoint/bytes"] / 1e6, metrics["checkpoint/save_seconds"]
                waited = f"{metrics['checkpoint/blocked_seconds']:.2f} s of it waited for"
                self.say(
                    f"step {record['step']:>6}  checkpoint, {size:,.1f} MB in {seconds:.2f} s, {waited}", style="dim"
                )
            case "save_failed":
                self.say(f"step {record['step']:>6}  {record['message']}. Training goes on.", style="red")
            case "upload":
                size, url = record["bytes"] / 1e6, record["url"]
                self.say(f"step {record['step']:>6}  sent to {url}, {size:,.1f} MB in {record['seconds']:.2f} s", "dim")
            case "upload_failed":
                self.say(f"step {record['step']:>6}  not sent: {record['message']}. Training goes on.", style="yellow")
            case "upload_pending":
                self.say(record["message"], style="bold yellow")
            case "skip":
                self.say(f"step {record['step']:>6}  skipped: {record['reason']}", style="yellow")
            case "spike" if record["rank"] == 0:
                self.say(f"step {record['step']:>6}  {record['reason']}", style="yellow")
            case "left_out":
                self.say(f"steps {record['step']} to {record['last']} are left out", style="dim")
            case "rollback":
                self.say(record["message"], style="bold yellow")
            case "recompute":
                self.say(f"step {record['step']:>6}  computed once more: {record['reason']}", style="yellow")
            case "cadence":
                self.say(
                    f"step {record['step']:>6}  from now on a checkpoint every {record['every']} steps", style="dim"
                )
            case "substitute":
                self.say(f"step {record['step']:>6}  bad sample replaced: {record['reason']}", style="yellow")
            case "slow":
                self.say(f"step {record['step']:>6}  {record['message']}", style="yellow")
            case "warning":
                self.say(f"warning: {record['message']}", style="yellow")

    def _heading(self, attempt: int, workers: int) -> None:
        c = self.config
        who = "one plain process" if workers == 0 else f"{workers} worker{'s' * (workers > 1)}"
        what = f"{c.steps:,} steps of {c.global_batch_size} samples, {who}, ZeRO-{c.zero.stage}, {c.precision.dtype}"
        self.say(f"{c.name}: {what}; run folder {relative(self.folder)}, attempt {attempt}", style="bold")

    def _progress(self, record: Mapping[str, Any]) -> None:
        metrics, done = record["metrics"], record["step"] + 1
        loss = metrics.get("train/loss")
        text = f"loss {math.nan if loss is None else loss:.4f}"
        text += f"  {metrics['throughput/samples_per_second']:,.0f} samples/s"
        if self._task is None:
            self._task = self.bar.add_task(text, total=self.config.steps, completed=done)
        self.bar.update(self._task, completed=done, description=text)
        now = time.monotonic()
        if not self.terminal.is_terminal and now - self._line_at > LINE_SECONDS:
            self._line_at = now
            self.say(f"step {done:>6}/{self.config.steps}  {text}")

    def end(self, code: int, records: Sequence[Mapping[str, Any]], tracking: str | None) -> None:
        """The summary: what came out, where it lies, what to do next. `code` is the command's exit code."""
        self.bar.stop()
        wanted = self.config.evaluate
        facts = summary.summary(records, wanted.best, wanted.mode)
        outcome = {0: "done", 75: "stopped and saved"}.get(code, "given up")
        restarts = sum(record["kind"] == "attempt" and record["restarts"] > 0 for record in records)
        again = f", {restarts} restart{'s' * (restarts > 1)}" if restarts else ""
        took = time.monotonic() - self._began
        self.say(f"{outcome}: step {facts['last_step']} of {self.config.steps}, {took:,.0f} s{again}", style="bold")
        for metric, value, best, at in facts["evaluations"]:
            beside = self._compressor(metric)
            self.say(f"  {metric:<22} {value:.4f}   (best {best:.4f} at step {at}{beside})")
        if facts["samples_per_second"]:
            speed = f"{facts['samples_per_second']:,.0f} samples/s"
            wait = facts["data_wait_share"] or 0.0
            self.say(f"  speed                  {speed}, {wait:.1%} of the time waiting for data")
        if spent := [f"{kind} {share:.1%}" for kind, share in goodput.shares(records).items() if share >= 0.0005]:
            self.say(f"  time of all workers    {', '.join(spent)}")
        saved = [record for record in records if record["kind"] == "save"]
        here = relative(self.folder)
        weights = f"{here}/checkpoints/{saved[-1]['path']}" if saved else "none saved yet"
        self.say(f"  weights                {weights}")
        self.say(f"  metrics                {here}/journal.jsonl")
        if any((self.folder / "logs").glob("*")):  # one process writes none
            self.say(f"  logs                   {here}/logs")
        if tracking:
            self.say(f"  W&B                    {tracking}")
        then = f"millstream report {here}  |  millstream evaluate {here}"
        if code:
            then = "the same command again goes on" + ("; first mend what is said above" if code == 1 else "")
        self.say(f"  next                   {then}")

    def _compressor(self, metric: str) -> str:
        """What xz makes of the same text, beside bits per byte, where the packer has measured it."""
        name, _, kind = metric.rpartition("/")
        if kind != "bits_per_byte" or name not in self.config.data.evaluate:
            return ""
        place = self.config.data.evaluate[name]
        bits = xz_bits_per_byte(place) if isinstance(place, Path) else None
        return f"; xz -9 on the same text: {bits:.4f}" if bits else ""

    def already_done(self) -> None:
        self.say(
            f"{relative(self.folder)} is finished: {self.config.steps} steps. "
            "--fresh trains anew in a folder beside it; a larger steps=N goes on further."
        )


class Lines(Console):
    """The same for programs: a JSON object a line. The journal's records (schema.py) as they come; what is said beside
    them (kind: said, message); at the end the command's exit code (kind: exit, code).
    """

    def __enter__(self) -> Lines:
        return self

    def say(self, text: str, style: str = "") -> None:
        self.show(dict(kind="said", message=text))

    def show(self, record: Mapping[str, Any]) -> None:
        print(json.dumps(record), file=self.terminal.file, flush=True)

    def end(self, code: int, records: Sequence[Mapping[str, Any]], tracking: str | None) -> None:
        self.show(dict(kind="exit", code=code))


def metric_texts(metrics: Mapping[str, float | None]) -> list[str]:
    """Evaluation metrics as short words: "test/accuracy 0.9861"."""
    return [
        f"{name.removeprefix('eval/')} {value if value is not None else math.nan:.4f}"
        for name, value in metrics.items()
    ]


def relative(path: Path) -> str:
    """The path as the person would type it here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
