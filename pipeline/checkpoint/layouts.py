"""Where each ZeRO stage and precision keeps a parameter's state, seen as flat pieces.

DeepSpeed 0.19.8 has these layouts, and `pieces` gives the same view of each: for every parameter the part this rank
owns, as 1-d views that can be read and written in place.

    plain        fp32, stage 0: the parameter is its own master, whole on every rank
    unfused      bf16 or fp16, stage 0: an fp32 master beside each parameter, whole on every rank
    flat         stages 1 and 2 (bf16 at stage 1: BF16_Optimizer): groups flattened, cut evenly among the ranks
    partitioned  stage 3: each parameter cut evenly among the ranks, pieces gathered in sub-groups
    frozen       parameters that are not trained: whole on every rank, cut at stage 3

An offloaded optimizer changes where the masters and its state lie (in host memory), not how they are cut. Buffers are
whole on every rank. What it gives up: it reads private attributes of DeepSpeed, each in one function of this file (or
of engine.py), listed in `PRIVATE` and held against the installed version by a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.engine import Engine
from pipeline.optim import canonical

MASTER = "master"  # key of a trained parameter's fp32 weights
VALUE = "value"  # key of what has no optimizer: frozen parameters and buffers, in their own dtype

# What is read of DeepSpeed besides its documented interface, by the object that has it.
PRIVATE = {
    "parameter (stages 1, 2, BF16_Optimizer)": ("_hp_mapping",),
    "mapping": ("lp_fragment_address", "hp_fragment_address", "param_group_index"),
    "fragment address": ("start", "numel"),
    "parameter (stage 3)": ("ds_shape", "ds_numel", "ds_tensor", "ds_persist"),
    "partition (stage 3)": ("ds_numel",),
    "optimizer (stage 0, bf16 and fp16)": ("fp16_groups", "fp32_groups"),
    "optimizer (stages 1, 2, BF16_Optimizer)": ("update_lp_params",),
    "optimizer (stages 1, 2, offloaded)": ("averaged_gradients",),
    "optimizer (fp16, stage 3)": ("loss_scale",),
    "optimizer (stage 3)": (
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "sub_group_to_group_id",
        "persistent_parameters",
        "_partition_all_parameters",
        "_reassign_or_swap_out_partitioned_parameters",
    ),
    "engine": ("basic_optimizer",),
}


@dataclass(frozen=True)
class Piece:
    """One rank's part of one parameter: elements [start, start + numel) of it when flattened.

    All tensors are 1-d views [numel]: `weights` what the forward pass reads (at stage 3 also the gathered copy of
    small ones), `state` the fp32 master and the optimizer's tensors, or `VALUE` alone. `replicated`: every rank holds
    the whole parameter and must hold the same.
    """

    name: str
    start: int
    weights: tuple[Tensor, ...]
    state: dict[str, Tensor]
    replicated: bool


def parameters(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Canonical name -> full shape of every parameter with elements, tied ones once, in the model's order."""
    return {name: _shape(p) for name, p in _named(engine)}


def aliases(engine: Engine) -> dict[str, str]:
    """The other names of tied parameters -> the one under which they are stored."""
    stored = {id(p): name for name, p in _named(engine)}
    every = ((canonical(name), p) for name, p in engine.module.named_parameters(remove_duplicate=False))
    return {name: stored[id(p)] for name, p in every if id(p) in stored and stored[id(p)] != name}


def keys(engine: Engine) -> dict[str, tuple[str, ...]]:
    """Canonical name -> keys of the state that a checkpoint of this engine holds for the parameter."""
    return {name: (MASTER, *engine.state_keys[name]) if p.requires_grad else (VALUE,) for name, p in _named(engine)}


def buffers(engine: Engine) -> dict[str, Tensor]:
    """Canonical name -> buffer that the module keeps in its `state_dict`; those of batch norm are batch_norm.py's."""
    found = {}
    for prefix, module in engine.module.named_modules():
        if not isinstance(module, _BatchNorm):
            lasting = (name for name in module._buffers if name not in module._non_persistent_buffers_set)
            named = ((canonical(f"{prefix}.{name}".lstrip(".")), module._buffers[name]) for name in lasting)
            found |= {name: buffer for name, buffer in named if buffer is not None and buffer.numel()}
    return found


def pieces(engine: Engine) -> Iterator[Piece]:
    """This rank's part of every parameter's state, in the model's order; parameters it has no part of are left out."""
    masters = _unfused_masters(engine) if engine.stage == 0 and not engine.plain else {}
    for name, parameter in _named(engine):
        if not parameter.requires_grad:
            piece = _frozen(engine, name, parameter)
        elif engine.stage == 3:
            piece = _partitioned(engine, name, parameter)
        elif engine.stage > 0:
            piece = _flat(engine, name, parameter)
        else:
            master = masters.get(id(parameter), parameter)
            state = {key: engine.optimizer.state[master][key].view(-1) for key in engine.state_keys[name]}
            state = {MASTER: master.detach().view(-1), **state}
            piece = Piece(name, 0, (parameter.detach().view(-1),), state, replicated=True)
        if piece is not None:
            yield piece


@torch.no_grad()
def refresh_weights(engine: Engine) -> None:
    """Give the forward pass what the masters say, on all ranks, the way DeepSpeed does it at the end of a step."""
    optimizer: Any = engine.deepspeed.optimizer
    if engine.stage == 3:
        optimizer._partition_all_parameters()
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if optimizer.persistent_parameters:  # small ones stay gathered; they hold copies of what was just written
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif engine.stage > 0:
        optimizer.update_lp_params()
    elif not engine.plain:
        for low, master in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, exact in zip(low, master, strict=True):
                parameter.copy_(exact)


def _named(engine: Engine) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, parameter in engine.module.named_parameters():
        if _shape(parameter).count(0) == 0:
            yield canonical(name), parameter


def _shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _unfused_masters(engine: Engine) -> dict[int, Tensor]:
    """id of a parameter -> its fp32 master (FP16_UnfusedOptimizer, which DeepSpeed uses for bf16 at stage 0 too)."""
    optimizer: Any = engine.deepspeed.optimizer
    pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {id(p): master for low, exact in pairs for p, master in zip(low, exact, strict=True)}


def _flat(engine: Engine, name: str, parameter: Any) -> Piece | None:
    """This rank's cut through the flattened group may begin or end inside the parameter, or miss it."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
    offset = mapping.hp_fragment_address.start
    [partition] = engine.param_groups[mapping.param_group_index]["params"]
    kept = engine.optimizer.state[partition]
    state = {MASTER: partition.detach(), **{key: kept[key] for key in engine.state_keys[name]}}
    state = {key: tensor.narrow(0, offset, numel) for key, tensor in state.items()}
    return Piece(name, start, (parameter.detach().view(-1)[start : start + numel],), state, replicated=False)


def _partitioned(engine: Engine, name: str, parameter: Any) -> Piece | None:
    # here: engine.py says first what DeepSpeed must know before it is imported
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    start, numel = _partition(engine, parameter)
    if numel == 0:
        return None
    state = {key: safe_get_local_optimizer_state(parameter, key) for key in engine.state_keys[name]}
    state = {MASTER: safe_get_local_fp32_param(parameter), **state}
    views = {key: tensor.detach().narrow(0, 0, numel) for key, tensor in state.items() if tensor is not None}
    return Piece(name, start, _weights(parameter, start, numel), views, replicated=False)


def _frozen(engine: Engine, name: str, parameter: Any) -> Piece | None:
    if engine.stage < 3:
        whole = parameter.detach().view(-1)
        return Piece(name, 0, (whole,), {VALUE: whole}, replicated=True)
    start, numel = _partition(engine, parameter)
    weights = _weights(parameter, start, numel)
    return Piece(name, start, weights, {VALUE: weights[0]}, replicated=False) if numel else None


def _weights(parameter: Any, start: int, numel: int) -> tuple[Tensor, ...]:
    """Stage 3: this rank's part, and the same elements of the gathered copy that small parameters keep."""
    part = parameter.ds_tensor.detach().view(-1)[:numel]
    gathered = getattr(parameter, "ds_persist", False) and parameter.numel() == parameter.ds_numel
    return (part, parameter.detach().view(-1)[start : start + numel]) if gathered else (part,)


def _partition(engine: Engine, parameter: Any) -> tuple[int, int]:
    """(start, elements) of this rank's part under stage 3; equal parts, the last ones short or empty."""
    part = parameter.ds_tensor.ds_numel
    start = part * engine.world.rank
    return start, max(0, min(part, parameter.ds_numel - start))
