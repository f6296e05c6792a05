"""Whether a run that was resumed is the run that was not: weights, optimizer, samples, learning rate, losses.

    last checkpoints (checkpoint/diff.py), journals -> one `Check` each: kept or not, how far apart, where

Promised is, at the same number of workers, equality to the bit in all of it. At another number samples and learning
rate are equal, and losses are as near as sums that are rounded in another order: of the 20 steps after the change the
first within 1e-6 relative in fp32 and the others within 1e-3, as a kink (ReLU, a maximum) can flip; 1e-2 in bf16 and
fp16. Weights and optimizer state are then compared, but how near they must be is not promised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.checkpoint.diff import Diff, Fact, TensorDifference, diff
from pipeline.errors import RunError
from pipeline.run import Run
from pipeline.track import journal

if TYPE_CHECKING:
    from pipeline.checkpoint.manifest import Manifest

FIRST, LATER, LOW_PRECISION = 1e-6, 1e-3, 1e-2
JUDGED_STEPS = 20  # after the change of workers
WEIGHTS = ("master", "value")  # keys of a checkpoint that are no optimizer's


class Check(NamedTuple):
    """One thing that was compared. kept: as promised.  equal: to the bit.  said: the outcome for people.

    absolute, relative: the largest differences; infinite where a tensor, a step or a number is missing.  where: the
    tensor, or step, that has the largest.
    """

    what: str
    kept: bool
    equal: bool
    said: str
    absolute: float = 0.0
    relative: float = 0.0
    where: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON has no infinity: there it is null."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in self._asdict().items()}


def compared(whole: Run, resumed: Run, step: int, total: int) -> list[Check]:
    """All checks of `resumed`, which went on from its checkpoint of `step`, beside `whole`; both of `total` steps."""
    a, b = _last(whole), _last(resumed)
    same = a[1].world_size == b[1].world_size
    left, right = _steps(whole), _steps(resumed)
    found = diff(a[0], b[0], (a[1], b[1]))
    samples, rates = _columns(left, right, total)
    if place := next((fact for fact in found.state if fact.name.startswith("data.")), None):
        samples = Check("samples", False, False, f"{place.name}: {_short(place.a)} became {_short(place.b)}")
    checks = [*_state(found, a[1], same), samples, rates, _losses(left, right, step, total, same, a[1].dtype)]
    at = _first_difference(left, right)
    if same and at < step:
        hint = f"; apart since step {at}, before the kill: something follows a clock or a counter, not step and seed"
        checks[-1] = checks[-1]._replace(said=checks[-1].said + hint)
    return checks


def _last(run: Run) -> tuple[Path, Manifest]:
    """(folder, manifest) of a run's last checkpoint."""
    listed = run.checkpoints()[-1]
    if listed.manifest is None:
        raise RunError(f"{listed.path} is damaged: {', '.join(map(str, listed.damage))}")
    return listed.path, listed.manifest


def _steps(run: Run) -> dict[int, dict[str, Any]]:
    """Step -> what the journal says of it: loss, learning rate, digest of its samples."""
    found = {}
    for record in journal.lineage(run.records()):
        if record["kind"] == "step":
            metrics = record["metrics"]
            loss = metrics.get("train/loss")  # not finite: null
            values = {"samples": record["samples"], "learning rate": metrics["optim/lr"]}
            found[record["step"]] = values | {"loss": math.nan if loss is None else loss}
    return found


def _state(found: Diff, manifest: Manifest, same: bool) -> list[Check]:
    """Weights and optimizer state."""
    stored = {(place.parameter, place.key) for place in manifest.fragments}
    checks = []
    for what, of_weights in (("weights", True), ("optimizer state", False)):
        facts = [fact for fact in found.state if _of_weights(fact) is of_weights]
        apart = [each for each in found.tensors if (each.key in WEIGHTS) is of_weights]
        checks.append(_tensors(what, facts, apart, sum((key in WEIGHTS) is of_weights for _, key in stored), same))
    return checks


def _of_weights(fact: Fact) -> bool | None:
    """Whether it is about weights or about the optimizer; None: neither."""
    kind = fact.name.partition(".")[0]
    if kind in ("shape", "tied"):
        return True
    if kind == "scalars":  # step counters, settings of the groups, loss scale
        return False
    key, of, _ = fact.name.partition(" of ")
    return key in WEIGHTS if of else None


def _tensors(what: str, facts: Sequence[Fact], apart: Sequence[TensorDifference], total: int, same: bool) -> Check:
    if facts:
        name, one, other = facts[0]
        said = f"{name}: {_short(one)} became {_short(other)}"
        return Check(what, False, False, said, math.inf, math.inf, name)
    if not apart:
        return Check(what, True, True, f"bit-equal, {total} tensors")
    worst = max(apart, key=lambda each: each.largest)
    relative, where = max(each.relative for each in apart), f"{worst.key} of {worst.parameter}"
    said = f"{len(apart)} of {total} tensors differ, by up to {worst.largest:.1e} ({where}), relatively {relative:.1e}"
    return Check(what, not same and math.isfinite(worst.largest), False, said, worst.largest, relative, where)


def _columns(whole: dict[int, dict[str, Any]], resumed: dict[int, dict[str, Any]], total: int) -> list[Check]:
    """Samples and learning rate, which are the same whatever the number of workers."""
    checks = []
    for what in ("samples", "learning rate"):
        apart = [k for k in range(total) if _value(whole, k, what) != _value(resumed, k, what)]
        said = f"equal in all {total} steps" if not apart else f"others in {len(apart)} steps, first in {apart[0]}"
        gaps = [abs(whole[k][what] - resumed[k][what]) for k in apart if k in whole and k in resumed]
        distance = max(gaps, default=math.inf) if apart and what != "samples" else 0.0
        where = f"step {apart[0]}" if apart else None
        checks.append(Check(what, not apart, not apart, said, distance, where=where))
    return checks


def _losses(
    whole: dict[int, dict[str, Any]], resumed: dict[int, dict[str, Any]], step: int, total: int, same: bool, dtype: str
) -> Check:
    steps = range(total) if same else range(step, min(total, step + JUDGED_STEPS))
    gaps = {k: _gap(_value(whole, k, "loss"), _value(resumed, k, "loss")) for k in steps}
    apart = [k for k in steps if gaps[k][1] > 0]
    told = f"{steps[0]} to {steps[-1]}"
    if not apart:
        return Check("loss curve", True, True, f"bit-equal, steps {told}")
    worst = max(apart, key=lambda k: gaps[k][1])
    absolute, relative = gaps[worst]
    said = f"differs in {len(apart)} steps, first in {apart[0]}, by up to {absolute:.1e} ({relative:.1e} relative)"
    kept = False
    if not same:
        low = dtype != "fp32"
        first, later = (LOW_PRECISION, LOW_PRECISION) if low else (FIRST, LATER)
        kept = gaps[steps[0]][1] <= first and relative <= later
        promise = f"{later:.0e}" if low else f"first {first:.0e}, later {later:.0e}"
        said = f"relative: first {gaps[steps[0]][1]:.1e}, largest {relative:.1e} in steps {told} (promise: {promise})"
    return Check("loss curve", kept, False, said, absolute, relative, f"step {worst}")


def _gap(a: float | None, b: float | None) -> tuple[float, float]:
    """(absolute, relative) difference; infinite when one is missing or not a number and the other is."""
    if a == b or (a is not None and b is not None and math.isnan(a) and math.isnan(b)):
        return 0.0, 0.0
    if a is None or b is None or not math.isfinite(a - b):
        return math.inf, math.inf
    return abs(a - b), abs(a - b) / abs(a) if a else math.inf


def _first_difference(whole: dict[int, dict[str, Any]], resumed: dict[int, dict[str, Any]]) -> float:
    """The first step whose records are not the same; infinite when all are."""
    apart = [k for k in whole | resumed if str(whole.get(k)) != str(resumed.get(k))]
    return min(apart, default=math.inf)


def _value(steps: dict[int, dict[str, Any]], step: int, what: str) -> Any:
    return steps[step][what] if step in steps else None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."
