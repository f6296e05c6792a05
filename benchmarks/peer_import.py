"""Imports a loader that imports torchvision, whose compiled part needs CUDA's libraries. The loaders do without it, but
torchvision itself must find the names of two of its operators.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import library

operators = library.Library("torchvision", "FRAGMENT")  # the definitions end with it


def load(name: str) -> Any:
    """A module such as streaming, litdata, or one inside them. Raises ImportError when it is not there."""
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            operators.define(f"{operator}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(name)
