"""Pictures out of noise: a network learns to take noise out (DDPM, Ho et al. 2020), and new ones begin as noise only.

    {key}.png|jpg|webp [, {key}.cls] --prepare--> uint8 pixels --(device)--> + noise --> network --> noise, or velocity

Noise, time steps and which classes are dropped are drawn on the host from torch's generator, which the loop has seeded
for this micro batch: neither a resume nor the number of workers changes them. A held-out picture is scored with noise
that follows from its number alone. With `classes` the network is told the class, but for a share of the pictures, so
that it can also do without; new pictures are then pushed towards their class (classifier-free guidance, Ho and Salimans
2022). They are drawn by DDIM (Song et al. 2021), best with the running averages of the weights (`ema`).

Batch: "image" uint8 [m, size, size, channels], "number" int64 [m] (of the sample); with classes "label" int64 [m].
What it gives up: pictures that are not square, latent spaces, learnt variances.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from pipeline.data import augment
from pipeline.errors import ConfigError, DataError
from pipeline.sections import Strict
from pipeline.tasks import Batch, Row, Sums

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from pipeline.data.reader import Sample
    from pipeline.models.denoisers import Process

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
LEVELS = 4  # time steps, evenly apart, at which a held-out picture is scored
TOGETHER = 64  # pictures that are drawn at a time


class Config(Strict):
    """The `task` section of diffusion."""

    name: str = "diffusion"
    image_size: int = Field(ge=1, description="pixels, height and width; other images are cut square and resized")
    channels: Literal[1, 3] = Field(default=3, description="images are turned to grey or colour")
    classes: Annotated[int, Field(ge=1)] | None = Field(default=None, description="labels 0 to classes - 1; null: none")
    names: tuple[str, ...] = Field(default=(), description="of the classes, for prompts")
    architecture: Literal["unet", "dit"] = Field(default="unet", description="UNet2DModel or DiTTransformer2DModel")
    model: dict[str, Any] = Field(default={}, description="arguments of that class of diffusers")
    prediction: Literal["epsilon", "v_prediction"] = Field(
        default="v_prediction", description="what the network says: the noise, or the velocity (Salimans and Ho 2022)"
    )
    schedule: Literal["linear", "cosine"] = Field(
        default="cosine", description="of the noise: Ho et al. 2020, or Nichol and Dhariwal 2021"
    )
    timesteps: int = Field(default=1000, ge=2, description="levels of noise in training")
    min_snr: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="gamma of min-SNR weighting (Hang et al. 2023), 5 in the paper; null: none"
    )
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="training: share of pictures whose class is not told"
    )
    flip: bool = Field(default=False, description="training: mirrors half of the images")
    sampling_steps: int = Field(default=50, ge=1, description="of DDIM, for new pictures")
    guidance: float = Field(default=1.0, ge=0, description="towards the class; 1: as learnt, more: beyond it")

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.names and len(self.names) != self.classes:
            raise ValueError(f"`names` has {len(self.names)} names, and `classes` is {self.classes}")
        if self.sampling_steps > self.timesteps:
            raise ValueError(f"`sampling_steps` is {self.sampling_steps}, more than the {self.timesteps} `timesteps`")
        return self


class Task:
    """See pipeline/tasks/__init__.py for what each method promises."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.augments = config.flip

    @property
    def _sizes(self) -> dict[str, Any]:
        return {"size": self.config.image_size, "channels": self.config.channels, "classes": self.config.classes}

    @cached_property
    def _process(self) -> Process:
        from pipeline.models.denoisers import Process

        config = self.config
        return Process(config.schedule, config.prediction, config.timesteps, config.min_snr)

    def build_model(self) -> nn.Module:
        """See denoisers.py. Raises ConfigError."""
        from pipeline.models import denoisers

        return denoisers.build(self.config.architecture, self.config.model, **self._sizes)

    def write_settings(self, folder: Path) -> None:
        """The scheduler and model_index.json, which make the folder a DDIMPipeline of diffusers."""
        import diffusers

        from pipeline.models import exported

        self._process.scheduler.save_pretrained(folder / "scheduler")
        network = {"unet": "UNet2DModel", "dit": "DiTTransformer2DModel"}[self.config.architecture]
        index = {
            "_class_name": "DDIMPipeline",
            "_diffusers_version": diffusers.__version__,
            "scheduler": ["diffusers", "DDIMScheduler"],
            exported.PART: ["diffusers", network],
        }
        (folder / exported.PIPELINE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def prepare(self, sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        """{"image": uint8 [size, size, channels], "number": int64 []}, with classes also "label": int64 [].

        Raises DataError naming the sample.
        """
        config = self.config
        image = augment.in_channels(sample.first(*IMAGE_FIELDS), config.channels, sample.key)
        image = augment.fit(image, config.image_size)
        if rng is not None and config.flip:
            image = augment.random_flip(image, rng)
        prepared = {"image": np.ascontiguousarray(image), "number": np.array(sample.number, np.int64)}
        if config.classes is not None:
            label = sample["cls"]
            if not 0 <= label < config.classes:
                raise DataError(
                    f"sample {sample.key} has label {label}; with task.classes {config.classes} labels go from 0 to "
                    f"{config.classes - 1}: mend the label, or set task.classes to how many classes there are"
                )
            prepared["label"] = np.array(label, np.int64)
        return prepared

    def weight(self, batch: Batch) -> float:
        """One term per picture."""
        return float(len(batch["image"]))

    def loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Sums]:
        """Mean squared error over the pixels, weighted by the level of noise, summed over the pictures."""
        import torch

        pixels, m = self._pixels(batch), len(batch["image"])
        noise = torch.randn(pixels.shape).to(pixels.device)
        time = torch.randint(self.config.timesteps, (m,)).to(pixels.device)
        untold = torch.rand(m).to(pixels.device) < self.config.label_dropout
        label = self._label(batch["label"], untold) if "label" in batch else self._no_label(m, pixels)
        loss = self._process.errors(model, pixels, noise, time, label).sum()
        return loss, {"loss": (loss.detach(), m)}

    def score(self, model: Callable[..., Any], batch: Batch) -> Sums:
        """The same loss at `LEVELS` levels of noise for each picture, its class told."""
        import torch

        pixels, m = self._pixels(batch), len(batch["image"])
        label = batch["label"] if "label" in batch else self._no_label(m, pixels)
        generators = self._generators(batch)
        begin = torch.stack([torch.rand((), generator=each) for each in generators])  # [m]
        total = torch.zeros((), device=pixels.device)
        for level in range(LEVELS):
            time = ((begin + level) / LEVELS * self.config.timesteps).long().to(pixels.device)
            noise = self._noise(generators).to(pixels.device)
            total += self._process.errors(model, pixels, noise, time, label).sum()
        return {"loss": (total, m * LEVELS)}

    def show(self, model: Callable[..., Any], batch: Batch) -> list[Row]:
        """Each picture, itself with noise of the middle level, what the network makes of that, and a new one of its
        class that begins as that noise.
        """
        import torch

        pixels, m = self._pixels(batch), len(batch["image"])
        label = batch["label"] if "label" in batch else self._no_label(m, pixels)
        noise = self._noise(self._generators(batch)).to(pixels.device)
        time = torch.full((m,), self.config.timesteps // 2, device=pixels.device)
        noisy = self._process.noisy(pixels, noise, time)
        denoised = self._process.estimate(model, noisy, time, label)
        drawn = self._draw(model, noise, label, self.config.sampling_steps, self.config.guidance)
        pictures = {"picture": batch["image"].cpu().numpy()}
        for name, made in (("noisy", noisy), ("denoised", denoised), ("new", drawn)):
            pictures[name] = _as_bytes(made)
        told = {"label": batch["label"].tolist()} if "label" in batch else {}
        return [dict(zip((*pictures, *told), row)) for row in zip(*pictures.values(), *told.values())]

    def sample(
        self,
        model: Callable[..., Any],
        prompts: list[str],
        count: int,
        generator: Generator,
        options: Mapping[str, str],
    ) -> list[Row]:
        """`count` new pictures for each prompt, a class by its number or name; without one, of no class.

        Options: steps (of DDIM), guidance. Raises ConfigError for a class or an option that there is not.
        """
        import torch

        config = self.config
        steps, guidance = self._options(options)
        wanted = [self._class_of(prompt) for prompt in prompts] or [None]
        classes = [each for each in wanted for _ in range(count)]
        device = next(model.parameters()).device  # type: ignore[attr-defined]
        rows: list[Row] = []
        for first in range(0, len(classes), TOGETHER):
            part = classes[first : first + TOGETHER]
            shape = (len(part), config.channels, config.image_size, config.image_size)
            noise = torch.randn(shape, generator=generator).to(device)
            label = self._no_label(len(part), noise)
            if config.classes is not None:
                label = torch.tensor([config.classes if each is None else each for each in part], device=device)
            pictures = _as_bytes(self._draw(model, noise, label, steps, guidance))
            for picture, each in zip(pictures, part):
                rows.append({"picture": picture} if each is None else {"picture": picture, "label": each})
        return rows

    def flops_per_sample(self) -> float:
        """Forward and backward of one picture, counted once from the graph."""
        from pipeline.models import denoisers

        return denoisers.flops_per_picture(self.config.architecture, self.config.model, **self._sizes)

    def _draw(self, model: Any, noise: Tensor, label: Tensor | None, steps: int, guidance: float) -> Tensor:
        return self._process.draw(model, noise, label, self.config.classes, steps, guidance)

    def _pixels(self, batch: Batch) -> Tensor:
        """fp32 [m, C, H, W], -1 to 1"""
        return batch["image"].permute(0, 3, 1, 2).float() / 127.5 - 1

    def _label(self, label: Tensor, untold: Tensor) -> Tensor:
        """int64 [m]; the class behind the last says that none is told"""
        return label.masked_fill(untold, self.config.classes or 0)

    def _no_label(self, m: int, like: Tensor) -> Tensor | None:
        """DiT wants a class in any case: the only one there is"""
        import torch

        return torch.zeros(m, dtype=torch.int64, device=like.device) if self.config.architecture == "dit" else None

    def _generators(self, batch: Batch) -> list[Generator]:
        """One for each held-out sample, on the host: its numbers follow from the sample's own."""
        import torch

        return [torch.Generator().manual_seed(number) for number in batch["number"].tolist()]

    def _noise(self, generators: Sequence[Generator]) -> Tensor:
        """fp32 [m, C, H, W]"""
        import torch

        shape = (self.config.channels, self.config.image_size, self.config.image_size)
        return torch.stack([torch.randn(shape, generator=each) for each in generators])

    def _class_of(self, prompt: str) -> int:
        classes, names = self.config.classes, self.config.names
        if classes is None:
            raise ConfigError(f"prompt {prompt!r}: this network was trained without classes; leave the prompt out")
        if prompt in names:
            return names.index(prompt)
        if prompt.isdecimal() and int(prompt) < classes:
            return int(prompt)
        known = f", or a name: {', '.join(names)}" if names else ""
        raise ConfigError(f"prompt {prompt!r} is no class; give a number from 0 to {classes - 1}{known}")

    def _options(self, options: Mapping[str, str]) -> tuple[int, float]:
        """(steps, guidance)"""
        known = {"steps": str(self.config.sampling_steps), "guidance": str(self.config.guidance)}
        unknown = sorted(options.keys() - known.keys())
        if unknown:
            raise ConfigError(f"{', '.join(unknown)}: no such option; there are: {', '.join(known)}")
        given = known | dict(options)
        try:
            steps, guidance = int(given["steps"]), float(given["guidance"])
        except ValueError:
            raise ConfigError(f"steps={given['steps']} guidance={given['guidance']}: give numbers") from None
        if not 1 <= steps <= self.config.timesteps:
            raise ConfigError(f"steps={steps}: give a number from 1 to {self.config.timesteps}")
        return steps, guidance


def _as_bytes(pixels: Tensor) -> np.ndarray:
    """[m, C, H, W], -1 to 1 -> uint8 [m, H, W, C], rounded as diffusers does"""
    shown = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
    return (shown * 255).round().astype(np.uint8)
