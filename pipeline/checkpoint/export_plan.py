"""What an export writes: every tensor of the folder, where it comes from, and at which byte of which file it goes.

    manifest.network -> the network without memory -> names and shapes, compared with the manifest's -> files

All of it follows from the manifest, so whatever cannot be exported is refused before a byte of weights is read. What
it gives up: a network whose layers were exchanged after transformers had built it is refused, as it would be opened
as another network, half of it right.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.checkpoint.fragments import check_coverage
from pipeline.checkpoint.manifest import Manifest
from pipeline.errors import CheckpointError, MillstreamError
from pipeline.models import exported, tensor_file

State = Literal["master", "ema"]
VALUE = "value"  # key of what has no optimizer: frozen parameters and buffers


class Output(NamedTuple):
    """One tensor of the folder: its values from byte `begin` of `file`; `constant`: they are known already."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    begin: int
    constant: Tensor | None


class Wanted(NamedTuple):
    """One fragment of a rank file: elements from `start` on, of `dtype` in safetensors' words, for these outputs."""

    start: int
    dtype: str
    outputs: list[Output]


class _Tensor(NamedTuple):
    """One tensor of the folder before it has a place; `parameter`: its name in the manifest, with the key to take."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parameter: str | None
    key: str
    constant: Tensor | None


@dataclass(frozen=True)
class Plan:
    """`files`: name -> (how it begins, its size in bytes); `wanted`: rank file -> name of a fragment -> what of it."""

    module: nn.Module
    dtype: torch.dtype
    state: State
    outputs: list[Output] = field(default_factory=list)
    files: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    wanted: dict[str, dict[str, Wanted]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all tensor files."""
        return sum(size for _, size in self.files.values())

    @property
    def index(self) -> dict[str, Any] | None:
        """What the library wants to know when there are several files."""
        if len(self.files) == 1:
            return None
        total = sum(prod(output.shape) * output.dtype.itemsize for output in self.outputs)
        places = {each.name: PurePosixPath(each.file).name for each in self.outputs}  # beside the index
        return {"metadata": {"total_size": total}, "weight_map": places}


def make_plan(path: Path, manifest: Manifest, dtype: torch.dtype, state: State, shard_bytes: int) -> Plan:
    """The plan for the checkpoint in `path`, in files of at most `shard_bytes` where no single tensor is larger.

    Raises CheckpointError when the network is neither transformers' nor diffusers' own, or the checkpoint has not all
    of its state.
    """
    if not manifest.network:
        raise CheckpointError(
            f"not exported: the network in {path} is one of neither transformers nor diffusers, so no "
            "`from_pretrained` could open it. It opens in Python, wherever its task can be imported: "
            f"pipeline.checkpoint.weights.load(pathlib.Path({str(path)!r})).module"
        )
    try:
        module = exported.rebuild(manifest.network)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, MillstreamError) as error:
        raise CheckpointError(f"not exported: the network in {path} cannot be built here: {error}") from error
    tensors = _tensors(path, manifest, module, dtype, state)
    plan = Plan(module, dtype, state)
    for file, members in _shards(tensors, shard_bytes, exported.weights_name(module)).items():
        head, places = tensor_file.header({each.name: (each.dtype, each.shape) for each in members})
        plan.files[file] = head, max((place.end for place in places.values()), default=len(head))
        plan.outputs.extend(
            Output(each.name, each.dtype, each.shape, file, places[each.name].begin, each.constant) for each in members
        )
    _find_fragments(manifest, plan, tensors)
    return plan


def _tensors(path: Path, manifest: Manifest, module: nn.Module, dtype: torch.dtype, state: State) -> list[_Tensor]:
    """Every tensor that the library expects; raises CheckpointError when they are not those of the checkpoint."""
    has: dict[str, set[str]] = defaultdict(set)
    for place in manifest.fragments:
        has[place.parameter].add(place.key)
    if state == "ema" and not any("ema" in keys for keys in has.values()):
        raise CheckpointError(
            f"not exported: {path} keeps no running averages of the weights; leave --ema out to get the weights "
            "themselves, or train with averages"
        )
    kinds = {f"{name}.{each}": layer for name, layer in module.named_modules() for each in layer._buffers}
    found, wrong = [], []
    for name, (own, tensor) in exported.stored(module).items():
        source, shape = manifest.aliases.get(own, own), tuple(tensor.shape)
        cast = dtype if tensor.is_floating_point() else tensor.dtype
        if source in manifest.parameters:
            if manifest.parameters[source] != shape:
                wrong.append(f"{own} is {list(manifest.parameters[source])} in it, not {list(shape)}")
            key = next(each for each in (state, "master", VALUE) if each in has[source])
            if state == "ema" and key == "master":
                wrong.append(f"{own} has no running average in it")
            found.append(_Tensor(name, cast, shape, source, key, None))
        elif own.endswith("num_batches_tracked"):
            found.append(_Tensor(name, tensor.dtype, shape, None, VALUE, torch.tensor(manifest.step)))
        elif isinstance(tensor, nn.Parameter) or isinstance(kinds.get(own), _BatchNorm):
            wrong.append(f"{own} is not in it")
        else:  # a table that follows from the configuration, and that nothing trains
            found.append(_Tensor(name, cast, shape, None, VALUE, tensor.to(cast)))
    used = {each.parameter for each in found}
    wrong += [f"{name} of it is unknown there" for name in manifest.parameters if name not in used]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"not exported: {path} is not the {type(module).__name__} that {exported.package(module)} builds, which "
            "would open as another network (were its layers exchanged, as `task.norm: group` does?): "
            f"{'; '.join(wrong[:3])}{more}"
        )
    return found


def _shards(tensors: list[_Tensor], shard_bytes: int, stem: str) -> dict[str, list[_Tensor]]:
    """The tensors of each file, in order; a file is full when the next tensor would not fit."""
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for each in tensors:
        nbytes = prod(each.shape) * each.dtype.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(each)
        size += nbytes
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _find_fragments(manifest: Manifest, plan: Plan, tensors: list[_Tensor]) -> None:
    """Fill in `plan.wanted`; raises CheckpointError when an element is missing or there twice."""
    outputs: dict[tuple[str, str], list[Output]] = defaultdict(list)
    for each, output in zip(tensors, plan.outputs, strict=True):
        if each.parameter is not None:
            outputs[each.parameter, each.key].append(output)
    places = [place for place in manifest.fragments if (place.parameter, place.key) in outputs]
    shapes = {name: manifest.parameters[name] for name, _ in outputs}
    check_coverage(shapes, {name: (key,) for name, key in outputs}, places)
    for place in places:
        wanted = Wanted(place.start, place.dtype, outputs[place.parameter, place.key])
        plan.wanted.setdefault(place.file, {})[place.tensor] = wanted
