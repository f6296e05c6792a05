"""The engine's state as named flat fragments, out of it and back in, at any number of ranks and any ZeRO stage.

    engine -> capture -> Snapshot (views) -> fragments.file_chunks -> rank-00000.safetensors, one file per rank
    files -> fragments.Reader -> restore -> masters and optimizer tensors -> low-precision weights -> checks

A fragment is elements [start, start + numel) of one flattened parameter's `master`, `exp_avg`, `ema`, ... Because names
and offsets say nothing of ranks, a load at another world size or stage reads the slices it needs; nothing is converted.
State that every rank holds whole is compared by digest first, and each rank writes an equal slice of it. What it gives
up: only the optimizers of optim.py; weights in low precision without fp32 masters do not occur and are refused.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import xxhash
from torch import Tensor

from pipeline.checkpoint import layouts
from pipeline.checkpoint.fragments import Fragment, Reader, bytes_of, check_coverage
from pipeline.checkpoint.manifest import FragmentPlace, Manifest
from pipeline.engine import Engine
from pipeline.errors import CheckpointError
from pipeline.loss_scale import LossScale
from pipeline.optim import EMA
from pipeline.session import World

Result = TypeVar("Result")


class Rounded(NamedTuple):
    """Weights that the forward pass reads and that must be the rounded master: fragment number `master`, 1-d."""

    master: int
    weights: Tensor


@dataclass(frozen=True)
class Snapshot:
    """This rank's fragments, and what is the same on all ranks: full shapes, keys, other names, numbers.

    rounded: what `check_rounding` compares, in a thread if these are copies.
    """

    fragments: list[Fragment]
    rounded: list[Rounded]
    parameters: dict[str, tuple[int, ...]]
    keys: dict[str, tuple[str, ...]]
    aliases: dict[str, str]
    scalars: dict[str, Any]

    @property
    def bytes(self) -> int:
        return sum(f.tensor.numel() * f.tensor.element_size() for f in self.fragments)


def capture(engine: Engine, buffers: Mapping[str, Tensor]) -> Snapshot:
    """Everything that must be kept to go on, parameters without copying: valid until the next step changes them. All
    ranks call it together.

    `buffers` are tensors beside the module's own, equal on all ranks (running statistics). Raises CheckpointError when
    ranks that should hold the same do not. Whether the weights of the forward pass are the rounded masters is left to
    `check_rounding`.
    """
    buffers = {**layouts.buffers(engine), **buffers}
    found = list(layouts.pieces(engine))
    agree(engine.world, next(filter(None, map(_without_master, found)), None))
    whole = [(p, Fragment(p.name, key, p.start, t)) for p in found for key, t in p.state.items()]
    flat = ((name, tensor.detach().reshape(-1).clone()) for name, tensor in buffers.items())  # a forward may change it
    whole += [(layouts.Piece(name, 0, (), {}, True), Fragment(name, layouts.VALUE, 0, t)) for name, t in flat]
    scalars = _scalars(engine)
    _check_replicas(engine, [fragment for piece, fragment in whole if piece.replicated], scalars)
    fragments, rounded = [], []
    for piece, fragment in whole:
        begin, end = _share(fragment.numel, engine.world) if piece.replicated else (0, fragment.numel)
        if begin < end:
            if fragment.key == layouts.MASTER:
                rounded += [Rounded(len(fragments), weights[begin:end]) for weights in piece.weights]
            tensor = fragment.tensor[begin:end]
            fragments.append(Fragment(fragment.name, fragment.key, fragment.start + begin, tensor))
    rounded = [each for each in rounded if each.weights.data_ptr() != fragments[each.master].tensor.data_ptr()]
    return Snapshot(fragments, rounded, *_expected(engine, buffers), layouts.aliases(engine), scalars)


def check_rounding(snapshot: Snapshot) -> None:
    """Raises UnfitState when what the forward pass reads is not the rounded masters of the snapshot."""
    for number, weights in snapshot.rounded:
        master = snapshot.fragments[number]
        if not torch.equal(weights, master.tensor.to(weights)):
            raise UnfitState(_not_rounded(master.name))


class UnfitState(CheckpointError):
    """The state itself is wrong, not the writing of it; training on would lose more than a checkpoint."""


def restore(engine: Engine, buffers: Mapping[str, Tensor], manifest: Manifest, folder: Path) -> list[str]:
    """Write the state in `folder` into the engine and into `buffers`, in place. All ranks call it together.

    Returns what is not as it was saved: moving averages that are begun, or dropped. Raises CheckpointError, on all
    ranks alike, when parameters or optimizer are not those that were saved, when an element is missing or there twice,
    or when afterwards weights are not the rounded masters, or counters or settings not those that were saved.
    """
    buffers = {**layouts.buffers(engine), **buffers}
    parameters, keys = _expected(engine, buffers)
    _check_same_model(manifest, parameters, keys)
    notes, places, keys = _averages(manifest, keys)
    check_coverage(parameters, keys, places)
    failure = None
    try:
        with Reader(folder, places) as reader:
            for piece in layouts.pieces(engine):
                for key, tensor in piece.state.items():
                    saved = key if key in keys[piece.name] else layouts.MASTER  # averages begin at the weights
                    reader.read_into(tensor, piece.name, saved, piece.start)
            for name, tensor in buffers.items():
                whole = torch.empty(tensor.numel(), dtype=tensor.dtype)
                reader.read_into(whole, name, layouts.VALUE, 0)
                tensor.copy_(whole.view(tensor.shape))
        _restore_scalars(engine, manifest.scalars)
    except (OSError, ValueError, KeyError, struct.error) as error:
        failure = f"{folder}: {error!r}"
    agree(engine.world, failure)
    layouts.refresh_weights(engine)
    agree(engine.world, _rounding_failure(list(layouts.pieces(engine))))
    engine.check_hyperparameters()
    if _scalars(engine)["steps"] != manifest.scalars["steps"]:
        raise CheckpointError(f"{folder}: the optimizer's step counters are not those that were saved")
    return notes


def agree(world: World, failure: str | None) -> None:
    """Raises CheckpointError on all ranks when any of them has failed, so that none waits for another."""
    failures = [f"rank {rank}: {text}" for rank, text in enumerate(world.gather_objects(failure)) if text]
    if failures:
        raise CheckpointError("; ".join(failures))


def on_rank_0(world: World, action: Callable[[], Result]) -> Result:
    """Do it on rank 0 alone; its result, or its CheckpointError, on all ranks."""
    outcome: tuple[Result | None, str | None] = (None, None)
    if world.rank == 0:
        try:
            outcome = action(), None
        except (CheckpointError, OSError) as error:
            outcome = None, str(error)
    result, failure = world.gather_objects(outcome)[0]
    if failure is not None:
        raise CheckpointError(failure)
    return result


def _expected(
    engine: Engine, buffers: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[str, ...]]]:
    """Full shapes and keys of all that a checkpoint of this engine and these buffers holds."""
    shapes = layouts.parameters(engine) | {name: tuple(tensor.shape) for name, tensor in buffers.items()}
    return shapes, layouts.keys(engine) | dict.fromkeys(buffers, (layouts.VALUE,))


def _averages(
    manifest: Manifest, keys: dict[str, tuple[str, ...]]
) -> tuple[list[str], list[FragmentPlace], dict[str, tuple[str, ...]]]:
    """Moving averages that one side has and the other has not: (notes, fragments to read, keys they must cover)."""
    saved = any(place.key == EMA for place in manifest.fragments)
    wanted = any(EMA in every for every in keys.values())
    if saved == wanted:
        return [], list(manifest.fragments), keys
    if wanted:
        note = "ema: the checkpoint has no averages; they begin at its weights"
        return [note], list(manifest.fragments), {name: tuple(k for k in ks if k != EMA) for name, ks in keys.items()}
    return (
        ["ema: the checkpoint's averages are dropped, as the configuration has none"],
        [place for place in manifest.fragments if place.key != EMA],
        keys,
    )


def _share(numel: int, world: World) -> tuple[int, int]:
    """This rank's equal part of what all ranks hold."""
    return numel * world.rank // world.world_size, numel * (world.rank + 1) // world.world_size


def _check_replicas(engine: Engine, shared: list[Fragment], scalars: dict[str, Any]) -> None:
    digests = [xxhash.xxh3_64_intdigest(bytes_of(fragment.tensor)) for fragment in shared]
    everyone = engine.world.gather_objects((digests, scalars))
    for rank, (theirs, numbers) in enumerate(everyone):
        if numbers != everyone[0][1]:
            raise CheckpointError(
                f"rank {rank} and rank 0 differ in step counters or settings: {numbers} and {everyone[0][1]}"
            )
        for fragment, mine, first in zip(shared, theirs, everyone[0][0], strict=True):
            if mine != first:
                raise CheckpointError(
                    f"{fragment.key} of {fragment.name!r} differs between rank {rank} and rank 0, which should hold "
                    "the same: damaged memory, or code that changes weights on some ranks only. Nothing was saved; "
                    "go on from the last checkpoint."
                )


def _rounding_failure(found: list[layouts.Piece]) -> str | None:
    """What is wrong where the forward pass does not read the rounded masters; None when it does everywhere."""
    for piece in found:
        master = piece.state.get(layouts.MASTER)
        if failure := _without_master(piece):
            return failure
        if master is not None and not all(torch.equal(weights, master.to(weights)) for weights in piece.weights):
            return _not_rounded(piece.name)
    return None


def _without_master(piece: layouts.Piece) -> str | None:
    master = piece.state.get(layouts.MASTER)
    if master is None or master.dtype == torch.float32:
        return None
    return f"{piece.name!r} has no fp32 master (it is {master.dtype}); such runs cannot be saved"


def _not_rounded(name: str) -> str:
    return (
        f"the weights of {name!r} are not its rounded masters: they were changed from outside the optimizer, or hold "
        "NaN, or DeepSpeed keeps them elsewhere"
    )


def _check_same_model(
    manifest: Manifest, parameters: dict[str, tuple[int, ...]], keys: dict[str, tuple[str, ...]]
) -> None:
    saved = dict(manifest.parameters)
    differences = [f"{name} is new" for name in parameters if name not in saved]
    differences += [f"{name} is gone" for name in saved if name not in parameters]
    both = (name for name in parameters if name in saved and saved[name] != parameters[name])
    differences += [f"{name} was {list(saved[name])} and is {list(parameters[name])}" for name in both]
    was = {place.parameter: place.key for place in manifest.fragments if place.key in (layouts.MASTER, layouts.VALUE)}
    changed = (name for name in parameters if name in was and was[name] not in keys[name])
    word = {layouts.MASTER: "trained", layouts.VALUE: "frozen"}
    differences += [f"{name} was {word[was[name]]} and no longer is" for name in changed]
    if differences:
        more = f", and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise CheckpointError(
            f"the model is not the one that was saved: {', '.join(differences[:5])}{more}. "
            "Use the configuration that the run was started with, or start a new run."
        )


def _scalars(engine: Engine) -> dict[str, Any]:
    """Numbers beside the tensors: per parameter the optimizer's counters, per group its settings, the loss scaler.

    Raises CheckpointError when some tensors have taken other numbers of steps than the rest.
    """
    steps: dict[str, dict[str, float]] = {}
    counts = []
    for group, tensor in engine.optimizer_tensors():
        counts.append({key: float(engine.optimizer.state[tensor][key]) for key in engine.number_keys})
        if counts[-1] != counts[0]:
            raise CheckpointError(
                f"optimizer group {group['name']!r}: its parts have taken other numbers of steps than the rest "
                f"({counts[-1]} and {counts[0]}); every step counts for all of them"
            )
        steps |= dict.fromkeys(group["parameters"], counts[-1])
    scale = asdict(engine.scaler) if engine.scaler else {}
    groups = json.loads(json.dumps(engine.hyperparameters))
    return {"optimizer": type(engine.optimizer).__name__, "steps": steps, "groups": groups, "loss_scaler": scale}


def _restore_scalars(engine: Engine, scalars: Mapping[str, Any]) -> None:
    """Each optimizer tensor gets counters of its own: one shared tensor would be advanced once per group."""
    for group, tensor in engine.optimizer_tensors():
        saved = [scalars["steps"][name] for name in group["parameters"]]
        if any(other != saved[0] for other in saved):
            raise CheckpointError(
                f"optimizer group {group['name']!r}: its parameters have taken different numbers of steps and cannot "
                "be in one group. Use the optim.groups that the run was started with."
            )
        for key, value in saved[0].items():
            engine.optimizer.state[tensor][key].fill_(value)
    if engine.scaler and scalars["loss_scaler"]:
        engine.set_loss_scale(LossScale(**scalars["loss_scaler"]))
