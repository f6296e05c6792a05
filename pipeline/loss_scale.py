"""fp16's loss scale: a power of two on the loss, so that small gradients stay above the smallest number of fp16.

Dynamic (Micikevicius et al., "Mixed precision training", 2018): halved when a gradient overflows, which also skips the
step, and doubled after so many steps in a row without. DeepSpeed multiplies and divides by it; when it changes is said
here and not left to DeepSpeed, whose four scalers disagree: on how many overflows in a row halve it, on the least
scale, and all divide a step's gradient by the scale of the next one when it has just grown.

What it gives up: the scale begins at 2^16 and doubles every 1,000 steps; neither is a setting.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST, LEAST, STEPS_TO_GROW = 2.0**16, 1.0, 1000


@dataclass
class LossScale:
    """The scale of the next step, and how many steps in a row have been applied at it."""

    scale: float = FIRST
    good_steps: int = 0

    def after(self, applied: bool) -> float:
        """The scale after a step that was applied, or was skipped for an overflow (the same on all ranks)."""
        if not applied:
            self.scale, self.good_steps = max(self.scale / 2, LEAST), 0
        elif self.good_steps + 1 == STEPS_TO_GROW:
            self.scale, self.good_steps = self.scale * 2, 0
        else:
            self.good_steps += 1
        return self.scale
