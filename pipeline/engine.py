"""DeepSpeed behind one small face: forward, backward, step, and the answer whether the step was applied.

    loss of one micro batch -> backward (A times) -> step(lr): clip, check, update, gather the new weights

DeepSpeed shares the state among the ranks in a way of its own for each ZeRO stage and precision. Here the differences
end: at every stage the gradient norm is known, clipping is the same, and a gradient that is not finite changes neither
weights nor optimizer; gradients are added up in fp32 whatever the precision of the weights. What it gives up: in bf16
and fp16 that takes twice the weights' own memory at stage 0, where DeepSpeed alone would add in the low precision.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import initial, muon, optim, reduction
from pipeline.config import Config
from pipeline.errors import ConfigError, RunError
from pipeline.loss_scale import LossScale
from pipeline.prepare import input_cast, prepare
from pipeline.session import World
from pipeline.zero import DEEPSPEED_VERSION, deepspeed_config

# Said before the import: detection prints to the terminal when it finds no accelerator.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_grad, safe_get_local_grad
from deepspeed.utils.logging import logger as deepspeed_logger

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        self.offloaded = config.zero.offload_optimizer is not None
        self.clip = config.optim.clip
        self.muon = config.optim.name == "muon"
        self.scaler = LossScale() if self.dtype == torch.float16 else None
        self.summed = _sum_in_fp32(self.module) if self.stage == 0 and not self.plain else []
        self.number_keys = optim.state_keys(self.optimizer, self.param_groups[0])[1]
        average = (optim.EMA,) if config.ema else ()
        self.state_keys: dict[str, tuple[str, ...]] = {  # canonical name of a trained parameter -> what is kept of it
            name: (*optim.state_keys(self.optimizer, group)[0], *average)
            for group in self.param_groups
            for name in group["parameters"]
        }
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
        return self.scaler.scale if self.scaler else None

    def set_loss_scale(self, scaler: LossScale) -> None:
        """Go on with this scale and its count (a restore does)."""
        self.scaler, self.deepspeed.optimizer.loss_scale = scaler, scaler.scale

    def backward(self, loss: Tensor) -> None:
        """Add one micro batch's gradient; A calls make a step's. `loss` []: sum over its terms / terms of global batch.

        Gradients are added up over micro batches and ranks. An average would have to be undone by a factor on the loss,
        and then each rounding of the backward pass would depend on the number of ranks.
        """
        for parameter in self.summed:
            if parameter.grad is None:  # DeepSpeed would give an unused one a gradient in the low precision
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
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
        before_muon = self._norm_of_shares() if self.muon and self.stage == 3 else None
        with (
            muon.eager() if self.muon else nullcontext(),
            self._undo_average() if self.stage == 3 else nullcontext() if finite else self._optimizer_idle(),
        ):
            self.deepspeed.step()
        applied = finite and self.deepspeed.was_step_applied()
        if not applied and self.offloaded and self.stage < 3:
            # DeepSpeed would add the next step's gradient to the one that was not finite.
            self.deepspeed.optimizer.averaged_gradients.clear()
        if not finite:
            norm = math.inf  # as the other layouts report it
        if norm is None:
            norm = float(self.deepspeed.get_global_grad_norm() or 0.0)
            if before_muon is not None and applied:
                norm = before_muon  # DeepSpeed's is that of Muon's steps
            if self.stage == 0 and scale is not None:
                norm /= scale  # the other layouts report it unscaled
        if self.scaler:
            self.deepspeed.optimizer.loss_scale = self.scaler.after(applied)
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

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(canonical name, whole gradient over the global batch) of each trained parameter, one at a time.

        Between the last backward and the step, on all ranks; not clipped.
        """
        factor = (self.world.world_size if self.stage == 3 else 1) / (self.loss_scale or 1.0)
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and (gradient := safe_get_full_grad(parameter)) is not None:
                yield optim.canonical(name), gradient.detach() * factor

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

    def _norm_of_shares(self) -> float:
        """Norm over all gradients at stage 3, where each rank has a share of each."""
        trained = (p for p in self.module.parameters() if p.requires_grad)
        shares = (safe_get_local_grad(p) for p in trained)
        squares = sum((share.double().square().sum() for share in shares), torch.zeros((), device=self.device).double())
        return math.sqrt(float(self.world.sum_(squares))) * self.world.world_size / (self.loss_scale or 1.0)

    @contextmanager
    def _undo_average(self) -> Iterator[None]:
        """Stage 3 can only average over ranks. Its step divides by the loss scale, in fp32; that undoes it.

        Muon keeps the gradient in its momentum before that, where it must not depend on ranks or scale.
        """
        optimizer = self.deepspeed.optimizer
        scale = optimizer.loss_scale
        optimizer.loss_scale = scale / self.world.world_size
        if self.muon:
            shares = [share for group in optimizer.averaged_gradients.values() for share in group]
            torch._foreach_div_(shares, optimizer.loss_scale)
            optimizer.loss_scale = 1.0
        try:
            yield
        finally:
            optimizer.loss_scale = scale

    @contextmanager
    def _optimizer_idle(self) -> Iterator[None]:
        """DeepSpeed goes through its step (clears gradients, counts) while the torch optimizer does nothing."""
        optimizer: Any = self.optimizer
        optimizer.step = lambda *args, **kwargs: None
        try:
            yield
        finally:
            del optimizer.step


def build(config: Config, model: nn.Module, world: World, weights: initial.Weights | None = None) -> Engine:
    """DeepSpeed around `model` (fp32; rank 0's weights are those that count), its optimizer state allocated.

    Parameters on the meta device are read from `weights`, one at a time, or are zeros until a restore. Raises
    ConfigError for settings that cannot work with this model or number of workers.
    """
    settings = deepspeed_config(config, world.world_size, pinned=world.device.type == "cuda")
    init_distributed(world)
    accelerator: Any = get_accelerator()
    if config.precision.dtype == "fp16" and not accelerator.is_fp16_supported():
        raise ConfigError("precision.dtype: fp16 needs a GPU or a CPU with AVX512-FP16. Use bf16 or fp32 here.")
    optim.freeze(model, config.optim)
    prepare(model, DTYPES[config.precision.dtype], recompute=config.activation_checkpointing)
    elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
    settings["zero_optimization"].setdefault("reduce_bucket_size", min(elements, 500_000_000))  # the default fills 2 GB
    groups = optim.parameter_groups(model, config.optim)  # while parameters have the shapes of the model
    if any(parameter.is_meta for parameter in model.parameters()):
        dtype = DTYPES[config.precision.dtype]
        cut = partial(deepspeed.zero.Init, config_dict_or_path=settings, dtype=dtype)
        initial.fill(model, world, weights, cut if config.zero.stage == 3 else None, dtype)
    optimizer = optim.build(config.optim, groups, config.zero.offload_optimizer is not None)
    parts = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    reduction.in_order(parts[0].optimizer)
    engine = Engine(config, world, parts[0])
    for group, tensor in engine.optimizer_tensors():
        optim.allocate(engine.optimizer, group, tensor, average=config.ema is not None)
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


def _sum_in_fp32(module: nn.Module) -> list[nn.Parameter]:
    """Let autograd add up the gradients of low-precision weights in fp32; the parameters that need it."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad_dtype = torch.float32
    return trained


def _hyperparameters(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every setting of every group but its tensors and the learning rate, which each step sets."""
    return [{key: value for key, value in group.items() if key not in ("params", "lr")} for group in groups]
