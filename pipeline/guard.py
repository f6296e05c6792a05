"""What to do when a step's gradient is not finite, or its samples are bad.

The engine has already refused such a step: weights and optimizer are as before, on every rank and at every ZeRO
stage. Here it is decided whether the run goes on: by policy `skip`, up to so many in a row; by policy `stop`, never.
The samples are named, so that a bad one can be found. With fp16 an overflow is how the loss scale finds its level: it
is counted apart and ends no run by itself, until the scale can fall no further.

A bad sample has been replaced by the rank that met it, if the policy is to substitute; here all ranks learn of it, so
that the decision holds everywhere and is replayed after a restart, and the run ends when there are too many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.data.fill import MicroBatch, Substitutes, Substitution
from pipeline.engine import StepResult
from pipeline.errors import DataError, RunError
from pipeline.loss_scale import LEAST
from pipeline.sections import Data, Guard
from pipeline.session import Session


@dataclass
class NonFinite:
    """The policy, and how many steps in a row it has skipped."""

    policy: Guard
    in_a_row: int = 0

    def judge(self, session: Session, step: int, result: StepResult, loss: float, batches: list[MicroBatch]) -> None:
        """Record a step that was not applied. `loss` is the mean over all ranks, so that all of them decide alike.

        Raises RunError, naming the step, when the policy ends the run.
        """
        if result.applied:
            self.in_a_row = 0
            return
        if result.loss_scale is not None and result.loss_scale > LEAST and math.isfinite(loss):
            session.record(
                "skip", step=step, rank=session.world.rank, reason="fp16 overflow", loss_scale=result.loss_scale
            )
            return
        self.in_a_row += 1
        numbers = [int(number) for micro in batches if not micro.filler for number in micro.numbers]
        session.record(
            "skip", step=step, rank=session.world.rank, reason="loss or gradient not finite", samples=numbers
        )
        if self.policy.non_finite == "stop" or self.in_a_row > self.policy.max_skipped:
            raise RunError(
                f"step {step}: loss {loss}, gradient not finite, {self.in_a_row} step(s) in a row. The weights are "
                "those from before. The samples are in the journal (kind: skip). Lower optim.lr, look at the samples, "
                "or raise guard.max_skipped."
            )

    def again(self, session: Session, step: int, result: StepResult) -> bool:
        """Whether to compute a step once more that was not applied: arithmetic that fails once may not fail again.

        Megatron-LM's rerun does so too (megatron/core/rerun_state_machine.py). fp16's overflow always repeats.
        """
        if result.applied or result.loss_scale is not None or not self.policy.recompute:
            return False
        if session.world.rank == 0:
            session.record("recompute", step=step, reason="loss or gradient not finite")
        return True

    def empty(self, session: Session, step: int) -> None:
        """Record a step whose whole batch has no term in the loss: nothing was computed."""
        session.record("skip", step=step, rank=session.world.rank, reason="no term of the batch counts in the loss")


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
