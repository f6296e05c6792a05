"""Sends a run's checkpoints to their second home, behind the training, and tidies up there.

What is pending follows from facts alone: a checkpoint that is whole here, that retention keeps, and whose manifest is
not there. So it survives a kill: the next start, or `millstream checkpoint upload`, goes on. The newest goes first. A
store that fails is tried again, with longer and longer pauses, for as long as the run lasts; the first failure of a row
is recorded and the rest are not. Retention holds in both places, so an outage does not fill the disk here: the newest
`checkpoint.keep` wait, older ones go as ever, only the one that is being sent stays until it has arrived.

What it gives up: one file at a time. A run may end with checkpoints still here only; it says so.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.checkpoint import format, rollbacks
from pipeline.checkpoint.format import MANIFEST, Listed, checkpoint_name
from pipeline.checkpoint.remote import Refused, Remote
from pipeline.checkpoint.retention import Retention
from pipeline.errors import CheckpointError

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.session import Session

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0


class Sent(NamedTuple):
    """One checkpoint's way to its second home. refused: why it will never be sent, None when it has arrived."""

    step: int
    bytes: int
    seconds: float
    refused: str | None = None


class _There(NamedTuple):
    digest: bytes
    metrics: Mapping[str, float]


class Outbox:
    """What is here and should be there. One thread at a time."""

    def __init__(self, folder: Path, home: Remote, rules: Retention) -> None:
        self.folder, self.home, self.rules = folder, home, rules
        self.sending: int | None = None
        self._there: dict[int, _There] = {}
        self._sure = False  # whether that is how it is there now
        self._refused: set[bytes] = set()

    def pending(self) -> list[Listed]:
        """What is to be sent, the newest first. Raises CheckpointError when the store cannot be asked."""
        if not self._sure:
            self._there, self._sure = self._look(), True
        return self._missing()

    def waiting(self) -> list[int]:
        """The steps of `pending` as far as that is known without asking the store."""
        return sorted(each.step for each in self._missing())

    def send(self) -> Iterator[Sent]:
        """Send all that is pending, and what becomes so meanwhile; after each delete there what no rule keeps.

        Raises CheckpointError when the store fails; what it held then is asked anew the next time.
        """
        try:
            pending = self.pending()
            if not pending:
                self._tidy()  # a kill may have come between the sending and this
            while pending:
                yield self._send_one(pending[0])
                self._tidy()
                pending = self.pending()
        except CheckpointError:
            self._sure = False
            raise
        finally:
            self.sending = None

    def _send_one(self, each: Listed) -> Sent:
        began, self.sending = time.perf_counter(), each.step
        content = _bytes_of(each)
        try:
            size = self.home.put(each.path)
        except Refused as error:
            self._refused.add(_digest(content))
            return Sent(each.step, 0, time.perf_counter() - began, str(error))
        assert each.manifest is not None
        self._there[each.step] = _There(_digest(content), each.manifest.metrics)
        return Sent(each.step, size, time.perf_counter() - began)

    def _missing(self) -> list[Listed]:
        there = dict(self._there)
        here = {each.step: each for each in format.list_checkpoints(self.folder) if each.manifest and not each.damage}
        metrics = {step: found.metrics for step, found in there.items()}
        metrics |= {step: each.manifest.metrics for step, each in here.items() if each.manifest}
        wanted = [here[step] for step in sorted(self.rules.kept(metrics) & here.keys(), reverse=True)]
        digests = {each.step: _digest(_bytes_of(each)) for each in wanted}
        arrived = {step: found.digest for step, found in there.items()}
        return [e for e in wanted if digests[e.step] not in {arrived.get(e.step), *self._refused}]

    def _look(self) -> dict[int, _There]:
        found, given_up = {}, rollbacks.given_up(self.folder)
        for step in self.home.steps():
            content = self.home.manifest(step) or b""
            manifest, _ = format.parse(checkpoint_name(step), lambda content=content: content)
            if given_up and given_up(manifest):
                self.home.delete(step)
            elif manifest is not None:
                found[step] = _There(_digest(content), manifest.metrics)
        return found

    def _tidy(self) -> None:
        """Delete there what no rule keeps, and what a cut upload has left of a step that is not to be sent any more."""
        stays = self.rules.kept({step: found.metrics for step, found in self._there.items()}) | {*self.waiting()}
        for step, files in self.home.folders().items():
            ours = step in self._there or MANIFEST not in files  # not one that a newer attempt has sent meanwhile
            if ours and step not in stays and step < max(self._there, default=0):
                self.home.delete(step)
                self._there.pop(step, None)


class Uploader:
    """The thread that sends. record: takes the journal's records `upload`, `upload_failed` and `upload_pending`."""

    def __init__(self, outbox: Outbox, record: Callable[..., None]) -> None:
        self._outbox, self._record = outbox, record
        self._wake, self._changed = threading.Event(), threading.Condition()
        self._asked, self._done, self._failure, self._closing = 1, 0, "", False
        self._thread = threading.Thread(target=self._work, name="uploader", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There may be something new to send."""
        with self._changed:
            self._asked += 1
        self._wake.set()

    def protected(self) -> list[int]:
        """The step that is being sent, which should not be deleted meanwhile."""
        return [] if self._outbox.sending is None else [self._outbox.sending]

    def finish(self, seconds: float) -> list[int]:
        """Wait until all has arrived, at most so long; the steps that have not, which are recorded."""
        self.wake()
        with self._changed:
            self._changed.wait_for(lambda: self._done >= self._asked, seconds)
        left = self._outbox.waiting() if self._done < self._asked else []
        if left:
            folder, url = self._outbox.folder, self._outbox.home.url
            many = "s" * (len(left) > 1)
            steps = f"checkpoint{many} of step{many} {', '.join(map(str, left))}"
            why = f" (last failure: {self._failure})" if self._failure else f", after {seconds:g} s"
            message = f"{steps} not at {url} yet{why}; whole in {folder}"
            mend = f"Send with: millstream checkpoint upload {folder.parent}"
            self._record("upload_pending", steps=left, message=f"{message}. {mend}")
        return left

    def close(self) -> None:
        """Let the thread end; one that waits for a store ends with the process."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout=1.0)

    def _work(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not self._closing:
            self._wake.clear()
            asked = self._asked
            try:
                for sent in self._outbox.send():
                    self._tell(sent)
                    pause = FIRST_PAUSE_SECONDS
                    if self._closing:
                        return
            except CheckpointError as error:
                if not self._failure:
                    step = max(self._outbox.waiting(), default=0)
                    self._record("upload_failed", step=step, message=f"{error}. It is tried again while the run lasts")
                self._failure = str(error)
                self._wake.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            self._failure = ""
            with self._changed:
                self._done = asked
                self._changed.notify_all()
            self._wake.wait()

    def _tell(self, sent: Sent) -> None:
        if sent.refused is None:
            self._failure = ""
            self._record("upload", step=sent.step, url=self._outbox.home.url, bytes=sent.bytes, seconds=sent.seconds)
        elif (self._outbox.folder / checkpoint_name(sent.step)).exists():  # else it was deleted while it was sent
            self._record("upload_failed", step=sent.step, message=sent.refused)


def home_of(config: Config, run: Path) -> Remote | None:
    """The second home of the checkpoints of the run in folder `run`, if it has one."""
    return Remote(config.checkpoint.url, run.name) if config.checkpoint.url else None


def sending(config: Config, session: Session) -> Uploader | None:
    """What sends this run's checkpoints; only on rank 0, and only where `checkpoint.url` is set."""
    home = home_of(config, session.run) if session.world.rank == 0 else None
    if home is None:
        return None
    uploader = Uploader(Outbox(session.run / "checkpoints", home, Retention.of(config)), session.record)
    session.owned.callback(uploader.close)
    return uploader


def _bytes_of(each: Listed) -> bytes:
    try:
        return (each.path / MANIFEST).read_bytes()
    except OSError:  # deleted since it was listed
        return b""


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
