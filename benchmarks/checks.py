"""What gpu-check runs in the workers: each function on every rank, with Millstream's own parts. Judged in gpu_check.py.

bandwidth, loading        of the machine
training                  losses, rate and peak memory, by case and ZeRO stage
reference -> resumed      losses of runs without a break, and of those that go on from their middle
"""

from __future__ import annotations

import shutil
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pipeline.session import Session, World

SAVED_AT = 3  # steps before the checkpoint


class Step(NamedTuple):
    """What a run's journal says of one step."""

    loss: float
    samples: int  # digest of which samples stood in which rows
    rate: float  # learning rate


class Trained(NamedTuple):
    """One run of one worker group, as rank 0 saw it."""

    steps: dict[int, Step]
    samples_per_second: float  # median over the second half of its steps
    peak_bytes: int  # most memory of the device that its tensors took at once, of any rank; 0 on CPU
    applied: int  # steps that changed the weights


def bandwidth(world: World, line: Connection, mebibytes: int) -> float:
    """Bus bandwidth of an all-reduce of fp32 in GB/s: 2 (n - 1) / n * bytes / seconds, as nccl-tests define it.

    Raises ArithmeticError when the sum is wrong.
    """
    elements, n = mebibytes * 2**18, world.world_size
    tensor = torch.full((elements,), float(world.rank + 1), device=world.device)
    dist.all_reduce(tensor)
    if not bool((tensor == n * (n + 1) / 2).all()):
        raise ArithmeticError(f"an all-reduce over {n} devices gave a wrong sum on rank {world.rank}")
    seconds = []
    for _ in range(8):
        world.barrier()
        wait_for(world.device)
        began = time.perf_counter()
        dist.all_reduce(tensor)
        wait_for(world.device)
        seconds.append(time.perf_counter() - began)
    slowest = world.gather([statistics.median(seconds[2:])]).max()
    return 2 * (n - 1) / n * elements * 4 / float(slowest) / 1e9


def loading(world: World, line: Connection, path: Path) -> dict[str, Any]:
    """Whether the loader's batches are pinned, samples per second of its thread, GB/s of copies to the device."""
    from pipeline import config as configs
    from pipeline import tasks
    from pipeline.data.stream import Stream

    config = configs.load(path)
    task = tasks.find(config.task.name).Task(config.task)
    data = Stream(config)
    with data.loader(task, world.rank, world.world_size, 0) as loader:
        pinned = [tensor.is_pinned() for micro in loader.step(0) for tensor in micro.batch.values()]
        began = time.perf_counter()
        for step in range(1, 9):
            loader.step(step)
        seconds = time.perf_counter() - began
    data.close()
    rates = {"pinned_rate": copy_rate(world.device, True), "pageable_rate": copy_rate(world.device, False)}
    return {"pinned": all(pinned), "samples_per_second": 8 * config.global_batch_size / seconds, **rates}


def copy_rate(device: torch.device, pinned: bool) -> float:
    """Host to device in GB/s; 0 on CPU, where nothing is copied."""
    if device.type == "cpu":
        return 0.0
    host = torch.empty(64 * 2**20, dtype=torch.uint8, pin_memory=pinned)
    host.to(device, non_blocking=True)
    wait_for(device)
    began = time.perf_counter()
    for _ in range(8):
        host.to(device, non_blocking=True)
    wait_for(device)
    return 8 * len(host) / (time.perf_counter() - began) / 1e9


def training(
    world: World, line: Connection, paths: dict[str, Path], dtype: str, steps: int, stages: list[int], runs: Path
) -> dict[str, dict[int, Trained]]:
    """Every case at every ZeRO stage, some steps each."""
    return {
        case: {
            stage: run(world, path, runs / f"{case}-{dtype}-{stage}", dtype, stage, [f"steps={steps}"])
            for stage in stages
        }
        for case, path in paths.items()
    }


def reference(
    world: World, line: Connection, paths: dict[str, Path], dtype: str, steps: int, stages: list[int], runs: Path
) -> tuple[dict[str, Trained], dict[str, dict[int, Trained]]]:
    """Every case at the first of `stages` without a break, its checkpoint of the middle kept; then `resumed` here."""
    whole = [f"steps={steps}", f"checkpoint.every={SAVED_AT}", f"checkpoint.keep_every={SAVED_AT}"]
    straight = {
        case: run(world, path, runs / f"{case}-{dtype}", dtype, stages[0], whole) for case, path in paths.items()
    }
    return straight, resumed(world, line, paths, dtype, steps, stages, runs)


def resumed(
    world: World, line: Connection, paths: dict[str, Path], dtype: str, steps: int, stages: list[int], runs: Path
) -> dict[str, dict[int, Trained]]:
    """Every case from its checkpoint of the middle to the end, at each of `stages`, on the workers that are here."""
    went: dict[str, dict[int, Trained]] = {}
    for case, path in paths.items():
        went[case] = {}
        for stage in stages:
            folder = runs / f"{case}-{dtype}-on-{world.world_size}-{stage}"
            if world.rank == 0:
                name = f"checkpoint-{SAVED_AT:08d}"
                shutil.copytree(runs / f"{case}-{dtype}" / "checkpoints" / name, folder / "checkpoints" / name)
            world.barrier()
            went[case][stage] = run(world, path, folder, dtype, stage, [f"steps={steps}"], attempt=2)
    return went


def run(
    world: World, path: Path, folder: Path, dtype: str, stage: int, overrides: list[str], attempt: int = 1
) -> Trained:
    """Train in `folder`, from its newest checkpoint if it has one, with a session that keeps the records in memory."""
    from pipeline import config as configs
    from pipeline.train import train

    records: list[dict[str, Any]] = []

    def keep(rank: int, new: list[dict[str, Any]], where: dict[str, Any]) -> bool:
        records.extend(new)
        return False

    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    session = Session(world, folder, attempt, keep)
    try:
        train(configs.load(path, [f"zero.stage={stage}", f"precision.dtype={dtype}", *overrides]), session)
    finally:
        session.close()
    peak = torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else 0
    peak = int(world.gather([float(peak)]).max())
    taken = [record for record in records if record["kind"] == "step"]
    steps = {r["step"]: Step(r["metrics"]["train/loss"], r["samples"], r["metrics"]["optim/lr"]) for r in taken}
    skipped = {record["step"] for record in records if record["kind"] == "skip"}
    rates = [record["metrics"]["throughput/samples_per_second"] for record in taken[len(taken) // 2 :]]
    return Trained(steps, statistics.median(rates) if rates else 0.0, peak, len(steps) - len(skipped))


def wait_for(device: torch.device) -> None:
    """Until the device has done all it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
