"""The weights of a checkpoint in a bare network, outside of training: no process group and no DeepSpeed.

    run or checkpoint -> every byte verified -> task and network of its configuration -> fp32 masters (or averages)

Any ZeRO stage, any number of workers, any precision of training. What it gives up: the network is whole on the host.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline import task_file, tasks
from pipeline.checkpoint import format
from pipeline.checkpoint.fragments import Reader, check_coverage
from pipeline.checkpoint.manifest import Manifest
from pipeline.errors import CheckpointError

VALUE = "value"  # key of what has no optimizer: frozen parameters and buffers


@dataclass(frozen=True)
class Loaded:
    """A network as it was saved, in eval mode. `notes`: a line for each thing to know, such as what was damaged."""

    path: Path
    manifest: Manifest
    task: Any
    module: nn.Module
    notes: list[str]


def load(source: Path, *, ema: bool = False) -> Loaded:
    """The network of a checkpoint's folder, or of the newest good checkpoint of a run's, with its fp32 masters.

    `ema`: the running averages of the weights instead. Raises CheckpointError when there is no checkpoint, a byte is
    not as written, or its tensors are not those of the network that its configuration builds; ConfigError and DataError
    as the task does.
    """
    found = _find(source)
    section = found.manifest.config.get("task") or {}
    task: Any = tasks.find(section.get("name", "")).Task(task_file.validate(section))
    kept = found.manifest.network if section.get("pretrained") else None
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and read over
        module: nn.Module = task.build_model(kept) if kept else task.build_model()
    for parameter in module.parameters():
        if parameter.is_meta:
            memory = nn.Parameter(torch.zeros(parameter.shape), parameter.requires_grad)
            torch.utils.swap_tensors(parameter, memory)
        parameter.data = parameter.data.contiguous()  # as training has them; checkpoints cut flat pieces
    read_into(module, found.path, found.manifest, ema)
    return Loaded(
        found.path, found.manifest, task, module.eval(), [f"damaged, passed over: {bad}" for bad in found.bad]
    )


def read_into(module: nn.Module, path: Path, manifest: Manifest, ema: bool = False) -> None:
    """Fill parameters and buffers of `module`, fp32 on the host, from a checkpoint that was verified.

    Raises CheckpointError when they are not those of the checkpoint, or it keeps no averages that are asked for.
    """
    has: dict[str, set[str]] = defaultdict(set)
    for place in manifest.fragments:
        has[place.parameter].add(place.key)
    if ema and not any("ema" in keys for keys in has.values()):
        raise CheckpointError(f"{path} keeps no running averages of the weights: leave --ema out, or train with `ema`")
    kinds = {f"{name}.{each}": layer for name, layer in module.named_modules() for each in layer._buffers}
    targets: dict[str, tuple[str, torch.Tensor]] = {}
    wrong: list[str] = []
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        source, shape = manifest.aliases.get(name, name), tuple(tensor.shape)
        if source not in manifest.parameters:
            counts = name.endswith("num_batches_tracked")
            if isinstance(tensor, nn.Parameter) or (isinstance(kinds.get(name), _BatchNorm) and not counts):
                wrong.append(f"{name} is not in it")
            continue  # a table that follows from the configuration, and that nothing trains
        if manifest.parameters[source] != shape:
            wrong.append(f"{name} is {list(manifest.parameters[source])} in it, not {list(shape)}")
        keys = ("ema", "master", VALUE) if ema else ("master", VALUE)
        targets[source] = next(key for key in keys if key in has[source]), tensor
    wrong += [f"{name} of it is unknown here" for name in manifest.parameters if name not in targets]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{path} is of another network than its configuration builds here: {'; '.join(wrong[:3])}{more}"
        )
    chosen = {name: (key,) for name, (key, _) in targets.items()}
    places = [place for place in manifest.fragments if place.key in chosen[place.parameter]]
    check_coverage(manifest.parameters, chosen, places)
    with Reader(path, places) as reader, torch.no_grad():
        for name, (key, tensor) in targets.items():
            reader.read_into(tensor.data.view(-1), name, key, 0)


def _find(source: Path) -> format.Found:
    if (source / format.MANIFEST).is_file():
        manifest, damage = format.inspect(source)
        if manifest is None or damage:
            raise CheckpointError(
                f"{source} is damaged: {'; '.join(map(str, damage))}; name another checkpoint of its run"
            )
        return format.Found(manifest.step, source, manifest, [])
    found = format.find(source / "checkpoints") or format.find(source)
    if found is None:
        raise CheckpointError(
            f"{source} is neither a checkpoint nor a run that has one; `millstream checkpoint list RUN` shows them"
        )
    return found
