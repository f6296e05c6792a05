"""Optimizers, parameter groups, and the learning rate as a pure function of the step.

There is no scheduler object, so nothing of it can be saved wrongly: step k always asks `learning_rate(..., k, ...)`.
Only optimizers that work element by element are offered (`OPTIMIZERS`), because under ZeRO they see flat slices of
parameters, never whole matrices; Muon is DeepSpeed's own (muon.py). Their state is made by allocation (`allocate`), so
that a checkpoint can be read into an engine that has not yet taken a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline import muon
from pipeline.errors import ConfigError
from pipeline.sections import Group, Optim, Schedule


class Lion(torch.optim.Optimizer):
    """Steps of one size in the direction of a momentum's sign (Chen et al. 2023, arXiv 2302.06675, program 1).

    Its authors take a tenth of AdamW's learning rate, ten times its weight decay, and betas of 0.9 and 0.99.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, (blend, keep) = group["lr"], group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                average = state["exp_avg"]
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(average.lerp(parameter.grad, 1 - blend).sign_(), alpha=-lr)
                average.lerp_(parameter.grad, 1 - keep)


class Kind(NamedTuple):
    """One optimizer: its class, its arguments from the configuration, and what it keeps per parameter.

    `tensors`: of the parameter's shape, all zeros before the first step.  `numbers`: single ones, and how they begin.
    """

    make: Callable[..., torch.optim.Optimizer]
    settings: Callable[[Optim], dict[str, Any]]
    tensors: tuple[str, ...]
    numbers: dict[str, float] = {"step": 0.0}  # noqa: RUF012 (never written to)
    fused: bool = False


def _adam(config: Optim) -> dict[str, Any]:
    return {"betas": config.betas, "eps": config.eps}


EMA = "ema"  # key of the moving average of the weights (ema.py), which lies beside the optimizer's own tensors
_MEANS = ("exp_avg", "exp_avg_sq")

# Each is proven by a test: at ZeRO 1, 2 and 3 the curve of ZeRO 0, and its state read back at another stage and number
# of workers. Names are those of sections.py.
OPTIMIZERS = {
    "adamw": Kind(torch.optim.AdamW, _adam, _MEANS, fused=True),
    "adam": Kind(torch.optim.Adam, _adam, _MEANS, fused=True),
    "nadam": Kind(torch.optim.NAdam, _adam, _MEANS, {"step": 0.0, "mu_product": 1.0}),
    "radam": Kind(torch.optim.RAdam, _adam, _MEANS),
    "adamax": Kind(torch.optim.Adamax, _adam, ("exp_avg", "exp_inf")),
    "adadelta": Kind(torch.optim.Adadelta, lambda c: {"rho": c.betas[1], "eps": c.eps}, ("square_avg", "acc_delta")),
    "rmsprop": Kind(
        torch.optim.RMSprop,
        lambda c: {"alpha": c.betas[1], "eps": c.eps, "momentum": c.momentum},
        ("square_avg", "momentum_buffer"),
    ),
    "sgd": Kind(torch.optim.SGD, lambda c: {"momentum": c.momentum, "nesterov": c.nesterov}, ("momentum_buffer",), {}),
    "lion": Kind(Lion, lambda c: {"betas": c.betas}, ("exp_avg",), {}),
    "muon": Kind(muon.build, lambda c: {}, ()),
}

# Names that wrappers put inside a parameter's name; the canonical name is without them.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


def learning_rate(schedule: Schedule, lr: float, step: int, steps: int) -> float:
    """Learning rate of step `step` (counted from 0) in a run of `steps` steps; before each group's `lr_scale`.

    Linear warm-up to `lr` over `schedule.warmup` steps, then the shape, which would reach `schedule.final * lr` at
    step `steps`, one after the last. wsd stays at `lr` and falls linearly over the last `schedule.decay` steps (a
    tenth when not given).
    """
    if step < schedule.warmup:
        return lr * (step + 1) / schedule.warmup
    if schedule.name == "constant":
        return lr
    begin = schedule.warmup
    if schedule.name == "wsd":
        begin = max(begin, steps - (schedule.decay or max(1, steps // 10)))
    done = min(1.0, max(0.0, (step - begin) / max(1, steps - begin)))  # 0 at the begin of the fall, 1 at its end
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule.name == "cosine" else 1 - done
    return lr * (schedule.final + (1 - schedule.final) * left)


def canonical(name: str) -> str:
    """A parameter's name without what torch.compile and checkpoint wrappers add to it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def parameter_groups(model: nn.Module, config: Optim) -> list[dict[str, Any]]:
    """The trainable parameters by treatment: "name", "lr_scale", "weight_decay", "params", "parameters" (their names).

    A parameter belongs to the first of `config.groups` whose glob matches its name, else to "default". A group without
    a weight decay of its own is split in two, so that parameters of one dimension (biases, norms) are not decayed; with
    `config.layer_decay` each is split by layer, and its `lr_scale` is lower the deeper the layer lies (BEiT: Bao et al.
    2021). With muon, matrices inside layers are groups of their own ("use_muon"). Raises ConfigError when a glob
    matches nothing, when nothing is trainable, or when there are no layers, and they are asked for.
    """
    groups: dict[str, dict[str, Any]] = {}
    matched: set[str] = set()
    layers = depths(model) if config.layer_decay < 1 else {}
    inside = _inside_layers(model)
    trainable = {canonical(name): p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    for name, parameter in trainable.items():
        chosen = next((g for g in config.groups if fnmatchcase(name, g.match)), Group(match="default"))
        matched.add(chosen.match)
        label, decay = chosen.match, chosen.weight_decay
        if decay is None:
            decay = config.weight_decay
            if decay and parameter.ndim <= 1 and not config.decay_norm_and_bias:
                label, decay = f"{label} (not decayed)", 0.0
        scale = chosen.lr_scale
        if layers:
            below_top = max(layers.values()) - layers[name]
            label, scale = f"{label}, layer {layers[name]}", scale * config.layer_decay**below_top
        settings: dict[str, Any] = {"lr_scale": scale, "weight_decay": decay}
        if config.name == "muon":
            settings["use_muon"] = parameter.ndim == 2 and name in inside
            label += ", muon" if settings["use_muon"] else ""
        group = groups.setdefault(label, {"name": label, **settings, "params": [], "parameters": []})
        group["params"].append(parameter)
        group["parameters"].append(name)
    if not groups:
        raise ConfigError(f"{type(model).__name__} has no trainable parameter: every one has requires_grad=False")
    for group in config.groups:
        if group.match not in matched:
            some = ", ".join(list(trainable)[:5])
            raise ConfigError(
                f"optim.groups: {group.match!r} is the first match of no parameter. Names are like: {some}"
            )
    return list(groups.values())


def depths(model: nn.Module) -> dict[str, int]:
    """Each parameter's name -> its layer, from 0 (the embedding, or the stem) to the head; frozen ones count too.

    A layer is an entry of an outermost `nn.ModuleList` (transformers' blocks; of its convnets the stages), in the order
    in which the network names them; what stands before, between or behind the lists is a layer of its own.
    Raises ConfigError when there is no such list.
    """
    inside, found = _inside_layers(model), {}
    layer, last = -1, None
    for full, _ in model.named_parameters():
        name = canonical(full)
        if (here := inside.get(name)) != last or layer < 0:
            layer, last = layer + 1, here
        found[name] = layer
    if not inside:
        raise ConfigError(
            f"optim.layer_decay: {type(model).__name__} keeps no layers in an nn.ModuleList, so nobody knows which is "
            "below which. Leave it out, and give optim.groups with an lr_scale each."
        )
    return found


def _inside_layers(model: nn.Module) -> dict[str, str]:
    """Name of a parameter -> that of the entry of an outermost `nn.ModuleList` in which it lies, where there is one."""
    lists = [canonical(name) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = {}
    for name in (canonical(full) for full, _ in model.named_parameters()):
        outermost = next((each for each in lists if name.startswith(f"{each}.")), None)  # named before those inside it
        if outermost:
            found[name] = ".".join(name.split(".")[: outermost.count(".") + 2])
    return found


def freeze(model: nn.Module, config: Optim) -> None:
    """Take the parameters that `config.freeze` matches, by any of their names, out of training.

    Raises ConfigError when a glob matches nothing.
    """
    named = [(canonical(name), p) for name, p in model.named_parameters(remove_duplicate=False)]
    for glob in config.freeze:
        matched = [parameter for name, parameter in named if fnmatchcase(name, glob)]
        if not matched:
            some = ", ".join(name for name, _ in named[:5])
            raise ConfigError(f"optim.freeze: {glob!r} matches no parameter. Names are like: {some}")
        for parameter in matched:
            parameter.requires_grad_(False)


def build(config: Optim, groups: list[dict[str, Any]], offloaded: bool = False) -> torch.optim.Optimizer:
    """The torch optimizer over `groups`, at learning rate 0 until the first step sets one.

    Zero, because DeepSpeed takes a step of its own while it builds some layouts: at rate 0 that leaves the weights
    alone. `offloaded`: it will step in host memory, where torch's fused kernels are the fast ones too.
    """
    kind = OPTIMIZERS[config.name]
    if config.name == "muon":
        if not any(group["use_muon"] for group in groups):
            raise ConfigError("optim.name: muon is for matrices inside layers, and this network has none; take adamw")
        return muon.build(config, groups)
    settings = kind.settings(config)
    if kind.fused and (offloaded or torch.cuda.is_available()):
        settings["fused"] = True
    return kind.make(groups, lr=0.0, weight_decay=0.0, **settings)


def state_keys(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, float]]:
    """What an optimizer keeps per parameter of a group: keys of tensors of the parameter's shape, single numbers as
    they begin.
    """
    if type(optimizer).__name__ == muon.CLASS:
        return muon.state_keys(group), OPTIMIZERS["muon"].numbers
    for kind in OPTIMIZERS.values():
        if type(optimizer) is kind.make:
            unused = {"momentum_buffer"} if not optimizer.defaults.get("momentum") else set()
            return tuple(key for key in kind.tensors if key not in unused), kind.numbers
    raise ConfigError(
        f"{type(optimizer).__name__}: its state is not known to the checkpoint; use one of {', '.join(OPTIMIZERS)}"
    )


def allocate(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor, average: bool = False) -> None:
    """Give `parameter` the state from which its first step goes, in place of whatever is there.

    For SGD torch's first step copies the gradient into the momentum; momentum * 0 + gradient is the same. `average`:
    also a moving average, which begins at the weights; optimizers read only keys of their own.
    """
    tensors, numbers = state_keys(optimizer, group)
    on_device = group.get("fused") or group.get("capturable")
    state = optimizer.state[parameter] = {}
    for key, first in numbers.items():
        state[key] = torch.full((), first, dtype=torch.float32, device=parameter.device if on_device else "cpu")
    for key in tensors:
        state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False)
    if average:
        state[EMA] = parameter.detach().clone()
