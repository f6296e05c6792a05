"""Two checkpoints side by side, tensor by tensor, whatever world sizes and ZeRO stages they were saved at.

    folder, folder -> the fragments of both (Reader), some at a time -> one `Difference` for each tensor

Names and offsets of fragments say nothing of ranks, so the same elements are found in both. A few MB of each are in
memory at a time. What it gives up: digests are not compared (`format.verify` does that), only what the tensors hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.checkpoint import format
from pipeline.checkpoint.fragments import Reader
from pipeline.checkpoint.manifest import Manifest
from pipeline.errors import CheckpointError

ELEMENTS = 1 << 20  # that are compared at once: 8 MB of each
_WHOLE = ("I64", "I32", "U8", "BOOL")  # dtypes compared as whole numbers


class Difference(NamedTuple):
    """How far one tensor of two checkpoints is apart; `differing` 0: equal to the bit.

    key: "master", "exp_avg", ...  absolute: largest |a - b|.  relative: largest |a - b| / max |a| of the whole tensor.
    Infinite where a number stands against one that is not finite.  missing: what only one has, or has in another shape.
    """

    name: str
    key: str
    elements: int
    differing: int
    absolute: float
    relative: float
    missing: str | None = None

    @property
    def equal(self) -> bool:
        return self.differing == 0 and self.missing is None


def compare(a: Path, b: Path) -> Iterator[Difference]:
    """One `Difference` for each tensor of the checkpoint folders `a` and `b`, in the order of their models.

    Raises CheckpointError when one of them cannot be read.
    """
    left, right = _manifest(a), _manifest(b)
    kinds = _kinds(left), _kinds(right)
    readers = Reader(a, left.fragments), Reader(b, right.fragments)
    for name in left.parameters | right.parameters:
        shapes = left.parameters.get(name), right.parameters.get(name)
        for key in kinds[0][name] | kinds[1][name]:
            dtypes = kinds[0][name].get(key), kinds[1][name].get(key)
            if None in dtypes or shapes[0] != shapes[1]:
                missing = _missing(a, b, key, dtypes, shapes)
                yield Difference(name, key, 0, 0, float("inf"), float("inf"), missing)
                continue
            whole = all(dtype in _WHOLE for dtype in dtypes)
            try:
                yield _compared(readers, name, key, prod(shapes[0] or ()), torch.int64 if whole else torch.float64)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{key} of {name!r} cannot be compared: {a} or {b}: {error}") from error


def _compared(readers: tuple[Reader, Reader], name: str, key: str, elements: int, dtype: torch.dtype) -> Difference:
    differing, absolute, largest = 0, 0.0, 0.0
    for start in range(0, elements, ELEMENTS):
        count = min(ELEMENTS, elements - start)
        x, y = torch.zeros(count, dtype=dtype), torch.zeros(count, dtype=dtype)
        for reader, target in zip(readers, (x, y)):
            reader.read_into(target, name, key, start)
        largest = max(largest, _largest(x))
        unequal = x.view(torch.int64) != y.view(torch.int64)  # tells 0 from -0, and a NaN equals itself
        if count := int(unequal.sum()):
            differing += count
            absolute = max(absolute, _largest(x[unequal].double() - y[unequal].double()))
    relative = absolute / largest if largest and largest != float("inf") else absolute and float("inf")
    return Difference(name, key, elements, differing, absolute, relative)


def _largest(values: Tensor) -> float:
    """Largest magnitude; infinite when one is not a number."""
    return float(values.double().abs().nan_to_num(float("inf"), float("inf")).max())


def _manifest(folder: Path) -> Manifest:
    try:
        return Manifest.from_bytes((folder / format.MANIFEST).read_bytes())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is no checkpoint that can be compared: {error}") from error


def _kinds(manifest: Manifest) -> dict[str, dict[str, str]]:
    """Name -> key -> dtype of what a checkpoint holds."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for place in manifest.fragments:
        found[place.parameter][place.key] = place.dtype
    return found


def _missing(a: Path, b: Path, key: str, dtypes: tuple[str | None, str | None], shapes: tuple[object, object]) -> str:
    if None in dtypes:
        return f"only {a if dtypes[1] is None else b} holds its {key}"
    return f"has the shape {shapes[0]} in {a} and {shapes[1]} in {b}"
