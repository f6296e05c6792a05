"""Two small networks and the loop of pipeline/train.py over made-up batches, for tests of engine and checkpoint.

`Words` is a language model in miniature: tied embedding, attention, layer norms, dropout, a frozen parameter, padded
rows. `Images` is a convnet with group norm. Global batches of M = 4 micro batches of 2 rows; which rank runs which
follows train.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline import checkpoint as checkpoints
from pipeline.config import Config
from pipeline.errors import DataError
from pipeline.optim import learning_rate
from pipeline.sections import Group, Optim, Precision, Schedule, Zero
from pipeline.session import World

if TYPE_CHECKING:
    from pipeline.engine import Engine

ROWS, MICRO, LENGTH, WORDS, WIDTH, CLASSES = 8, 2, 6, 23, 12, 5
ELEMENTS = {"shift": WIDTH, "place": LENGTH * WIDTH, "embed.weight": WORDS * WIDTH}  # a buffer, a frozen, a tied one
STEPS = 40
DATA = {"identity": "d1", "fingerprint": {"lanes": 4}}


class Words(nn.Module):
    """tokens [B, LENGTH] -> logits [B, LENGTH, WORDS]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.place = nn.Parameter(torch.randn(LENGTH, WIDTH), requires_grad=False)
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 31), nn.Linear(31, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight  # tied
        self.recompute = False
        self.register_buffer("shift", torch.linspace(-1, 1, WIDTH))
        self.shift: Tensor

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        self.recompute = True

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place
        q, k, v = self.mix(self.norm(x)).split(WIDTH, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + (checkpoint(self.widen, x, use_reentrant=False) if self.recompute else self.widen(x))
        return self.head(self.last(x) + 0.01 * self.shift.to(x.dtype))

    def widen(self, x: Tensor) -> Tensor:
        return F.dropout(self.down(F.gelu(self.up(x))), 0.1, self.training)


class Images(nn.Module):
    """pixels [B, 3, 8, 8] -> logits [B, CLASSES]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6)
        self.conv2, self.norm2 = nn.Conv2d(6, 9, 3, stride=2), nn.GroupNorm(3, 9)
        self.head = nn.Linear(9, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.conv1(pixels)))
        x = F.gelu(self.norm2(self.conv2(x)))
        return self.head(x.mean(dim=(2, 3)))


def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return Words() if kind == "words" else Images()


def config(kind: str, stage: int, dtype: str = "fp32", **changes: Any) -> Config:
    """words: AdamW, a group of its own for the embedding. images: SGD with momentum."""
    schedule = Schedule(name="cosine", warmup=3)
    if kind == "words":
        groups = (Group(match="embed.*", lr_scale=0.5),)
        settings: dict[str, Any] = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1, "groups": groups}
    else:
        settings = {"name": "sgd", "lr": 5e-2, "weight_decay": 1e-2}
    stages = {"stage": stage, "extra": changes.pop("extra", {}), "offload_optimizer": changes.pop("offload", None)}
    optim = Optim.model_validate({**settings, "clip": 1.0, "schedule": schedule, **changes.pop("optim", {})})
    return Config.model_construct(
        name="small",
        steps=STEPS,
        global_batch_size=ROWS,
        micro_batch_size=MICRO,
        optim=optim,
        zero=Zero.model_validate(stages),
        precision=Precision.model_validate({"dtype": dtype}),
        **changes,
    )


def batch(kind: str, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """inputs, targets, and which terms count [ROWS, ...]; ragged, and some micro batches nearly empty."""
    g = torch.Generator().manual_seed(1000 + step)
    if kind == "words":
        tokens = torch.randint(0, WORDS, (ROWS, LENGTH + 1), generator=g)
        lengths = torch.randint(1, LENGTH + 1, (ROWS, 1), generator=g)
        return tokens[:, :-1], tokens[:, 1:] // 3, (torch.arange(LENGTH) < lengths).float()
    pixels = torch.randn(ROWS, 3, 8, 8, generator=g)
    return pixels, pixels.mean(dim=(1, 2, 3)).mul(40).long().clamp(-2, 2) + 2, torch.ones(ROWS)


def loss_sum(net: Any, inputs: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """Sum of the cross entropy over the terms that count, [] fp32."""
    logits = net(inputs).float()
    terms = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
    return (terms * counts.reshape(-1)).sum()


def step(
    engine: Engine, world: World, settings: Config, kind: str, number: int, spoil: float = 1.0
) -> tuple[float, Any]:
    """One optimizer step as train.py takes it: (mean loss over the ranks, StepResult). `spoil`: factor on a loss."""
    from pipeline import ema

    inputs, targets, counts = batch(kind, number)
    ranks, every = world.world_size, settings.micro_batches
    first, end = world.rank * every // ranks, (world.rank + 1) * every // ranks
    total = 0.0
    for turn in range(settings.micro_steps(ranks)):
        j = min(first + turn, end - 1)
        filler = first + turn >= end
        rows = slice(j * MICRO, (j + 1) * MICRO)
        torch.manual_seed(number * 100 + j)
        loss = loss_sum(engine.model, inputs[rows], targets[rows], counts[rows])
        if not filler:
            total += loss.item()
        factor = spoil if j == 0 else 1.0
        engine.backward(loss * (0.0 if filler else factor / float(counts.sum())))
    rate = learning_rate(settings.optim.schedule, settings.optim.lr, number, settings.steps)
    result = engine.step(rate)
    if result.applied:
        ema.update(engine, settings.ema, number)
    return float(world.gather([total]).sum() / counts.sum()), result


def curve(engine: Engine, world: World, settings: Config, kind: str, first: int, end: int) -> list[float]:
    """Losses of steps [first, end)."""
    return [step(engine, world, settings, kind, number)[0] for number in range(first, end)]


def start(world: World, settings: Config, kind: str) -> Engine:
    from pipeline import engine

    return engine.build(settings, model(kind), world)


def state(engine: Engine) -> dict[str, Any]:
    """Everything of this rank that a step may change, copied."""
    from pipeline.checkpoint import layouts

    found: dict[str, Any] = {}
    for piece in layouts.pieces(engine):
        found |= {f"{piece.name}|{key}": tensor.clone() for key, tensor in piece.state.items()}
        found[f"{piece.name}|weights"] = piece.weights[0].clone()
    numbers = (engine.optimizer.state[tensor].get("step") for _, tensor in engine.optimizer_tensors())
    return found | {f"step {i}": float(number) for i, number in enumerate(numbers) if number is not None}


def whole(world: World, engine: Engine) -> dict[str, Tensor]:
    """Every state of every parameter, put together from the pieces of all ranks: "name|key" -> flat tensor."""
    from pipeline.checkpoint import layouts

    mine = [
        (f"{piece.name}|{key}", piece.start, tensor.cpu())
        for piece in layouts.pieces(engine)
        for key, tensor in piece.state.items()
        if world.rank == 0 or not piece.replicated
    ]
    found: dict[str, dict[int, Tensor]] = {}
    for pieces in world.gather_objects(mine):
        for place, start, tensor in pieces:
            found.setdefault(place, {})[start] = tensor
    return {place: torch.cat([parts[start] for start in sorted(parts)]) for place, parts in found.items()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two states are equal to the bit."""
    equal = (torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k] for k in a)
    return a.keys() == b.keys() and all(equal)


def buffers(filled: bool) -> dict[str, Tensor]:
    """Tensors beside the parameters, of odd sizes and dtypes; `filled` as saved, else zeros to read into."""
    values = {"norm.running_mean": torch.arange(7.0) / 3, "norm.count": torch.tensor(5), "one": torch.tensor([0.1])}
    return values if filled else {name: torch.zeros_like(value) for name, value in values.items()}


def save(world: World, settings: Config, engine: Engine, folder: Path, step: int) -> Path:
    facts: dict[str, Any] = {"step": step, "attempt": 1, "config": settings, "data": DATA}
    return checkpoints.save(engine, world, folder, buffers=buffers(True), **facts)


def same_data(step: int, saved: Mapping[str, Any]) -> list[str]:
    """What is asked about a checkpoint's data before anything of it is read."""
    if saved != DATA:
        raise DataError(f"was trained on {saved}")
    return []


def load(world: World, settings: Config, engine: Engine, folder: Path) -> checkpoints.Restored | None:
    """Restore, and see that the buffers came back."""
    found = buffers(False)
    restored = checkpoints.restore(engine, world, folder, config=settings, resume=same_data, buffers=found)
    assert restored is None or same(found, buffers(True))
    return restored
