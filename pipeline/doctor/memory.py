"""How much memory a worker needs, part by part, and whether a device that is known has it.

What each part takes follows from how DeepSpeed lays the state out at a ZeRO stage and precision (checkpoint/layouts.py
reads the same), activations are those of network.py. On a processor the workers of a machine share its memory.

What it gives up: memory that the allocator of a GPU holds and cannot use, and other programs'.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import psutil

from pipeline.config import Config
from pipeline.doctor.findings import Report
from pipeline.doctor.network import Alive, Network
from pipeline.optim import OPTIMIZERS

PART = "memory"
GIB = 1 << 30
# Bytes of devices by name, as NVIDIA's data sheets have them; the first that is part of a name counts.
DEVICES = {
    "A100-40GB": 40 * GIB,
    "A100-80GB": 80 * GIB,
    "H100": 80 * GIB,
    "H200": 141 * 10**9,
    "B200": 180 * 10**9,
    "L40S": 48 * GIB,
    "L4": 24 * GIB,
    "T4": 16 * GIB,
    "V100-16GB": 16 * GIB,
    "V100-32GB": 32 * GIB,
    "RTX 4090": 24 * GIB,
    "RTX 3090": 24 * GIB,
}
CONTEXT = GIB  # that CUDA and NCCL take on a device, about
PROCESS = 700 << 20  # that a worker's process takes for its libraries: Python, torch, DeepSpeed, transformers, Ray


class Need(NamedTuple):
    """Bytes of one worker by part. A step has two peaks: `gradients`, `buckets` and `activations` are there in the
    backward pass; `update` is what the optimizer's step takes in their place.
    """

    weights: int
    masters: int
    optimizer: int
    gradients: int
    buckets: int
    activations: int
    update: int

    @property
    def total(self) -> int:
        state = self.weights + self.masters + self.optimizer
        return state + max(self.gradients + self.buckets + self.activations, self.update)


def need(config: Config, network: Network, world_size: int, on_gpu: bool = False) -> Need:
    """What one of `world_size` workers needs at the peak of a step."""
    stage, low = config.zero.stage, config.precision.dtype != "fp32"
    size, trained = 2 if low else 4, network.trained
    shared = world_size if stage else 1
    kept = len(OPTIMIZERS[config.optim.name].tensors) + (config.ema is not None)
    copies = stage > 0 or low  # DeepSpeed's own fp32 weights, flat
    weights = network.parameters * size // (world_size if stage == 3 else 1) + network.buffers
    gathered = _gathered(config, network) * size if stage == 3 and world_size > 1 else 0
    return Need(
        weights=weights + gathered,
        masters=4 * trained // shared if copies else 0,
        optimizer=kept * 4 * trained // shared,
        gradients=4 * trained // (world_size if stage >= 2 else 1) + (size * trained if _accumulates(config) else 0),
        buckets=0 if _accumulates(config) else _buckets(config, trained, size),
        activations=network.activations or 0,
        update=_update(config, network, shared, on_gpu),
    )


def _accumulates(config: Config) -> bool:
    """Whether DeepSpeed adds up gradients in fp32 beside those in low precision, and fills buckets after the pass."""
    return config.zero.stage == 1 and config.precision.dtype != "fp32"


def _buckets(config: Config, trained: int, size: int) -> int:
    """What gradients are gathered in before they are sent; engine.build makes it as large as all of them at most.

    In the type of the weights at ZeRO-2, else in fp32: ZeRO-1 sends what it has added up, and ZeRO-3 what it sends in.
    """
    if config.zero.stage == 0:
        return 0
    bucket = min(trained, _setting(config, "reduce_bucket_size", 500_000_000))
    return bucket * (size if config.zero.stage == 2 else 4) * (2 if config.zero.extra.get("overlap_comm") else 1)


def _gathered(config: Config, network: Network) -> int:
    """Numbers of parameters that ZeRO-3 holds whole at once: those that it will use again soon, and those that come.

    At the turn from forward to backward, half the distance of reuse lies behind (partitioned_param_coordinator.py). One
    worker has all parameters whole.
    """
    soon = _setting(config, "max_reuse_distance", 1_000_000_000) // 2
    ahead = _setting(config, "prefetch_bucket_size", 50_000_000)
    return min(network.parameters, max(soon, 2 * network.largest) + ahead)


def _setting(config: Config, key: str, default: int) -> int:
    """One of DeepSpeed's numbers, by either of its names."""
    asked = config.zero.extra.get(key, config.zero.extra.get(f"stage3_{key}"))
    return asked if isinstance(asked, int) else default


def _update(config: Config, network: Network, shared: int, on_gpu: bool) -> int:
    """Bytes in the optimizer's step: the gradients, under ZeRO a flat copy of those of the group that is stepped, what
    the optimizer writes down between, and at ZeRO-3 the buckets, which stay.
    """
    between = 0.0 if on_gpu and OPTIMIZERS[config.optim.name].fused else written_between(config)
    gradients = 4 * network.trained // shared
    if config.zero.stage == 0:
        return gradients + int(between * 4 * network.largest)  # one parameter at a time
    stepped = max(network.groups, default=0)
    if config.zero.stage < 3:  # a group's gradients are let go when their copy is there
        step = gradients + int(max(1.0, between) * 4 * stepped // shared)
        sent = 6 * network.trained + _buckets(config, network.trained, 2) if _accumulates(config) else 0
        return max(step, sent)
    stepped = min(stepped, _setting(config, "sub_group_size", 1_000_000_000) * shared)
    return gradients + int((1 + between) * 4 * stepped // shared) + _buckets(config, network.trained, 4)


def written_between(config: Config) -> float:
    """Bytes that a step of the optimizer makes and lets go again, per byte of what is stepped.

    Seen at a step without memory, as torch takes it. What it gives up: Muon's, which multiplies matrices.
    """
    import torch

    from pipeline import optim

    if config.optim.name == "muon":
        return 0.0
    parameter = torch.nn.Parameter(torch.empty(1 << 20, device="meta"))
    group = {"params": [parameter], "lr_scale": 1.0, "weight_decay": config.optim.weight_decay}
    kind = OPTIMIZERS[config.optim.name]
    optimizer = kind.make([group], lr=1e-3, **kind.settings(config.optim))
    optim.allocate(optimizer, optimizer.param_groups[0], parameter)
    parameter.grad = torch.empty_like(parameter)
    with Alive() as alive:
        optimizer.step()
    return alive.peak / (4 << 20)


def device(report: Report, asked: str | None) -> tuple[str, int] | None:
    """(name, bytes) of the device that is asked for by name, or None."""
    if asked is None:
        return None
    found = next((size for name, size in DEVICES.items() if name.lower() in asked.lower()), None)
    if found is None:
        report.add("error", PART, "device", f"the memory of {asked!r} is not known", f"known: {', '.join(DEVICES)}")
        return None
    return asked, found


def here(config: Config) -> tuple[str, int]:
    """(name, bytes for one worker) of this machine: its GPU, or the memory that its workers share."""
    import torch

    if torch.cuda.is_available() and config.cluster.gpu is not False:
        return torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
    limit = psutil.virtual_memory().total
    path = Path("/sys/fs/cgroup/memory.max")
    said = path.read_text().strip() if path.is_file() else "max"
    return "this machine", min(limit, int(said) if said.isdigit() else limit) // max(1, config.cluster.workers)


def judge(
    config: Config, report: Report, network: Network, world_size: int, known: tuple[str, int] | None, on_gpu: bool
) -> None:
    """Tell what is needed, part by part; an error when a known device has less."""
    parts = need(config, network, world_size, on_gpu)
    total = parts.total + (CONTEXT if on_gpu else PROCESS)
    report.figures["memory"] = {**parts._asdict(), "total": total, "activations_known": network.activations is not None}
    said = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts._asdict().items() if size > total / 200)
    if known is None:
        return
    name, have = known
    report.figures["memory"]["device"] = {"name": name, "bytes": have}
    if total > have:
        message = f"a worker needs about {total / 1e9:.1f} GB ({said}), and {name} has {have / 1e9:.1f} GB for it"
        report.add("error", PART, "memory", message, _mend(config, parts, network, world_size, on_gpu))
    elif total > 0.9 * have:
        message = (
            f"a worker needs about {total / 1e9:.1f} GB ({said}) of the {have / 1e9:.1f} GB that {name} has for it"
        )
        report.add("warning", PART, "memory", message, _mend(config, parts, network, world_size, on_gpu))


def _mend(config: Config, parts: Need, network: Network, world_size: int, on_gpu: bool) -> str:
    """The keys that buy the most, each with how much."""
    gains: list[tuple[int, str]] = []

    def try_out(said: str, **changes: Any) -> None:
        other = need(config.model_copy(update=changes), network, world_size, on_gpu)
        gains.append((parts.total - other.total, said))

    halved = parts.total - parts._replace(activations=parts.activations // 2).total
    if config.micro_batch_size > 1:
        gains.append((halved, f"micro_batch_size: {config.micro_batch_size // 2}"))
    if not config.activation_checkpointing:
        gains.append((halved, "activation_checkpointing: true"))
    for stage in range(config.zero.stage + 1, 4):
        try_out(f"zero.stage: {stage}", zero=config.zero.model_copy(update={"stage": stage}))
    if config.precision.dtype == "fp32":
        try_out("precision.dtype: bf16", precision=config.precision.model_copy(update={"dtype": "bf16"}))
    best = [f"{said} saves {gain / 1e9:.1f} GB" for gain, said in sorted(gains, reverse=True)[:3] if gain > 0]
    return ", ".join(best) or "a smaller network, or more memory"
