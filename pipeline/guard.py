"""What to do when a step's gradient is not finite, its loss jumps, or its samples are bad.

    computed once more (does it repeat?) -> left as it was, samples named -> back to before the trouble -> stop

The engine has refused a step that is not finite: weights and optimizer are as before, on every rank and at every ZeRO
stage. Here it is decided whether the run goes on: by policy `skip`, up to so many in a row; by policy `stop`, never.
With fp16 an overflow is how the loss scale finds its level: it is counted apart and ends no run by itself, until the
scale can fall no further. A finite loss that is far above the recent ones (spikes.py) is told, or refused like one that
is not, before any weight has changed; or it is trained on, and the run goes back when it stays there. A gradient norm
that jumps is told only: clipping takes its length, and it is known when the weights have changed.

What is decided follows from numbers that all ranks have gathered and from `state`, which every checkpoint keeps. So all
ranks decide alike, and a run that was interrupted as one that was not. What it gives up: steps of the warm-up are no
measure of the later ones, so until half a window behind it nothing is called a jump.

A bad sample has been replaced by the rank that met it, if the policy is to substitute; here all ranks learn of it, so
that the decision holds everywhere and is replayed after a restart, and the run ends when there are too many.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.checkpoint import format as checkpoints
from pipeline.checkpoint import rollbacks
from pipeline.checkpoint.rollbacks import Rollback
from pipeline.data.fill import MicroBatch, Substitutes, Substitution
from pipeline.data.skipped import Window
from pipeline.engine import StepResult
from pipeline.errors import DataError, RunError
from pipeline.evaluate import flat, means
from pipeline.loss_scale import LEAST
from pipeline.run import newest_attempt
from pipeline.sections import Data, Guard
from pipeline.session import Session, World
from pipeline.spikes import Recent
from pipeline.tasks import Sums
from pipeline.track import journal

NOT_FINITE = "loss or gradient not finite"


class Judge:
    """The policy, what it has seen of the latest steps, and how many in a row were not as they should be.

    warmup: steps that are no measure of the others.  went_back: how often the run has gone back so far.
    """

    def __init__(self, policy: Guard, warmup: int = 0, went_back: int = 0) -> None:
        self.policy, self._warmup, self._went_back = policy, warmup, went_back
        self.losses, self.norms = self._recent(), self._recent()
        self.in_a_row, self._since = 0, 0
        self._refused = False

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as plain JSON."""
        recent = {"losses": [*self.losses.values], "norms": [*self.norms.values]}
        return {**recent, "in_a_row": self.in_a_row, "since": self._since}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on as the guard of a checkpoint did; one of an earlier version has kept nothing."""
        if state and self.policy.spike != "off":
            self.losses, self.norms = self._recent(state["losses"]), self._recent(state["norms"])
        self.in_a_row, self._since = state.get("in_a_row", 0), state.get("since", 0)

    def refuses(self, world: World, sums: Sums) -> bool:
        """Whether a step must not change the weights, by this rank's `sums` over its micro batches; the same on all.

        Only by policy `skip`: then all ranks gather their sums here.
        """
        self._refused = False
        if self.policy.spike == "skip" and self.losses.limit is not None:
            self._refused = self._jumps(means(sums, world.gather(flat(sums))).get("loss", math.nan))
        return self._refused

    def again(self, session: Session, step: int, result: StepResult) -> bool:
        """Whether to compute a step once more that was not applied: arithmetic that fails once may not fail again.

        Megatron-LM's rerun does so too (megatron/core/rerun_state_machine.py). fp16's overflow always repeats.
        """
        if result.applied or result.loss_scale is not None or not self.policy.recompute:
            return False
        if session.world.rank == 0:
            reason = "loss far above the recent ones" if self._refused else NOT_FINITE
            session.record("recompute", step=step, reason=reason)
        return True

    def judge(
        self, session: Session, step: int, result: StepResult, loss: float, batches: list[MicroBatch]
    ) -> Window | None:
        """Record a step that is not as it should be. `loss` is the mean over all ranks, so all of them decide alike.

        Returns the first and last step to leave out when the run has to go back to before them. Raises RunError, naming
        the step, when the policy ends the run.
        """
        finite, jumps = result.applied or self._refused, result.applied and self._jumps(loss)
        scale = result.loss_scale
        if not finite and scale is not None and scale > LEAST and math.isfinite(loss):
            session.record("skip", step=step, rank=session.world.rank, reason="fp16 overflow", loss_scale=scale)
            return None
        if result.applied and not jumps:
            self._ordinary(session, step, loss, result.grad_norm)
            return None
        self._since = self._since if self.in_a_row else step
        self.in_a_row += 1
        stays = self.in_a_row > self.policy.max_skipped
        numbers = [int(number) for micro in batches if not micro.filler for number in micro.numbers]
        facts: dict[str, Any] = {"step": step, "rank": session.world.rank, "samples": numbers}
        if finite:
            kind, facts["value"], facts["limit"] = "spike" if jumps else "skip", loss, self.losses.limit
            what = facts["reason"] = f"loss {_far_above(loss, self.losses)}"
        else:
            kind, facts["reason"], what = "skip", NOT_FINITE, f"loss {loss}, gradient not finite"
        session.record(kind, **facts)
        if jumps and stays and self.policy.spike == "warn":  # that is its level now
            self.losses, self.in_a_row = self._recent(), 0
            return None
        if (not finite and self.policy.non_finite == "stop") or (stays and self._went_back >= self.policy.rollbacks):
            raise RunError(
                f"step {step}: {what}, {self.in_a_row} step(s) in a row, gone back {self._went_back} time(s) before. "
                f"The samples are in the journal (kind: {kind}). Lower optim.lr, look at the samples, leave these "
                "steps out (data.skip_steps), or raise guard.max_skipped or guard.rollbacks."
            )
        return (max(0, self._since - self.policy.margin), step + self.policy.margin) if stays else None

    def empty(self, session: Session, step: int) -> None:
        """Record a step whose whole batch has no term in the loss: nothing was computed."""
        session.record("skip", step=step, rank=session.world.rank, reason="no term of the batch counts in the loss")

    def go_back(self, session: Session, step: int, window: Window) -> None:
        """Make it hold, for good, that the run goes on from before `window` and leaves it out; and record it.

        Nothing may be under way to the disk. Raises CheckpointError, on rank 0, when it cannot be made to hold, and
        RunError when all that was saved before the window has been deleted.
        """
        if session.world.rank > 0:
            return
        (first, last), root, number = window, session.run / "checkpoints", self._went_back + 1
        trouble = f"step {step}: {self.in_a_row} steps in a row not finite, or far above the recent ones"
        early = [each.step for each in checkpoints.list_checkpoints(root) if each.step <= first and not each.damage]
        records = [] if early else journal.read(session.run / "journal.jsonl").records
        if any(record["kind"] == "save" and record["step"] <= first for record in records):
            raise RunError(
                f"{trouble}, and no checkpoint from before step {first} is left to go back to. Start anew (--fresh) "
                f"with data.skip_steps=[[{first}, {last}]], or go on with a lower optim.lr"
            )
        rollbacks.add(root, Rollback(session.attempt, first, last), newest_attempt(session.run))
        to = max(early, default=0)
        message = f"{trouble}: going back to step {to}; steps {first} to {last} are left out"
        message += f" (time {number} of {self.policy.rollbacks})"
        session.record("rollback", step=first, last=last, from_step=step, to_step=to, number=number, message=message)

    def _ordinary(self, session: Session, step: int, loss: float, norm: float) -> None:
        """Note a step that was applied, and tell of a gradient norm that jumps."""
        self.in_a_row = 0
        if self.policy.spike == "off" or step < self._warmup or not math.isfinite(loss + norm):
            return
        limit = self.norms.limit
        if limit is not None and norm > limit and session.world.rank == 0:
            reason = f"gradient norm {_far_above(norm, self.norms)}"
            session.record("spike", step=step, rank=0, value=norm, limit=limit, reason=reason)
        self.norms.add(norm)
        self.losses.add(loss)

    def _jumps(self, loss: float) -> bool:
        limit = None if self.policy.spike == "off" else self.losses.limit
        return limit is not None and math.isfinite(loss) and loss > limit

    def _recent(self, values: Iterable[float] = ()) -> Recent:
        return Recent(self.policy.spike_window, self.policy.spike_power, values)


def _far_above(value: float, recent: Recent) -> str:
    return f"{value:.4g} far above the recent ones (median {recent.median:.4g}, limit {recent.limit:.4g})"


def share_substitutes(
    session: Session, step: int, batches: list[MicroBatch], substitutes: Substitutes, policy: Data
) -> None:
    """Tell all ranks what any of them has decided on bad samples of this step, and record it.

    Raises DataError, on all ranks, when more have been replaced than the policy allows.
    """
    names = [*policy.train]
    mine = [found for micro in batches if not micro.filler for found in micro.found]
    everyone = {found: None for rank in session.world.gather_objects(mine) for found in map(Substitution._make, rank)}
    for found in everyone:
        substitutes.setdefault((found.source, found.number), found.substitute)
        if session.world.rank == 0:
            facts = found._asdict() | {"source": names[found.source]}
            session.record("substitute", step=step, **facts)
    if len(substitutes) > policy.max_bad_samples:
        raise DataError(
            f"step {step}: {len(substitutes)} bad samples, data.max_bad_samples is {policy.max_bad_samples}. They are "
            "in the journal (kind: substitute); bring good copies of their shards back, or raise the limit. The last: "
            + next(reversed(everyone)).reason
        )
