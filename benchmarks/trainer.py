"""The peer that start.py times: a training script as one writes it for transformers' Trainer, run under torchrun.

    torchrun --nproc-per-node 2 benchmarks/trainer.py SETTINGS.json

SETTINGS: model, rows, length, micro_batch_size, micro_steps, deepspeed (its configuration), output (a folder). The
rows are random tokens in memory, so it reads no data. OUTPUT/first-step gets the time when the first step ended.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed.ops
import torch
import transformers

# Without this DeepSpeed compiles a collective for CPUs at the first start, for minutes.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Rows(torch.utils.data.Dataset[Any]):
    """Rows of random tokens."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.tokens = torch.randint(settings["model"]["vocab_size"], (settings["rows"], settings["length"]))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[number], "labels": self.tokens[number]}


class FirstStep(transformers.TrainerCallback):
    """Notes when the first step was done."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and state.is_world_process_zero:
            self.path.write_text(str(time.time()))


def main(settings: dict[str, Any]) -> None:
    arguments = transformers.TrainingArguments(
        output_dir=settings["output"],
        max_steps=2,
        per_device_train_batch_size=settings["micro_batch_size"],
        gradient_accumulation_steps=settings["micro_steps"],
        learning_rate=1e-3,
        deepspeed=settings["deepspeed"],
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="nccl" if torch.cuda.is_available() else "gloo",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**settings["model"]))
    callbacks: list[Any] = [FirstStep(Path(settings["output"]) / "first-step")]
    transformers.Trainer(model=model, args=arguments, train_dataset=Rows(settings), callbacks=callbacks).train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
