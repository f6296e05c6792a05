"""DeepSpeed behind one small face: forward, backward, step, and the answer whether the step was applied.

    loss of one micro batch -> backward (A times) -> step(lr): clip, check, update, gather the new weights

DeepSpeed shares the state among the ranks in a way of its own for each ZeRO stage and precision. Here the differences
end: at every stage the gradient norm is known, clipping is the same, and a gradient that is not finite changes neither
weights nor optimizer. What it gives up: CPU and NVMe offload, quantized and hierarchical ZeRO are refused, as their
state cannot be saved yet. In bf16 and fp16, stages 1 to 3 add micro-batch gradients up in fp32, stage 0 in the low
precision: DeepSpeed knows nothing else there.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import optim
from pipeline.config import Config
from pipeline.errors import ConfigError, RunError
from pipeline.prepare import input_cast, prepare
from pipeline.session import World

# Said before the import: detection prints to the terminal when it finds no accelerator.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.logging import logger as deepspeed_logger
from pydantic import ValidationError

# Checkpoints read private attributes of this version (checkpoint/layouts.py lists them).
DEEPSPEED_VERSION = "0.19.8"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Settings of DeepSpeed under which the state lies where checkpoints do not look, or the gradient norm is not known.
_REFUSED = [
    "offload_optimizer",
    "offload_param",
    "cpu_offload",
    "cpu_offload_param",
    "zenflow",
    "legacy_stage1",
    "elastic_checkpoint",
    "round_robin_gradients",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
]


@dataclass(frozen=True)
class StepResult:
    """What a step did: gradient norm before clipping (inf: not finite), whether weights changed, fp16's loss scale."""

    grad_norm: float
    applied: bool
    loss_scale: float | None


class Engine:
    """One rank's share of the model, its optimizer, and how to step them. Made by `build`."""

    def __init__(self, config: Config, world: World, engine: deepspeed.DeepSpeedEngine) -> None:
        self.deepspeed: Any = engine  # its optimizer is one of fifteen classes, which share no type
        self.world = world
        self.stage: int = config.zero.stage
        self.dtype = DTYPES[config.precision.dtype]
        self.clip = config.optim.clip
        self.hyperparameters = _hyperparameters(self.param_groups)

    @property
    def model(self) -> deepspeed.DeepSpeedEngine:
        """The model to call, in training and evaluation: the module with DeepSpeed's hooks around it.

        Stage 3 gathers weights inside each forward, so all ranks must run equally many, also under no_grad.
        """
        return self.deepspeed

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer inside DeepSpeed's."""
        return self.deepspeed.basic_optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def plain(self) -> bool:
        """fp32 at stage 0: DeepSpeed steps the torch optimizer itself, checks nothing and reports no norm."""
        return self.stage == 0 and self.dtype == torch.float32

    @property
    def loss_scale(self) -> float | None:
        """fp16's present loss scale; None in fp32 and bf16, which need none."""
        return float(self.deepspeed.optimizer.loss_scale) if self.dtype == torch.float16 else None

    def backward(self, loss: Tensor) -> None:
        """Add one micro batch's gradient; A calls make a step's. `loss` []: sum over its terms / terms of global batch.

        Gradients are added up over micro batches and ranks. An average would have to be undone by a factor on the loss,
        and then each rounding of the backward pass would depend on the number of ranks. Stage 3 can only average.
        """
        if self.stage == 3:
            loss = loss * self.world.world_size
        if self.stage == 0 and self.loss_scale is not None:
            loss = loss.float() * self.loss_scale  # DeepSpeed's stage 0 divides by the scale but never multiplies
        last = self.deepspeed.is_gradient_accumulation_boundary()
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        if not last:
            self.deepspeed.step()  # only counts the micro step

    def step(self, lr: float) -> StepResult:
        """Clip and apply the gradient of the A micro steps with learning rate `lr` times each group's `lr_scale`.

        Not applied, on any rank, when the gradient is not finite: weights and optimizer state are as they were.
        """
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]
        scale = self.loss_scale
        norm = self._clip_gradients() if self.plain else None
        finite = norm is None or math.isfinite(norm)
        with nullcontext() if finite else self._optimizer_idle():
            self.deepspeed.step()
        applied = finite and self.deepspeed.was_step_applied()
        if not finite:
            norm = math.inf  # as the other layouts report it
        if norm is None:
            norm = float(self.deepspeed.get_global_grad_norm() or 0.0)
            if self.stage == 0 and scale is not None:
                norm /= scale  # the other layouts report it unscaled
        return StepResult(norm, applied, scale)

    def optimizer_tensors(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """(group, tensor) of each tensor the torch optimizer steps: a parameter or, under ZeRO, a slice of many."""
        if self.stage == 3:
            # Stage 3 shows the torch optimizer one sub-group at a time and empties its groups in between.
            sub_groups = self.deepspeed.optimizer.fp32_partitioned_groups_flat
            for number, tensor in enumerate(sub_groups):
                yield self.param_groups[self.deepspeed.optimizer.sub_group_to_group_id[number]], tensor
            return
        for group in self.param_groups:
            for tensor in group["params"]:
                yield group, tensor

    def check_hyperparameters(self) -> None:
        """Raises RunError when a group's settings are not those it was built with (a restore must not touch them)."""
        now = _hyperparameters(self.param_groups)
        if now != self.hyperparameters:
            raise RunError(f"optimizer groups changed since they were built: {self.hyperparameters} became {now}")

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model. The process group stays."""
        self.deepspeed.destroy()

    def _clip_gradients(self) -> float:
        """Norm over all gradients, which are equal on all ranks here; scales them down to `clip` when above."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.clip is not None and bool(norm > self.clip) and bool(torch.isfinite(norm)):
            torch._foreach_mul_(gradients, self.clip / (norm + 1e-6))
        return float(norm)

    @contextmanager
    def _optimizer_idle(self) -> Iterator[None]:
        """DeepSpeed goes through its step (clears gradients, counts) while the torch optimizer does nothing."""
        optimizer: Any = self.optimizer
        optimizer.step = lambda *args, **kwargs: None
        try:
            yield
        finally:
            del optimizer.step


def build(config: Config, model: nn.Module, world: World) -> Engine:
    """DeepSpeed around `model` (fp32; rank 0's weights are those that count), its optimizer state allocated.

    Raises ConfigError for settings that cannot work with this model or number of workers.
    """
    settings = deepspeed_config(config, world.world_size)
    init_distributed(world)
    if config.precision.dtype == "fp16" and world.device.type == "cpu":
        raise ConfigError("precision.dtype: fp16 needs a GPU. Use bf16 or fp32 here.")
    prepare(model, DTYPES[config.precision.dtype], recompute=config.activation_checkpointing)
    elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
    settings["zero_optimization"].setdefault("reduce_bucket_size", min(elements, 500_000_000))  # the default fills 2 GB
    optimizer = optim.build(config.optim, optim.parameter_groups(model, config.optim))
    parts = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    engine = Engine(config, world, parts[0])
    for group, tensor in engine.optimizer_tensors():
        optim.allocate(engine.optimizer, group, tensor)
    engine.module.register_forward_pre_hook(input_cast(engine.dtype, world.device), with_kwargs=True)
    if config.compile:
        engine.deepspeed.compile()
    return engine


def init_distributed(world: World) -> None:
    """Let DeepSpeed adopt the process group that is there, and speak through `logging` instead of the terminal."""
    if deepspeed.__version__.split("+")[0] != DEEPSPEED_VERSION:
        raise RunError(
            f"DeepSpeed {deepspeed.__version__} is installed; checkpoints read the insides of {DEEPSPEED_VERSION} "
            f"and no other. Run: pip install deepspeed=={DEEPSPEED_VERSION}"
        )
    deepspeed_logger.handlers.clear()
    deepspeed_logger.propagate = True
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if world.device.type == "cpu":
        # Else it compiles a collective with g++, for minutes, under a lock that outlives a kill. Gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    cuda = world.device.type == "cuda"
    os.environ["LOCAL_RANK"] = str(world.device.index if cuda else world.local_rank)  # it takes its device from there
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The run's configuration in DeepSpeed's words, for `world_size` ranks.

    `zero.extra` is laid over the `zero_optimization` section. Raises ConfigError for keys that DeepSpeed does not
    know, for those that checkpoints cannot serve, and for more ranks than micro batches.
    """
    if world_size > config.micro_batches:
        raise ConfigError(
            f"{world_size} workers, but a step has only {config.micro_batches} micro batches "
            f"(global_batch_size {config.global_batch_size} / micro_batch_size {config.micro_batch_size}). "
            f"Use at most {config.micro_batches} workers or a smaller micro_batch_size."
        )
    steps = config.micro_steps(world_size)
    low = config.precision.dtype != "fp32"
    plain = not low and config.zero.stage == 0  # clipped by Engine.step
    settings: dict[str, Any] = {
        "train_batch_size": config.micro_batch_size * steps * world_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": 0.0 if plain else config.optim.clip or 0.0,
        "zero_optimization": _zero_section(config),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "gradient_allreduce_op": "mean" if config.zero.stage == 3 else "sum",  # see Engine.backward
        "bf16": {"enabled": config.precision.dtype == "bf16"},
        "fp16": {"enabled": config.precision.dtype == "fp16"},
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU at every micro step
    }
    if low and config.zero.stage > 0:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _zero_section(config: Config) -> dict[str, Any]:
    extra = config.zero.extra
    for key in _REFUSED:
        if extra.get(key) and (key, extra[key]) != ("zero_hpz_partition_size", 1):
            raise ConfigError(f"zero.extra.{key}: not supported, as checkpoints cannot save its state. Remove the key.")
    if extra.get("stage", config.zero.stage) != config.zero.stage or not extra.get("compute_grad_norm", True):
        raise ConfigError("zero.extra: set the stage by zero.stage; compute_grad_norm cannot be off. Remove the key.")
    section = {"stage": config.zero.stage, **extra}
    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"zero.extra: DeepSpeed {DEEPSPEED_VERSION} refuses it: {wrong}") from error
    return section


def _hyperparameters(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every setting of every group but its tensors and the learning rate, which each step sets."""
    return [{key: value for key, value in group.items() if key not in ("params", "lr")} for group in groups]
