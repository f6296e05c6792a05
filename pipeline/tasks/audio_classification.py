"""One sound, one class: LSTM or GRU over log-mel features, for clips of any length.

    {key}.wav|flac|ogg, {key}.cls --prepare--> samples --(device)--> log-mel --SpecAugment--> logits --> cross-entropy

Samples travel, and become features on the device. A clip that is longer than `seconds` is cut, at a random place in
training and in the middle otherwise; a shorter one is followed by silence that the network does not see: neither
its features nor its states depend on the clips beside it. Masks are drawn by sample, and laid over the features of the
whole micro batch.

Batch: "samples" float32 [m, longest], "length" int64 [m] (in samples), "label" int64 [m]; in training, when they are
asked for, "bands" int64 [m, masks, 2] and "frames" int64 [m, masks, 2] (first, how many are hidden).
What it gives up: several channels (their mean is taken), several labels per sound, and clips of another rate, which
are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from pipeline.data.reader import SampleError
from pipeline.errors import DataError
from pipeline.sections import Strict
from pipeline.tasks import Batch, Row, Sums

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.data.reader import Sample

SOUND_FIELDS = ("wav", "flac", "ogg")
SHOWN = 3.0  # standard deviations, each way, from black to white of a picture
Count = Annotated[int, Field(ge=0)]


class Network(Strict):
    """The `task.model` section."""

    cell: Literal["lstm", "gru"] = Field(default="lstm", description="kind of recurrent layer")
    width: int = Field(default=128, ge=1, description="of the state of each layer and direction")
    layers: int = Field(default=2, ge=1, description="recurrent layers, one over the other")
    bidirectional: bool = Field(default=True, description="also from the end to the beginning")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="between layers and before the head")


class Masks(Strict):
    """Boxes of the features that are hidden in training: SpecAugment (Park et al. 2019), in its notation F, T, p."""

    bands: Count = Field(default=0, description="masks over bands")
    band_width: int = Field(default=8, ge=1, description="F: bands that one of them hides, at the most")
    frames: Count = Field(default=0, description="masks over frames")
    frame_width: int = Field(default=40, ge=1, description="T: frames that one of them hides, at the most")
    frame_share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.2, description="p: and no more than this share of the clip"
    )


class Config(Strict):
    """The `task` section of audio classification."""

    name: str = "audio_classification"
    classes: int = Field(ge=2, description="labels are 0 to classes - 1")
    rate: int = Field(ge=1, description="samples per second of every clip")
    seconds: float = Field(gt=0, description="longer clips are cut")
    mels: int = Field(default=40, ge=1, description="bands of frequencies")
    window_ms: float = Field(default=25.0, gt=0, description="length of a frame")
    hop_ms: float = Field(default=10.0, gt=0, description="from a frame to the next")
    stack: int = Field(default=1, ge=1, description="frames that the network takes in one step")
    model: Network = Field(default=Network(), description="the network")
    masks: Masks = Field(default=Masks(), description="training: what is hidden of the features")

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if not 1 <= self.hop <= self.window:
            raise ValueError(
                f"at {self.rate} Hz `hop_ms` is {self.hop} samples and `window_ms` {self.window}; a hop has 1 sample "
                "or more, and no more than a window, or sound between two windows is lost"
            )
        if self.masks.bands and self.masks.band_width > self.mels:
            raise ValueError(f"`masks.band_width` is {self.masks.band_width}, and there are {self.mels} `mels`")
        return self

    @property
    def longest(self) -> int:
        """Samples of the longest clip."""
        return max(1, round(self.seconds * self.rate))

    @property
    def window(self) -> int:
        """Samples of a frame."""
        return round(self.window_ms * self.rate / 1000)

    @property
    def hop(self) -> int:
        """Samples from a frame to the next."""
        return round(self.hop_ms * self.rate / 1000)


class Task:
    """See pipeline/tasks/__init__.py for what each method promises."""

    augments = True  # a long clip is cut at a random place

    def __init__(self, config: Config) -> None:
        self.config = config
        self._log_mel: Callable[[Tensor, Tensor], Tensor] | None = None

    def build_model(self) -> nn.Module:
        """features [m, steps, stack * mels], lengths [m] -> logits [m, classes]."""
        from pipeline.models.recurrent import RecurrentClassifier

        config = self.config
        return RecurrentClassifier(
            inputs=config.stack * config.mels, classes=config.classes, **config.model.model_dump()
        )

    def prepare(self, sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        """{"samples": float32 [longest], "length": int64 [], "label": int64 []}, with a generator the masks asked for.

        Raises DataError naming the sample.
        """
        config = self.config
        sound = self._sound(sample)
        spare = len(sound) - config.longest
        if spare > 0:
            begin = int(rng.integers(spare + 1)) if rng is not None else spare // 2
            sound = sound[begin : begin + config.longest]
        samples = np.zeros(config.longest, np.float32)
        samples[: len(sound)] = sound
        prepared = {"samples": samples, "length": np.array(len(sound), np.int64), "label": self._label(sample)}
        masks = config.masks
        if rng is not None and (masks.bands or masks.frames):
            frames = len(sound) // config.hop + 1
            widest = min(masks.frame_width, int(masks.frame_share * frames))
            prepared["bands"] = _draw_masks(masks.bands, masks.band_width, config.mels, rng)
            prepared["frames"] = _draw_masks(masks.frames, widest, frames, rng)
        return prepared

    def weight(self, batch: Batch) -> float:
        """One term per clip."""
        return float(len(batch["label"]))

    def loss(self, model: Callable[..., Tensor], batch: Batch) -> tuple[Tensor, Sums]:
        """Cross-entropy in nats, and the share of clips whose likeliest class is theirs."""
        from torch.nn import functional

        label = batch["label"]
        logits = self._logits(model, batch)[0]
        loss = functional.cross_entropy(logits, label, reduction="sum")
        correct = (logits.argmax(dim=-1) == label).sum()
        return loss, {"loss": (loss.detach(), len(label)), "accuracy": (correct, len(label))}

    def score(self, model: Callable[..., Tensor], batch: Batch) -> Sums:
        """The same sums; what only training does is in its batches."""
        return self.loss(model, batch)[1]

    def show(self, model: Callable[..., Tensor], batch: Batch) -> list[Row]:
        """Each clip's features as a picture (high notes above), its seconds and label, and what the network says."""
        logits, features, frames = self._logits(model, batch)
        probability, prediction = logits.softmax(dim=-1).max(dim=-1)  # [m], [m]
        grey = ((features / SHOWN + 1) * 127.5).clamp(0, 255).byte().mT.flip(1)  # [m, mels, frames]
        pictures = grey[..., None].cpu().numpy()
        columns = {
            "seconds": batch["length"] / self.config.rate,
            "label": batch["label"],
            "prediction": prediction,
            "probability": probability,
        }
        rows = zip(pictures, frames.tolist(), *(column.tolist() for column in columns.values()))
        return [dict(zip(("picture", *columns), (picture[:, :count], *rest))) for picture, count, *rest in rows]

    def flops_per_sample(self) -> float:
        """Forward and backward of a clip of full length: six operations for each weight and step."""
        import torch

        config = self.config
        with torch.device("meta"):
            model = self.build_model()
        steps = -(-(config.longest // config.hop + 1) // config.stack)
        return (
            6.0 * steps * sum(w.numel() for name, w in model.named_parameters() if name.startswith("recurrent.weight"))
        )

    def _logits(self, model: Callable[..., Tensor], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """fp32 [m, classes], the features that they come from [m, frames, mels], and how many of these count [m]."""
        from pipeline.models import log_mel

        config = self.config
        if self._log_mel is None:
            self._log_mel = log_mel.LogMel(config.mels, config.rate, config.window, config.hop)
        features = self._log_mel(batch["samples"], batch["length"])
        frames = batch["length"] // config.hop + 1
        if "bands" in batch:
            features = log_mel.masked(features, batch["bands"], batch["frames"])
        inputs, lengths = log_mel.stacked(features, frames, config.stack)
        return model(features=inputs, lengths=lengths).float(), features, frames

    def _sound(self, sample: Sample) -> np.ndarray:
        """float32 [samples], at least one"""
        audio = sample.first(*SOUND_FIELDS)
        if audio.rate != self.config.rate:
            raise DataError(
                f"sample {sample.key} has {audio.rate} samples a second, and task.rate is {self.config.rate}; convert "
                "the sounds to one rate (`sox IN.wav -r RATE OUT.wav`) and pack them again, or set task.rate"
            )
        if not len(audio.samples):
            raise SampleError(f"sample {sample.key} is a sound without samples")
        return audio.samples[:, 0] if audio.samples.shape[1] == 1 else audio.samples.mean(axis=1)

    def _label(self, sample: Sample) -> np.ndarray:
        """int64 []"""
        label = sample["cls"]
        if not 0 <= label < self.config.classes:
            raise DataError(
                f"sample {sample.key} has label {label}; with task.classes {self.config.classes} labels go from 0 to "
                f"{self.config.classes - 1}: mend the label, or set task.classes to how many classes there are"
            )
        return np.array(label, dtype=np.int64)


def _draw_masks(count: int, widest: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [count, 2]: (first, how many), how many drawn evenly from 0 to `widest`, then where, of `size` places."""
    widths = rng.integers(0, widest + 1, size=count)
    return np.stack([rng.integers(0, size - widths + 1), widths], axis=1)
