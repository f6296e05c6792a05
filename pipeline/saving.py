"""When a run is saved and what becomes of it: written behind training, sent to a second home, old ones deleted, told.

    due -> begin -> (forward, backward) -> hold -> (step ...) -> advance, when all have written -> recorded; finish

What it gives up: a save that fails is told a few steps after it began.
"""

from __future__ import annotations

from pipeline.checkpoint import uploads
from pipeline.checkpoint.cadence import Cadence
from pipeline.checkpoint.retention import Keeper, Retention
from pipeline.checkpoint.saver import Saved, Saver
from pipeline.config import Config
from pipeline.data.stream import Stream
from pipeline.errors import CheckpointError
from pipeline.guard import Judge
from pipeline.learner import Learner
from pipeline.run import newest_attempt
from pipeline.session import Session
from pipeline.track import journal


class Saving:
    """The saves of one attempt, which went on from step `restored` (None: from the start). All ranks call alike."""

    def __init__(
        self, config: Config, session: Session, learner: Learner, data: Stream, judge: Judge, restored: int | None
    ) -> None:
        self._config, self._session, self._learner, self._data, self._judge = config, session, learner, data, judge
        self._saved = restored  # the step whose checkpoint is there, or under way
        world, folder, rule = session.world, session.run / "checkpoints", config.checkpoint
        tells = world.rank == 0 and rule.every == "auto"  # a long run's journal is not read for nothing
        records = journal.read(session.run / "journal.jsonl").records if tells else []
        self._cadence = Cadence(world, rule, restored or 0, records)
        self._uploader = uploads.sending(config, session)
        keeper = Keeper(folder, Retention.of(config), self._uploader.protected if self._uploader else tuple)
        self._saver = Saver(
            learner.engine,
            world,
            folder,
            config,
            attempt=session.attempt,
            before=session.flush,
            newest_attempt=lambda: newest_attempt(session.run),
            committed=self._uploader.wake if self._uploader else lambda: None,
            prune=keeper.prune,
            copies=rule.background,
        )
        session.owned.callback(self._saver.close)

    @property
    def ready(self) -> bool:
        """Whether this rank has written its part; once all are, `advance` has something to do."""
        return self._saver.ready

    def due(self, step: int) -> bool:
        """Whether to save after `step` steps; the last one always."""
        return step == self._config.steps or self._cadence.due(step)

    def begin(self, step: int, last: bool = False) -> None:
        """Begin to save the state after `step` steps. A disk that refuses is recorded, and raises at the last step."""
        self._session.phase("commit", step)
        self._settle(self._saver.finish(), last)  # the one before, if it is still under way
        self._session.phase("save", step)
        scored = self._learner.scores if self._learner.scored_step == step else {}
        refused = self._saver.begin(
            step,
            data=self._data.state,
            buffers=self._learner.running.values,
            metrics=scored,
            guard=self._judge.state,
        )
        self._cadence.began(step)
        self._saved = step
        self._settle(refused, last)
        if not self._config.checkpoint.background:
            self._settle(self._saver.finish(), last)

    def hold(self) -> None:
        """Call before a step: it must not change what is still being copied."""
        self._saver.hold()

    def advance(self) -> None:
        """Commit what all ranks have written."""
        self._settle(self._saver.advance())

    def settle(self, step: int) -> None:
        """Wait for what is under way, if anything is; begin nothing."""
        self._session.phase("commit", step)
        self._settle(self._saver.finish())

    def finish(self, step: int) -> None:
        """See to it that the state after `step` steps is saved, and sent. Raises CheckpointError when it cannot be."""
        if self._saved != step:
            self.begin(step, last=True)
        self._session.phase("commit", step)
        self._settle(self._saver.finish(), last=True)
        if self._uploader:
            self._session.phase("upload", step)
            self._uploader.finish(self._config.checkpoint.upload_wait_seconds)

    def _settle(self, saved: Saved | None, last: bool = False) -> None:
        """Record how a save ended. One that failed raises CheckpointError if it was the last; else training goes on."""
        if saved is None:
            return
        first_rank, session = self._session.world.rank == 0, self._session
        if saved.path is None:
            self._saved = None
            if last:
                raise CheckpointError(saved.failure or "")
            if first_rank:
                session.record("save_failed", step=saved.step, message=saved.failure)
            return
        # The last one was waited for, which says nothing of one behind the training.
        learnt = None if last else self._cadence.learn(saved, session.phases.step_seconds)
        if first_rank:
            metrics = {
                "checkpoint/save_seconds": saved.seconds,
                "checkpoint/blocked_seconds": saved.blocked_seconds,
                "checkpoint/bytes": saved.bytes,
            }
            removed = [old.name for old in saved.removed]
            session.record("save", step=saved.step, path=saved.path.name, metrics=metrics, removed=removed)
            if learnt is not None:
                session.record("cadence", step=saved.step, **learnt._asdict())
