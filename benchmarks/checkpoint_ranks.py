"""What checkpoint.py measures, as it runs in the worker processes: saves and loads of one engine, in turn.

The network is a stack of square matrices in bf16 with AdamW, so that each parameter has 12 bytes of state (master, two
means) and DeepSpeed's own checkpoint 2 more. Before each measurement the disk has written what came before.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.engine import Engine
    from pipeline.session import World

SIZES = {"toy": (32, 4), "small": (1024, 24), "large": (2048, 26)}  # width, matrices: 4 k, 25 M, 109 M parameters
POLL_SECONDS = 0.02  # between two looks whether a save behind the training is done, as steps would be
TAG = "step"
CONVERT = """
import sys, time
from deepspeed.checkpoint import ds_to_universal
sys.argv = ["ds_to_universal", "--input_folder", sys.argv[1], "--output_folder", sys.argv[2], "--inject_missing_state"]
arguments = ds_to_universal.parse_arguments()
began = time.perf_counter()
ds_to_universal.main(arguments)
print("seconds", time.perf_counter() - began)
"""


def saves(world: World, line: Connection, plan: argparse.Namespace, folder: Path, stage: int) -> list[dict[str, float]]:
    """What each round that counts found: seconds that the slowest rank took, bytes of all ranks."""
    config, engine = built(world, plan.size, stage)
    saving = Saving(world, config, engine, folder, stage)
    rounds = [saving.round(number) for number in range(plan.rounds + 1)]
    saving.synchronous()  # for those that load
    saving.deepspeed()
    return rounds[1:]  # the first one makes buffers, folders and page tables


class Saving:
    """Ways to save one engine."""

    def __init__(self, world: World, config: Config, engine: Engine, folder: Path, stage: int) -> None:
        from pipeline.checkpoint import shards
        from pipeline.checkpoint.saver import Saver

        self.state = [fragment.tensor for fragment in shards.capture(engine, {}).fragments]
        self.copies = [tensor.clone() for tensor in self.state]
        self.world, self.engine = world, engine
        self.ours, self.theirs = folder / f"ours-{stage}", folder / f"deepspeed-{stage}"
        self.behind = Saver(engine, world, self.ours, config, attempt=1)
        self.waiting = Saver(engine, world, self.ours, config, attempt=1, copies=False)
        self.step = 0

    def round(self, number: int) -> dict[str, float]:
        """Each way once; ours begin with another one each time."""
        from pipeline.checkpoint import shards

        found: dict[str, float] = {}
        turns = [self.asynchronous, self.synchronous, self.unhashed]
        for turn in turns[number % 3 :] + turns[: number % 3]:
            self.cleared(self.ours)
            found |= turn()
        self.cleared(self.theirs)
        found |= self.deepspeed()
        found["sha256"] = timed(self.world, lambda: hashed(self.engine))
        found["capture"] = timed(self.world, lambda: shards.capture(self.engine, {}))
        found["copy"] = timed(self.world, self.copied)
        return found

    def asynchronous(self) -> dict[str, float]:
        self.step += 1
        settled(self.world)
        assert self.behind.begin(self.step, data={}, buffers={}) is None
        forward_and_backward(self.engine)  # of two rows, the least that a step does before it changes the state
        self.behind.hold()
        self.engine.step(1e-3)
        saved = None
        while saved is None:
            time.sleep(POLL_SECONDS)
            if self.world.gather([self.behind.ready]).all():
                saved = self.behind.advance()
        assert saved.path is not None, saved.failure
        blocked = float(self.world.gather([saved.blocked_seconds]).max())
        return {"blocked": blocked, "behind": saved.seconds, "bytes": saved.bytes}

    def synchronous(self) -> dict[str, float]:
        self.step += 1

        def save() -> None:
            saved = self.waiting.begin(self.step, data={}, buffers={}) or self.waiting.finish()
            assert saved is not None and saved.path is not None

        return {"synchronous": timed(self.world, save)}

    def unhashed(self) -> dict[str, float]:
        with no_hashing():
            return {"unhashed": self.synchronous()["synchronous"]}

    def deepspeed(self) -> dict[str, float]:
        """DeepSpeed's own, and what it leaves to the kernel: until its files are on the disk."""
        from pipeline.checkpoint.disk import sync

        seconds = timed(self.world, lambda: self.engine.deepspeed.save_checkpoint(str(self.theirs), tag=TAG))
        files = list(self.theirs.rglob("*.pt"))
        synced = timed(self.world, lambda: [sync(path) for path in files if self.world.rank == 0], settle=False)
        size = sum(path.stat().st_size for path in files)
        return {"deepspeed": seconds, "deepspeed durable": seconds + synced, "deepspeed bytes": size}

    def copied(self) -> None:
        """The least that a save behind the training must do: this rank's state once more in memory that is there."""
        for tensor, copy in zip(self.state, self.copies):
            copy.copy_(tensor)

    def cleared(self, folder: Path) -> None:
        """Without what was saved there: to delete or overwrite it is not measured."""
        if self.world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def loads(world: World, line: Connection, plan: argparse.Namespace, folder: Path, stage: int) -> list[dict[str, float]]:
    """Reshard what `saves` left, of another number of ranks, into an engine here: seconds of each round that counts."""
    from pipeline import checkpoint

    config, engine = built(world, plan.size, stage)
    ours, theirs = folder / f"ours-{stage}", folder / f"deepspeed-{stage}"
    converted = theirs / f"{TAG}_universal"
    engine.deepspeed._config.load_universal_checkpoint = True

    def restore() -> None:
        restored = checkpoint.restore(engine, world, ours, config=config, resume=lambda *_: [], buffers={})
        assert restored is not None and restored.manifest.world_size != world.world_size

    def load() -> None:
        path, _ = engine.deepspeed.load_checkpoint(str(theirs), tag=converted.name)
        assert path is not None

    rounds = []
    for _ in range(plan.rounds + 1):
        found = {"ours": timed(world, restore)}
        seconds = None
        if world.rank == 0:
            shutil.rmtree(converted, ignore_errors=True)
            os.sync()
            seconds = convert(theirs, converted)
        found["convert"] = world.gather_objects(seconds)[0]
        found["load"] = timed(world, load)
        rounds.append(found)
    return rounds[1:]


def built(world: World, size: str, stage: int) -> tuple[Config, Engine]:
    """An engine after one step, so that its state is not all zeros."""
    import torch
    from torch import nn

    from pipeline import engine as engines
    from pipeline.config import Config
    from pipeline.sections import Optim, Precision, Zero

    width, matrices = SIZES[size]
    optim = Optim.model_validate({"name": "adamw", "lr": 1e-3, "weight_decay": 0.1})
    config = Config.model_construct(
        name="checkpoint",
        steps=10,
        global_batch_size=2 * world.world_size,
        micro_batch_size=2,
        optim=optim,
        zero=Zero(stage=stage),  # type: ignore[arg-type]
        precision=Precision(dtype="bf16"),
    )
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(matrices)))
    engine = engines.build(config, model, world)
    forward_and_backward(engine)
    engine.step(1e-3)
    return config, engine


def forward_and_backward(engine: Engine) -> None:
    """Of one micro batch of two rows."""
    import torch

    width = next(module.in_features for module in engine.module.modules() if isinstance(module, torch.nn.Linear))
    engine.backward(engine.model(torch.randn(2, width, dtype=torch.bfloat16)).float().square().sum())


def settled(world: World) -> None:
    """The disk has written all that came before, and all ranks are here."""
    if world.rank == 0:
        os.sync()
    world.barrier()


def timed(world: World, action: Callable[[], object], settle: bool = True) -> float:
    """Seconds that the slowest rank took, all having begun together."""
    settled(world) if settle else world.barrier()
    began = time.perf_counter()
    action()
    return float(world.gather([time.perf_counter() - began]).max())


def hashed(engine: Engine) -> None:
    """sha256 of what this rank saves, as it lies in memory."""
    from pipeline.checkpoint import shards
    from pipeline.checkpoint.fragments import file_chunks

    digest = hashlib.sha256()
    for chunk in file_chunks(shards.capture(engine, {}).fragments):
        digest.update(chunk)


@contextmanager
def no_hashing():
    """Files are written as always, their digests are not computed."""
    from pipeline.checkpoint import disk

    nothing = SimpleNamespace(update=lambda piece: None, hexdigest=lambda: "0" * 64)
    before, disk.hashlib = disk.hashlib, SimpleNamespace(sha256=lambda: nothing)  # type: ignore[assignment]
    try:
        yield
    finally:
        disk.hashlib = before


def convert(source: Path, target: Path) -> float:
    """Seconds of DeepSpeed's conversion to a universal checkpoint, without the start of its process and its imports."""
    command = [sys.executable, "-c", CONVERT, str(source / TAG), str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ds_to_universal failed:\n{done.stdout}\n{done.stderr}")
    return float(done.stdout.rpartition("seconds")[2])
