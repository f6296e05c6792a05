"""Networks of diffusers that take noise out of pictures: a U-Net (Ho et al. 2020), a transformer (Peebles 2022).

    noisy pixels [m, C, H, W], time step int64 [m], class int64 [m] -> noise or velocity [m, C, H, W]

`Process` is what they are trained for and used in: how much noise a time step has, what is learnt, how to draw.

Options are the arguments of diffusers' own classes, so its documentation is the reference; any other is refused, with
the nearest that exists. A class number that is one too high says "no class": both networks have a row for it. Peebles
begins with blocks that change nothing, which diffusers leaves out, and drops classes once for the whole network, where
diffusers would draw for each block; both are done here as he does. What it gives up: recomputed activations.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import diffusers
import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models import flops
from pipeline.problems import nearest

Architecture = Literal["unet", "dit"]
Schedule = Literal["linear", "cosine"]
Prediction = Literal["epsilon", "v_prediction"]


def build(
    architecture: Architecture, options: Mapping[str, Any], *, size: int, channels: int, classes: int | None
) -> nn.Module:
    """A network in fp32, drawn from torch's generator. Raises ConfigError, with all wrong options at once."""
    cls = {"unet": diffusers.UNet2DModel, "dit": diffusers.DiTTransformer2DModel}[architecture]
    follows: dict[str, Any] = {"sample_size": size, "in_channels": channels, "out_channels": channels}
    if architecture == "dit":
        follows["num_embeds_ada_norm"] = classes or 1
    else:
        follows["num_class_embeds"] = None if classes is None else classes + 1
    known = set(inspect.signature(cls.__init__).parameters) - {"self"} - follows.keys()
    problems = []
    for name in options.keys() - known:
        hint = nearest(name, known) or f"known: {', '.join(sorted(known))}"
        told = (
            "follows from the task's other keys; remove it" if name in follows else f"{cls.__name__} has none; {hint}"
        )
        problems.append(f"task.model.{name}: {told}")
    if problems:
        raise ConfigError("\n".join(sorted(problems)))
    try:
        model = cls(**options, **follows)
    except (
        TypeError,
        ValueError,
        KeyError,
        RuntimeError,
        AssertionError,
        ZeroDivisionError,
        NotImplementedError,
    ) as error:
        raise ConfigError(f"task.model: {cls.__name__} cannot be built: {error}") from error
    if isinstance(model, diffusers.UNet2DModel):
        halvings = len(model.config["block_out_channels"]) - 1
        if size % 2**halvings:
            raise ConfigError(
                f"task.image_size: {size} cannot be halved {halvings} times, once between two of block_out_channels; "
                f"take a multiple of {2**halvings}, or fewer of them"
            )
    else:
        patch = model.config["patch_size"]
        if size % patch:
            raise ConfigError(f"task.image_size: {size} is no multiple of task.model.patch_size, {patch}")
        _as_published(model)
    return model


@torch.no_grad()
def _as_published(model: nn.Module) -> None:
    """First weights of DiT as in the paper's code (`initialize_weights`); classes are not dropped inside."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, LabelEmbedding):
            nn.init.normal_(module.embedding_table.weight, std=0.02)
            module.dropout_prob = 0.0
    parts: Any = model
    for block in parts.transformer_blocks:
        for layer in (block.norm1.emb.timestep_embedder.linear_1, block.norm1.emb.timestep_embedder.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)  # "adaLN-Zero": each block begins as the identity
    for layer in (parts.proj_out_1, parts.proj_out_2):
        nn.init.zeros_(layer.weight)


class Process:
    """Noise that grows with the time step, and the way back.

    schedule: of the noise.  prediction: what the network says, the noise or the velocity.  min_snr: gamma, or None.
    """

    def __init__(self, schedule: Schedule, prediction: Prediction, timesteps: int, min_snr: float | None) -> None:
        self.velocity, self.min_snr = prediction == "v_prediction", min_snr
        self.scheduler: Any = diffusers.DDIMScheduler(
            num_train_timesteps=timesteps,
            beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule],
            prediction_type=prediction,
            timestep_spacing="trailing",  # new pictures begin as noise only (Lin et al. 2024)
        )

    def noisy(self, pixels: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The pixels, fp32 [m, C, H, W], with as much of the noise as time steps [m] have."""
        return self.scheduler.add_noise(pixels, noise, time)

    def errors(self, model: Any, pixels: Tensor, noise: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        """fp32 [m]: mean squared error of each picture, weighted by min(SNR, gamma) / SNR (+ 1 for the velocity)."""
        said = predict(model, self.noisy(pixels, noise, time), time, label)
        truth = self.scheduler.get_velocity(pixels, noise, time) if self.velocity else noise
        errors = (said - truth).square().mean(dim=(1, 2, 3))
        if self.min_snr is None:
            return errors
        share = self._signal(time)
        ratio = share / (1 - share)
        return errors * ratio.clamp(max=self.min_snr) / (ratio + 1 if self.velocity else ratio)

    def estimate(self, model: Any, noisy: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        """What the network takes for the picture behind the noise, [m, C, H, W]."""
        said, share = predict(model, noisy, time, label), self._signal(time)[:, None, None, None]
        signal, rest = share.sqrt(), (1 - share).sqrt()
        return signal * noisy - rest * said if self.velocity else (noisy - rest * said) / signal

    def draw(
        self, model: Any, noise: Tensor, label: Tensor | None, untold: int | None, steps: int, guidance: float
    ) -> Tensor:
        """Pictures [m, C, H, W], about -1 to 1, from noise, by `steps` steps of DDIM that add none.

        guidance: how far to go from what is said without a class (the label `untold`) to what is said with it; 1: just
        there, and also when `untold` is None.
        """
        x, guided = noise, guidance != 1 and label is not None and untold is not None
        if guided and label is not None:
            label = torch.cat([label, torch.full_like(label, untold or 0)])  # [2m]
        self.scheduler.set_timesteps(steps)
        for step in self.scheduler.timesteps.tolist():
            given = torch.cat([x, x]) if guided else x
            said = predict(model, given, torch.full((len(given),), step, device=x.device), label)
            if guided:
                told, without = said.chunk(2)
                said = without + guidance * (told - without)
            x = self.scheduler.step(said, step, x).prev_sample
        return x

    def _signal(self, time: Tensor) -> Tensor:
        """fp32 [m]: share of the signal in the variance."""
        return self.scheduler.alphas_cumprod.to(time.device)[time]


def predict(model: Any, noisy: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
    """The network's answer in fp32: [m, C, H, W], [m], [m] -> [m, C, H, W]."""
    return model(noisy, time, class_labels=label, return_dict=False)[0].float()


class _Counted(nn.Module):
    """The network as flops.count calls it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=predict(self.network, **inputs))


def flops_per_picture(architecture: Architecture, options: Mapping[str, Any], **sizes: Any) -> float:
    """Forward and backward of one picture; `sizes` as for `build`."""
    labelled = architecture == "dit" or sizes["classes"] is not None
    shape = (1, sizes["channels"], sizes["size"], sizes["size"])

    def example() -> dict[str, Any]:
        zero = torch.zeros(1, dtype=torch.int64)
        return {"noisy": torch.zeros(shape), "time": zero, "label": zero if labelled else None}

    built = partial(build, architecture, options, **sizes)
    return flops.count(lambda: _Counted(built()), example)
