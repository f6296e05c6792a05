"""Muon (Jordan 2024), by DeepSpeed's own implementation: matrices inside layers take steps that are near orthogonal.

    gradient of a whole matrix -> momentum -> Newton-Schulz -> step;  everything else of the network: AdamW

It looks at whole matrices, so under ZeRO only DeepSpeed itself can run it. At stage 0 each rank has them. At stage 3
gradients and momenta are gathered, matrix by matrix, and each rank keeps its piece of the momentum, as of any other
state. Both are held against an unsharded reference by a test. What it gives up, all refused by rules.py:

    stages 1 and 2     a matrix that two ranks share has its whole momentum on both, which is no piece of anything
    optim.clip         DeepSpeed cuts the norm of the orthogonal steps there, not that of the gradient
    offload            its momentum is stepped in another way, which nobody has held against the reference
    4-d convolutions   their update does not have their shape; they are stepped by AdamW
"""

from __future__ import annotations

from typing import Any

import torch

from pipeline.sections import Optim

CLASS = "CountedMuon"
MATRICES, OTHERS = ("momentum_buffer",), ("exp_avg", "exp_avg_sq")  # what is kept of each parameter


def build(config: Optim, groups: list[dict[str, Any]]) -> Any:
    """DeepSpeed's optimizer over `groups`, of which those with "use_muon" hold the matrices; learning rate 0."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # here: engine.py says first what it must

    for group in groups:
        group["lr"] = 0.0
        if group["use_muon"]:
            group |= {"momentum": config.momentum, "ns_method": "gram"}
        else:
            group |= {"betas": config.betas, "eps": config.eps}
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]

    class CountedMuon(MuonWithAuxAdam):
        """Counts the steps of matrices too, as checkpoints compare how many each part of the network has taken."""

        def step(self, *args: Any, **kwargs: Any) -> Any:
            with eager():
                loss = super().step(*args, **kwargs)
            for group in self.param_groups:
                for tensor in group["params"] if group["use_muon"] else ():
                    self.state[tensor]["step"] = self.state[tensor].get("step", 0) + 1
            return loss

    return CountedMuon(groups)


def eager() -> Any:
    """While it lasts Muon is not compiled, as DeepSpeed would have it, for minutes and each shape of a matrix."""
    return torch.compiler.set_stance("force_eager")


def state_keys(group: dict[str, Any]) -> tuple[str, ...]:
    """What is kept of the parameters of a group."""
    return MATRICES if group["use_muon"] else OTHERS
