"""A run's configuration in DeepSpeed's words, and the settings of DeepSpeed that cannot be had.

What it gives up: quantized and hierarchical ZeRO, offload of parameters, offload to NVMe: checkpoints cannot read their
state.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.loss_scale import FIRST

# Checkpoints read private attributes of this version (checkpoint/layouts.py lists them).
DEEPSPEED_VERSION = "0.19.8"

# Settings of DeepSpeed under which the state lies where checkpoints do not look, or the gradient norm is not known.
_REFUSED = [
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


# Keys that DeepSpeed reads at the top level of its configuration -> where a run's configuration has them.
TOP_LEVEL = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size / micro_batch_size / cluster.workers; it follows from them",
    "gradient_clipping": "optim.clip",
    "zero_optimization": "zero.stage and zero.extra",
    "bf16": "precision.dtype",
    "fp16": "precision.dtype",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "activation_checkpointing": "activation_checkpointing",
    "wandb": "track.wandb",
}


def deepspeed_config(config: Config, world_size: int, pinned: bool = False) -> dict[str, Any]:
    """The run's configuration in DeepSpeed's words, for `world_size` ranks; `pinned`: what is offloaded, for a GPU.

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
        "zero_optimization": _zero_section(config, pinned),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "gradient_allreduce_op": "mean" if config.zero.stage == 3 else "sum",  # see Engine._undo_average
        "bf16": {"enabled": config.precision.dtype == "bf16"},
        "fp16": {"enabled": config.precision.dtype == "fp16", "loss_scale": FIRST},  # static: see loss_scale.py
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU at every micro step
    }
    if low and config.zero.stage > 0:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _zero_section(config: Config, pinned: bool) -> dict[str, Any]:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # here: engine.py says first what it must know

    extra = config.zero.extra
    for key in _REFUSED:
        if extra.get(key) and (key, extra[key]) != ("zero_hpz_partition_size", 1):
            raise ConfigError(f"zero.extra.{key}: not supported, as checkpoints cannot save its state. Remove the key.")
    if extra.get("stage", config.zero.stage) != config.zero.stage or not extra.get("compute_grad_norm", True):
        raise ConfigError("zero.extra: set the stage by zero.stage; compute_grad_norm cannot be off. Remove the key.")
    if "offload_optimizer" in extra:
        raise ConfigError(
            "zero.extra.offload_optimizer: write it as zero.offload_optimizer: cpu. Other devices are not supported."
        )
    for key in extra:
        if key in TOP_LEVEL:
            raise ConfigError(
                f"zero.extra.{key}: is no key of DeepSpeed's zero_optimization section; here it is {TOP_LEVEL[key]}"
            )
    section: dict[str, Any] = {"stage": config.zero.stage, **extra}
    if config.zero.offload_optimizer:
        section["offload_optimizer"] = {"device": config.zero.offload_optimizer, "pin_memory": pinned}
    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"zero.extra: DeepSpeed {DEEPSPEED_VERSION} refuses it: {wrong}") from error
    return section
