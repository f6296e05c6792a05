"""Group norm in place of batch norm (Wu and He, 2018): no statistics over the batch, so no micro batch is too small
for it.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

GROUPS = 32  # Wu and He's choice; fewer when the channels do not divide by it


def group_norm_for_batch_norm(module: nn.Module) -> int:
    """Replace every batch norm below `module` by a group norm with the same weight and bias; returns how many there
    were.
    """
    replaced = 0
    for name, child in list(module.named_children()):
        if isinstance(child, _BatchNorm):
            setattr(module, name, _group_norm(child))
            replaced += 1
        else:
            replaced += group_norm_for_batch_norm(child)
    return replaced


def _group_norm(batch_norm: _BatchNorm) -> nn.GroupNorm:
    channels = batch_norm.num_features
    groups = next(groups for groups in range(min(GROUPS, channels), 0, -1) if channels % groups == 0)
    group_norm = nn.GroupNorm(groups, channels, eps=batch_norm.eps, affine=batch_norm.affine)
    if batch_norm.affine:
        group_norm.weight, group_norm.bias = batch_norm.weight, batch_norm.bias
    return group_norm
