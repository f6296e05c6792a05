"""What differs between two checkpoints: where they stand, how they were made, and every tensor, element by element.

Tensors are read by slices of the same elements from both sides, so world sizes and ZeRO stages may differ and memory
stays bounded, whatever the size of the model. What it gives up: speed, every byte of both is read once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.checkpoint.manifest import Manifest

if TYPE_CHECKING:
    import torch

SLICE_ELEMENTS = 1 << 21  # 8 MB of fp32 from each side at a time


class Fact(NamedTuple):
    """Something that is otherwise: its dotted name, and both values; `absent` where one side has no such thing."""

    name: str
    a: Any
    b: Any


class TensorDifference(NamedTuple):
    """One state of one parameter. elements: that differ in a bit, of `total`.

    largest: of |a - b|.  relative: the largest of |a - b| / max(|a|, |b|).  Infinite where a NaN or infinity stands
    against another value.
    """

    parameter: str
    key: str
    largest: float
    relative: float
    elements: int
    total: int


@dataclass(frozen=True)
class Diff:
    """`state`: what a run goes on from (step, shapes, counters, data).  `made`: how it came to be.  Both without what
    is equal; so are `tensors`, of `compared` in all.
    """

    state: list[Fact]
    made: list[Fact]
    tensors: list[TensorDifference]
    compared: int

    @property
    def equal(self) -> bool:
        """Whether both are the same state, to the bit; they may have been made in different ways."""
        return not self.state and not self.tensors


ABSENT = "absent"


def diff(
    a: Path,
    b: Path,
    manifests: tuple[Manifest, Manifest],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Diff:
    """Compare the checkpoints in the folders `a` and `b`. `progress` is told (elements done, of how many)."""
    one, other = manifests
    state = _facts(_state(one), _state(other))
    made = _facts(_made(one), _made(other))
    names = [name for name in one.parameters if one.parameters[name] == other.parameters.get(name)]
    keys = [{(place.parameter, place.key) for place in manifest.fragments} for manifest in manifests]
    both = sorted((name, key) for name, key in keys[0] & keys[1] if name in set(names))
    state += [Fact(f"{key} of {name}", "there", ABSENT) for name, key in sorted(keys[0] - keys[1])]
    state += [Fact(f"{key} of {name}", ABSENT, "there") for name, key in sorted(keys[1] - keys[0])]
    tensors = list(_tensors((a, b), manifests, both, progress))
    return Diff(state, made, [found for found in tensors if found.elements], len(both))


def _state(manifest: Manifest) -> dict[str, Any]:
    return _leaves(
        {
            "step": manifest.step,
            "shape": manifest.parameters,
            "tied": manifest.aliases,
            "scalars": manifest.scalars,
            "data": manifest.data,
        }
    )


def _made(manifest: Manifest) -> dict[str, Any]:
    return _leaves(
        {
            "attempt": manifest.attempt,
            "workers": manifest.world_size,
            "zero.stage": manifest.zero_stage,
            "dtype": manifest.dtype,
            "config": manifest.config,
            "versions": manifest.versions,
            "environment": manifest.environment,
            "metrics": manifest.metrics,
        }
    )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def _facts(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Fact]:
    pairs = ((name, a.get(name, ABSENT), b.get(name, ABSENT)) for name in {**a, **b})
    return [Fact(name, one, other) for name, one, other in pairs if one != other and not _both_nan(one, other)]


def _both_nan(a: Any, b: Any) -> bool:
    return isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)


def _tensors(
    folders: tuple[Path, Path],
    manifests: tuple[Manifest, Manifest],
    both: list[tuple[str, str]],
    progress: Callable[[int, int], None],
) -> Iterator[TensorDifference]:
    import torch

    from pipeline.checkpoint.fragments import Reader

    dtypes = {(p.parameter, p.key): _dtype(p.dtype) for manifest in manifests for p in manifest.fragments}
    sizes = {name: prod(shape) for name, shape in manifests[0].parameters.items()}
    done, every = 0, sum(sizes[name] for name, _ in both)
    with ExitStack() as files:
        readers = [files.enter_context(Reader(path, each.fragments)) for path, each in zip(folders, manifests)]
        for name, key in both:
            found = TensorDifference(name, key, 0.0, 0.0, 0, sizes[name])
            for start in range(0, sizes[name], SLICE_ELEMENTS):
                numel = min(SLICE_ELEMENTS, sizes[name] - start)
                sides = [torch.empty(numel, dtype=dtypes[name, key]) for _ in readers]
                for reader, side in zip(readers, sides):
                    reader.read_into(side, name, key, start)
                found = _widened(found, *sides)
                done += numel
                progress(done, every)
            yield found


def _widened(found: TensorDifference, a: torch.Tensor, b: torch.Tensor) -> TensorDifference:
    """`found` with one more slice of both sides; NaN of the same bits are equal."""
    import torch

    same = (a.view(torch.uint8) == b.view(torch.uint8)).view(len(a), -1).all(dim=1)
    if bool(same.all()):
        return found
    x, y = a[~same].double(), b[~same].double()
    far = torch.nan_to_num((x - y).abs(), nan=math.inf)
    ratio = torch.nan_to_num(far / torch.maximum(x.abs(), y.abs()), nan=math.inf)
    ratio = torch.where(far == 0, 0.0, ratio)  # 0 and -0
    return found._replace(
        largest=max(found.largest, float(far.max())),
        relative=max(found.relative, float(ratio.max())),
        elements=found.elements + len(x),
    )


def _dtype(word: str) -> torch.dtype:
    from pipeline.models.tensor_file import DTYPES

    return DTYPES[word]
