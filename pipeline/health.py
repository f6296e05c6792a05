"""How every layer is doing, at chosen steps: gradients, weights, updates, activations, dead units, attention.

    gradient norm      of the layer's parameters, over the whole batch, before clipping
    dead units         share of a matrix's output units whose gradient is exactly zero: the batch does not reach them
    weight norm        of the fp32 masters
    update ratio       norm of the step's change / weight norm
    activation         mean and scale (root mean square) of the layer's output
    attention entropy  of each attention, in nats: 0 looks at one place, log(n) at n alike

Gradients and weights are read where the step is taken; activations and attention come from one forward pass of their
own over a few rows, without dropout, so that training itself is bitwise the same with and without. What it gives up:
units die between two looks unseen; a second copy of this rank's masters lives while a looked-at step is taken.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.checkpoint import layouts
from pipeline.data.fill import MicroBatch
from pipeline.evaluate import on_device
from pipeline.learner import Learner
from pipeline.optim import canonical
from pipeline.session import Session

ROWS = 4  # of a micro batch that the forward pass of a look takes
DEAD = 0.9  # share of dead units from which on a layer is warned about, when it holds for two looks
SCALE = 1e3  # root mean square of a healthy layer's output stays far below
STEEP = 100.0  # times the median layer's gradient norm
UPDATE = 0.3  # a step that changes a layer by so much of itself rewrites it; 0.001 is usual
PEAKED = 0.05  # nats; Zhai et al. 2023 (arXiv 2303.06296): entropy collapses before training diverges


class Health:
    """The looks of one attempt. All ranks call alike."""

    def __init__(self, session: Session, learner: Learner, every: int | None) -> None:
        self._session, self._learner, self._every = session, learner, every
        self._metrics: dict[str, float] = {}
        self._seconds = 0.0  # that the present look took so far
        self._before: list[Tensor] = []
        self._since: dict[str, int] = {}  # "layer: trouble" -> step where it was first seen
        self._told: set[str] = set()

    def due(self, step: int) -> bool:
        """Whether a look is taken at this step."""
        return self._every is not None and (step + 1) % self._every == 0

    def before_step(self) -> None:
        """Between the last backward and the step: gradients, dead units; remember the weights."""
        began = time.perf_counter()
        norms: dict[str, Tensor] = {}
        dead: dict[str, Tensor] = {}
        layers = {canonical(name): layer for name, layer in self._learner.engine.module.named_modules()}
        for name, gradient in self._learner.engine.gradients():
            layer, _, kind = name.rpartition(".")
            norm = gradient.float().norm()
            norms[layer] = torch.hypot(norms[layer], norm) if layer in norms else norm
            units = _unit_dimension(layers.get(layer)) if kind == "weight" else None
            if units is not None:
                dead[layer] = (gradient.movedim(units, 0).flatten(1).abs().amax(1) == 0).float().mean()
        self._metrics = _named("grad_norm", norms) | _named("dead_units", dead)
        pieces = layouts.pieces(self._learner.engine)
        self._before = [piece.state[layouts.MASTER].clone() for piece in pieces if layouts.MASTER in piece.state]
        self._seconds = time.perf_counter() - began

    def after_step(self, step: int, batches: list[MicroBatch], applied: bool) -> None:
        """Once the step is taken: weights, updates, activations, attention; all of it into the journal."""
        began = time.perf_counter()
        self._session.phase("evaluation", step)
        if applied:
            self._metrics |= self._weights()
        self._before = []
        self._metrics |= self._outputs(batches[0].batch)
        if self._session.world.rank == 0:
            seconds = self._seconds + time.perf_counter() - began
            self._session.record("health", step=step, metrics=self._metrics, seconds=seconds)
            for layer, message in self._troubles(step):
                self._session.record("warning", step=step, layer=layer, message=message)

    def _weights(self) -> dict[str, float]:
        """Norms of masters and of their change, each rank adding up the pieces that it owns."""
        engine, world = self._learner.engine, self._session.world
        places = {name: number for number, name in enumerate(layouts.parameters(engine))}
        sums = torch.zeros(len(places), 2, dtype=torch.float64, device=world.device)  # (weight, change) squared
        trained = (piece for piece in layouts.pieces(engine) if layouts.MASTER in piece.state)
        for piece, before in zip(trained, self._before, strict=True):
            now = piece.state[layouts.MASTER]
            if not piece.replicated or world.rank == 0:
                sums[places[piece.name]] += torch.stack([now.square().sum(), (now - before).square().sum()]).to(sums)
        by_layer: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for name, (weight, change) in zip(places, world.sum_(sums).tolist(), strict=True):
            total = by_layer[name.rpartition(".")[0]]
            total[0], total[1] = total[0] + weight, total[1] + change
        found = {}
        for layer, (weight, change) in by_layer.items():
            found[f"health/{layer}/weight_norm"] = math.sqrt(weight)
            if weight > 0:
                found[f"health/{layer}/update_ratio"] = math.sqrt(change / weight)
        return found

    def _outputs(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """Activations and attention of a few rows on each rank, as the network stands now."""
        engine, world = self._learner.engine, self._session.world
        module = engine.module
        rows = on_device({name: tensor[:ROWS] for name, tensor in batch.items()}, world.device)
        engine.model.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"), _plain(module), _watched(module) as seen:
                self._learner.task.score(engine.model, rows)
        finally:
            engine.model.train()
        if not seen:
            return {}
        totals = world.sum_(torch.stack([*seen.values()]))  # [outputs, (sum, sum of squares, count)]
        found = {}
        for (layer, kind), (total, squares, count) in zip(seen, totals.tolist(), strict=True):
            if kind == "attention":
                found[f"health/{layer}/attention_entropy"] = total / count
            else:
                found[f"health/{layer}/activation_mean"] = total / count
                found[f"health/{layer}/activation_scale"] = math.sqrt(squares / count)
        return found

    def _troubles(self, step: int) -> Iterator[tuple[str, str]]:
        """(layer, sentence) of what deserves a warning and was not told yet."""
        norms = [value for name, value in self._metrics.items() if name.endswith("/grad_norm")]
        usual = median(norms) if norms else 0.0
        now: dict[str, tuple[str, str, bool]] = {}  # -> layer, sentence, whether one look is enough
        for name, value in self._metrics.items():
            layer, _, kind = name.removeprefix("health/").rpartition("/")
            match kind:
                case "dead_units" if value >= DEAD:
                    now[name] = layer, f"{layer}: {value:.0%} of units dead", False
                case "activation_scale" if not value < SCALE:
                    now[name] = layer, f"{layer}: its output has a scale of {value:.3g}", True
                case "grad_norm" if not value <= STEEP * usual:
                    now[name] = layer, f"{layer}: gradient norm {value:.3g}, the median layer has {usual:.3g}", False
                case "update_ratio" if not value < UPDATE:
                    now[name] = layer, f"{layer}: a step changes it by {value:.0%} of itself", False
                case "attention_entropy" if value < PEAKED:
                    now[name] = layer, f"{layer}: attention has collapsed, entropy {value:.2g} nats", False
        self._since = {name: self._since.get(name, step) for name in now}
        self._told &= now.keys()  # what has gone and comes back is told again
        for name, (layer, sentence, at_once) in now.items():
            if name not in self._told and (at_once or self._since[name] < step):
                self._told.add(name)
                yield layer, f"{sentence} since step {self._since[name]}"


def _named(
    kind: str, values: Mapping[str, Tensor], change: Callable[[Tensor], Tensor] = lambda x: x
) -> dict[str, float]:
    """Metrics of one kind from a number for each layer; the device is waited for once."""
    numbers = change(torch.stack([*values.values()])).tolist() if values else []
    return {f"health/{layer}/{kind}": number for layer, number in zip(values, numbers, strict=True)}


def _unit_dimension(layer: nn.Module | None) -> int | None:
    """Which dimension of a layer's weight counts its output units; None: it has no such units."""
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    if isinstance(layer, transposed) or type(layer).__name__ == "Conv1D":  # transformers' own, [inputs, outputs]
        return 1
    return 0 if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) else None


@contextmanager
def _watched(module: nn.Module) -> Iterator[dict[tuple[str, str], Tensor]]:
    """While it lasts: (layer, "output" or "attention") -> float64 [sum, sum of squares, count] over forward passes."""
    seen: dict[tuple[str, str], Tensor] = {}

    def note(place: tuple[str, str], values: Tensor, count: int) -> None:
        values = values.double()
        sums = torch.stack([values.sum(), values.square().sum(), values.new_tensor(count)])
        seen[place] = seen[place] + sums if place in seen else sums

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and layer._parameters:
                note((name, "output"), output, output.numel())
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(weights, Tensor) and weights.dim() == 4:  # [m, heads, queries, keys]
                entropy = -torch.special.xlogy(weights.double(), weights.double()).sum(-1)
                note((name, "attention"), entropy, entropy.numel())

        return hook

    handles = [layer.register_forward_hook(watch(canonical(name))) for name, layer in module.named_modules() if name]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _plain(module: Any) -> Iterator[None]:
    """Fused kernels of attention do not say where they look; transformers' plain one does."""
    usual = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if usual in (None, "eager") or not hasattr(module, "set_attn_implementation"):
        yield
        return
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(usual)
