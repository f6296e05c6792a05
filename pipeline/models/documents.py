"""Whether a network keeps documents in one row apart: positions that begin anew bound its attention.

transformers' causal networks, given `position_ids` that jump back to 0 and no mask, let a token see only those of its
own document (masking_utils: packed sequences). Networks that carry a state from token to token do not, nor do those
that take no positions, and none of them says so: so it is asked, and where weights are at hand it is tried.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import nn

from pipeline.errors import ConfigError

LONGEST = 4  # tokens of each of the two documents that are tried
LEAK = 1e-2  # of the change that a token of the same document makes; what is left then is rounding


def require(module: nn.Module) -> None:
    """Raises ConfigError when `module`, a causal language model of transformers, cannot keep documents apart.

    One forward pass of a few tokens tries it, unless parameters are on the meta device (a pretrained folder).
    """
    network: Any = module
    name, kinds = type(module).__name__, set(getattr(network.config.get_text_config(), "layer_types", None) or ())
    carries = getattr(network, "_is_stateful", False) or any(
        "attention" not in kind or "linear" in kind for kind in kinds
    )
    if carries or "position_ids" not in signature(network.forward).parameters:
        why = "carries a state over the whole row" if carries else "takes no positions"
        raise ConfigError(
            f"task.attention: {name} {why}, so documents in a row cannot be kept apart; use `attention: row`"
        )
    if not any(parameter.is_meta for parameter in module.parameters()) and not _apart(network):
        raise ConfigError(f"task.attention: {name} lets documents in a row see each other; use `attention: row`")


def _apart(module: Any) -> bool:
    """Whether the logits of a second document stay when the first one changes, as they do not when they are one."""
    training = module.training
    place = torch.arange(2 * LONGEST)
    tokens = torch.stack([place, place + (place < LONGEST)]) % module.config.get_text_config().vocab_size
    changes = []
    try:
        module.eval()
        for positions in (place % LONGEST, place):
            with torch.no_grad():
                logits = module(input_ids=tokens, position_ids=positions.expand(2, -1), use_cache=False).logits
            changes.append(float((logits[0] - logits[1])[LONGEST:].abs().max()))
    finally:
        module.train(training)
    return changes[0] <= LEAK * changes[1]
