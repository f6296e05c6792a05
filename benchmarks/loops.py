"""The three loops that step.py measures, each as it runs in one of its worker processes.

`millstream` is the loop of this project with everything on. `bare` and `trainer` are what one would use instead; they
start from `prepared`: the same network and DeepSpeed settings, global batches ready in memory. `Pace` holds them
between two rounds.
"""

from __future__ import annotations

import argparse
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pipeline.config import Config
    from pipeline.session import World

READY_STEPS = 8  # different global batches that the peers hold in memory


class Pace:
    """Counts steps and holds the loop between two rounds: `boundary` is called before every step.

    Says ("round", (seconds, processor seconds of all threads) of the counted steps) at the end of each round, and goes
    on when it is told to.
    """

    def __init__(self, line: Connection, plan: argparse.Namespace, device: torch.device) -> None:
        self.line, self.device, self.steps, self.began = line, device, 0, (0.0, 0.0)
        self.warmup, self.counted = plan.warmup, plan.steps
        self.total = (plan.rounds + 1) * (self.warmup + self.counted) + 1  # the first round is not counted

    def boundary(self) -> None:
        """Between two steps."""
        place = self.steps % (self.warmup + self.counted)
        if place in (0, self.warmup) and self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        if place == 0:
            now = time.perf_counter(), time.process_time()
            self.line.send(("round", (now[0] - self.began[0], now[1] - self.began[1])))
            self.line.recv()
        if place == self.warmup:
            self.began = time.perf_counter(), time.process_time()
        self.steps += 1


def millstream(world: World, line: Connection, plan: argparse.Namespace, path: Path) -> None:
    """The loop that is measured, with everything on; the journal is written by this process, as with `workers: 0`."""
    from pipeline import config as configs
    from pipeline.cluster.board import Board
    from pipeline.session import Session
    from pipeline.train import train

    pace = Pace(line, plan, world.device)

    class Paced(Session):
        def phase(self, name: str, step: int) -> None:
            super().phase(name, step)
            if name == "data":
                pace.boundary()

    config = configs.load(path, [f"steps={pace.total}"])
    folder = Path(config.runs) / f"rank-{world.rank}"
    (folder.parent / "attempts").mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    board = Board(folder / "journal.jsonl", 1)
    session = Paced(world, folder.parent, 1, board.deliver)
    train(config, session)
    session.close()
    board.close()


def bare(world: World, line: Connection, plan: argparse.Namespace, path: Path) -> None:
    """The least that trains this model with DeepSpeed."""
    import deepspeed
    from torch.nn import functional

    from pipeline import optim
    from pipeline.engine import init_distributed

    config, model, settings, ready = prepared(world, plan, path)
    init_distributed(world)  # keeps DeepSpeed from compiling a collective for CPUs
    optimizer = optim.build(config.optim, optim.parameter_groups(model, config.optim))
    for group in optimizer.param_groups:
        group["lr"] = config.optim.lr
    engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]
    pace = Pace(line, plan, world.device)
    for step in range(pace.total):
        pace.boundary()
        for inputs, targets in ready[step % len(ready)]:
            logits = engine(**inputs).logits
            loss = functional.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=-100)
            engine.backward(loss)
            engine.step()


def trainer(world: World, line: Connection, plan: argparse.Namespace, path: Path) -> None:
    """transformers' Trainer, spared the collation of samples into batches."""
    import transformers
    from torch.utils.data import DataLoader, Dataset

    from pipeline import optim
    from pipeline.engine import init_distributed

    config, model, settings, ready = prepared(world, plan, path)
    init_distributed(world)
    pace = Pace(line, plan, world.device)
    micro_steps = config.micro_steps(world.world_size)
    fused = bool(optim.build(config.optim, optim.parameter_groups(model, config.optim)).defaults.get("fused"))

    class Ready(Dataset[Any]):
        def __len__(self) -> int:
            return pace.total * micro_steps

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            inputs, targets = ready[number // micro_steps % len(ready)][number % micro_steps]
            return {**inputs, "labels": inputs.get("input_ids", targets)}  # a language model shifts them itself

    class OnReady(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(Ready(), batch_size=None)

    class Paced(transformers.TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            pace.boundary()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if pace.steps < pace.total:
                pace.boundary()

    arguments = transformers.TrainingArguments(
        output_dir=str(Path(config.runs) / "trainer"),
        max_steps=pace.total,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=micro_steps,
        learning_rate=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        max_grad_norm=config.optim.clip or 0.0,
        warmup_steps=config.optim.schedule.warmup,
        lr_scheduler_type="cosine",
        optim="adamw_torch_fused" if fused else "adamw_torch",
        bf16=config.precision.dtype == "bf16",
        deepspeed=settings,
        use_cpu=world.device.type == "cpu",
        ddp_backend="gloo" if world.device.type == "cpu" else "nccl",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    OnReady(model=model, args=arguments, train_dataset=Ready(), callbacks=[Paced()]).train()


def prepared(world: World, plan: argparse.Namespace, path: Path) -> tuple[Config, Any, dict[str, Any], list[Any]]:
    """What both peers start from: configuration, network, DeepSpeed's settings, global batches on the device."""
    from pipeline import config as configs
    from pipeline import tasks
    from pipeline.data.stream import Stream
    from pipeline.engine import deepspeed_config
    from pipeline.randomness import Randomness

    config = configs.load(path)
    task: tasks.Task = tasks.find(config.task.name).Task(config.task)
    with Randomness(config.seed).draws("weights"):
        model = task.build_model()
    settings = deepspeed_config(config, world.world_size)
    settings["gradient_allreduce_op"] = "mean"  # as their losses are means over a micro batch
    settings["gradient_clipping"] = config.optim.clip or 0.0
    settings["zero_optimization"]["reduce_bucket_size"] = sum(p.numel() for p in model.parameters())
    with Stream(config).loader(task, world.rank, world.world_size, 0) as loader:
        steps = (loader.step(k) for k in range(READY_STEPS))  # each is good until the next one
        ready = [[on_device(micro.batch, world.device, plan.layout) for micro in step] for step in steps]
    return config, model, settings, ready


def on_device(
    batch: dict[str, torch.Tensor], device: torch.device, layout: str
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The network's inputs and its targets. Images are normalised already."""
    if "tokens" in batch:
        return {"input_ids": batch["tokens"].to(device, copy=True)}, batch["labels"].to(device, copy=True)
    pixels = (batch["image"].to(device).float() / 255 - 0.5) / 0.5
    pixels = pixels.permute(0, 3, 1, 2)  # [m, C, H, W] in name, [m, H, W, C] in memory
    pixels = pixels.contiguous() if layout == "contiguous" else pixels
    return {"pixel_values": pixels}, batch["label"].to(device, copy=True)


CONTENDERS = {"millstream": millstream, "bare": bare, "trainer": trainer}
