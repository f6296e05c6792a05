"""One image, one class: convnets and vision transformers of transformers, from options or a pretrained folder, and the
plain convnet of He et al. 2015.

    {key}.jpg|png|webp, {key}.cls --prepare--> uint8 pixels --(device)--> normalised --mixed--> logits --> cross-entropy

Pixels travel as bytes and become numbers on the device, a quarter of the traffic. Geometry (crop, flip, RandAugment) is
drawn and done per sample where the image is decoded. Colours and erasing are drawn there too, by sample, but done on
the device to the whole micro batch. Mixup and cutmix are drawn per micro batch, from torch's generator, so partners
never depend on the number of workers.

Batch: "image" uint8 [m, size, size, channels], "label" int64 [m]; in training, when they are asked for, "colour"
float32 [m, 3] (factors of brightness, contrast, saturation) and "erase" int64 [m, 4] (top, left, height, width in
pixels; height 0: nothing).
What it gives up: several labels per image, images that are not square.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from pipeline.data import augment, mixup
from pipeline.data.augment import Colour
from pipeline.data.decode import jpeg_into
from pipeline.data.randaugment import RandAugment, randaugment
from pipeline.errors import ConfigError, DataError
from pipeline.sections import Strict
from pipeline.tasks import Batch, Row, Sums

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

    from pipeline.data.reader import Sample
    from pipeline.data.samples import Samples
    from pipeline.models.pretrained import Weights

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
HEAD = "image classification"


class Convnet(Strict):
    """The plain convnet of He et al. 2015 (models/convnet.py); `norm` says which norm its is."""

    depth: int = Field(default=20, description="layers with weights, 6n + 2: 8, 14, 20, 32, 44, 56, 110 ...")
    width: int = Field(default=16, ge=1, description="channels of the first stage; doubled in each of the two others")
    residual: bool = Field(default=True, description="adds each block's input to its output")
    normalised: bool = Field(default=True, description="a norm behind each convolution")

    @field_validator("depth")
    @classmethod
    def _whole_blocks(cls, depth: int) -> int:
        if depth < 8 or depth % 6 != 2:
            below = max(8, depth - (depth - 2) % 6)
            raise ValueError(f"{depth} is not 6n + 2 (three stages of n blocks of two); set {below} or {below + 6}")
        return depth


class Config(Strict):
    """The `task` section of image classification."""

    name: str = "image_classification"
    classes: int = Field(ge=2, description="labels are 0 to classes - 1")
    channels: Literal[1, 3] = Field(
        default=3, description="of the network's input; images are turned to grey or colour"
    )
    image_size: int = Field(ge=1, description="pixels, height and width; other images are cut square and resized")
    architecture: str | None = Field(default=None, description="transformers model type: resnet, convnextv2, vit ...")
    model: dict[str, Any] = Field(default={}, description="options of the architecture, as in its transformers config")
    convnet: Convnet | None = Field(default=None, description="a plain or residual convnet, instead of architecture")
    pretrained: Path | None = Field(default=None, description="folder of a pretrained network, instead of architecture")
    norm: Literal["batch", "group"] = Field(default="batch", description="group: replaces every batch norm")
    mean: tuple[float, ...] = Field(
        default=(0.5,), description="subtracted from pixels in 0..1: one, or one per channel"
    )
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(0.5,), description="pixels are divided by it then")
    center_crop: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="share of the side of the largest square that is kept where none is cut out at random"
    )
    crop: int = Field(default=0, ge=0, description="training: pixels the image is moved by, at most, each way")
    random_resized_crop: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="training: least share of the area that is cut out and resized"
    )
    flip: bool = Field(default=False, description="training: mirrors half of the images")
    randaugment: RandAugment | None = Field(default=None, description="training: random operations on each image")
    colour: Colour = Field(default=Colour(), description="training: strengths of changes to the colours")
    erase: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="training: share of images in which a random box is replaced by the mean"
    )
    mixup: float = Field(default=0.0, ge=0, description="training: alpha of the Beta distribution; 0: no mixup")
    cutmix: float = Field(default=0.0, ge=0, description="training: the same; with mixup, each for half of the batches")
    mix_probability: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="training: share of micro batches that mixup or cutmix changes"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="training: share for all classes"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if [self.architecture, self.convnet, self.pretrained].count(None) != 2:
            raise ValueError(
                "needs one of `architecture: ...`, `convnet: {...}` (fresh weights) and `pretrained: FOLDER`, not two"
            )
        if self.model and not self.architecture:
            raise ValueError(
                "`model` belongs to `architecture`; a pretrained folder has its options in its config.json, and "
                "`convnet` its own below it"
            )
        if self.mix_probability < 1 and not (self.mixup or self.cutmix):
            raise ValueError("`mix_probability` is of `mixup` and `cutmix`, and neither is set; set one, or remove it")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(
                    f"`{name}` has {len(values)} values; give one, or one for each of {self.channels} channels"
                )
        if self.colour.saturation and self.channels == 1:
            raise ValueError("`colour.saturation` is of colours, and `channels` is 1; remove it")
        return self


class Task:
    """See pipeline/tasks/__init__.py for what each method promises."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._recolours = any(config.colour.model_dump().values())
        moves = config.crop or config.random_resized_crop or config.flip or config.randaugment
        self.augments = bool(moves or self._recolours or config.erase)
        self.weights: Weights | None = None
        self._flops: float | None = None
        self._mean_and_std: dict[Any, Any] = {}  # device -> two tensors, so that they cross to it once

    def build_model(self, kept: Mapping[str, Any] | None = None) -> nn.Module:
        """pixel_values [m, channels, size, size] -> `.logits` [m, classes]. Raises ConfigError."""
        from pipeline.models import architectures, norm

        if self.config.pretrained is None:
            model = self._fresh()
        else:
            fields = self._network(kept)
            new_head = fields.num_labels != self.config.classes or not architectures.has_head(HEAD, fields)
            if new_head:
                fields.num_labels = self.config.classes
            if kept is not None:
                model = architectures.empty(HEAD, fields)
            else:
                model, self.weights = architectures.load(HEAD, self.config.pretrained, fields, new_head)
        if self.config.norm == "group" and not norm.group_norm_for_batch_norm(model):
            raise ConfigError(f"task.norm: {type(model).__name__} has no batch norm to replace; remove the key")
        return model

    def write_settings(self, folder: Path) -> None:
        """preprocessor_config.json: images cut, resized and normalised as here, for transformers' image processor."""
        from pipeline.models import exported

        config = self.config
        mean, std = (list(given) * (config.channels // len(given)) for given in (config.mean, config.std))
        exported.write_image_processor(folder, config.image_size, config.center_crop, mean, std)

    def prepare(self, sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        """{"image": uint8 [size, size, channels], "label": int64 []}, with a generator "colour" and "erase" as asked.

        Raises DataError naming the sample.
        """
        config = self.config
        image = augment.in_channels(sample.first(*IMAGE_FIELDS), config.channels, sample.key)
        if rng is not None and config.random_resized_crop:
            image = augment.random_resized_crop(image, config.image_size, rng, area=(config.random_resized_crop, 1.0))
        else:
            image = augment.fit(image, config.image_size, config.center_crop)
        if rng is not None and config.crop:
            image = augment.random_crop(image, config.crop, rng)
        if rng is not None and config.flip:
            image = augment.random_flip(image, rng)
        if rng is not None and config.randaugment:
            image = randaugment(image, **config.randaugment.model_dump(), rng=rng)
        prepared = {"image": np.ascontiguousarray(image), "label": self._label(sample)}
        if rng is not None and self._recolours:
            prepared["colour"] = augment.draw_colour(**config.colour.model_dump(), rng=rng)
        if rng is not None and config.erase:
            prepared["erase"] = augment.draw_erase(config.erase, config.image_size, rng)
        return prepared

    def gather(self, samples: Samples) -> dict[str, np.ndarray] | None:
        """What `prepare` gives without a generator, stacked, when every image is a JPEG of just the right size.

        None when anything is otherwise, a damaged image or a label out of range among it: `prepare` then says what.
        """
        pictures = samples.raw("jpg") if self.config.center_crop == 1 else None
        classes = samples.values("cls")
        if pictures is None or classes is None or classes.min() < 0 or classes.max() >= self.config.classes:
            return None
        size, channels = self.config.image_size, self.config.channels
        image = samples.empty("image", (len(samples), size, size, channels), np.uint8)
        if not all(map(jpeg_into, pictures, image)):
            return None
        label = samples.empty("label", (len(samples),), np.int64)
        label[:] = classes
        return {"image": image, "label": label}

    def weight(self, batch: Batch) -> float:
        """One term per image."""
        return float(len(batch["label"]))

    def loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Sums]:
        """Cross-entropy in nats with label smoothing; a mixed image (mixup.py) is right by its shares."""
        config, image, label = self.config, self._normalised(model, batch), batch["label"]  # [m, C, H, W], [m]
        chances = {"mixup": config.mixup, "cutmix": config.cutmix, "probability": config.mix_probability}
        mix = mixup.draw(len(label), *image.shape[2:], **chances)
        logits = model(pixel_values=mixup.apply(image, mix) if mix else image).logits  # [m, classes]
        loss, correct = mixup.cross_entropy(logits, label, config.label_smoothing, mix)
        return loss, {"loss": (loss.detach(), len(label)), "accuracy": (correct, len(label))}

    def score(self, model: Callable[..., Any], batch: Batch) -> Sums:
        """Plain cross-entropy in nats and share of images whose likeliest class is theirs."""
        label = batch["label"]
        logits = model(pixel_values=self._normalised(model, batch)).logits
        loss, correct = mixup.cross_entropy(logits, label)
        return {"loss": (loss, len(label)), "accuracy": (correct, len(label))}

    def show(self, model: Callable[..., Any], batch: Batch) -> list[Row]:
        """Each picture as the network gets it, its label, the likeliest class and that one's probability."""
        logits = model(pixel_values=self._normalised(model, batch)).logits
        probability, prediction = logits.float().softmax(dim=-1).max(dim=-1)  # [m], [m]
        columns = {"label": batch["label"], "prediction": prediction, "probability": probability}
        rows = zip(batch["image"].cpu().numpy(), *(column.tolist() for column in columns.values()))
        return [dict(zip(("picture", *columns), row)) for row in rows]

    def flops_per_sample(self) -> float:
        """Forward and backward of one image, counted once from the graph."""
        import torch

        from pipeline.models import flops

        if self._flops is None:
            # two images: batch norm needs company
            shape = (2, self.config.channels, self.config.image_size, self.config.image_size)
            self._flops = flops.count(self._fresh, lambda: {"pixel_values": torch.zeros(shape)}) / 2
        return self._flops

    def _fresh(self) -> nn.Module:
        """The network with weights of its own; a pretrained folder's is one of the same sizes."""
        from pipeline.models import architectures
        from pipeline.models.convnet import ConvNet

        config = self.config
        if config.convnet is not None:
            return ConvNet(config.classes, config.channels, **config.convnet.model_dump())
        return architectures.build(HEAD, self._network())

    def _network(self, kept: Mapping[str, Any] | None = None) -> PreTrainedConfig:
        """Its configuration in transformers: from the options, the pretrained folder, or what a checkpoint kept."""
        from pipeline.models import architectures

        config = self.config
        if config.pretrained is None:
            assert config.architecture is not None  # checked by Config
            follows = {"num_labels": config.classes, "num_channels": config.channels, "image_size": config.image_size}
            return architectures.configure(HEAD, config.architecture, config.model, follows=follows)
        fields = architectures.kept_config(kept) if kept else architectures.pretrained_config(config.pretrained)
        known = getattr(fields, "num_channels", config.channels)
        if known != config.channels:
            raise ConfigError(
                f"task.channels: {config.pretrained} takes {known} channels, not {config.channels}; set {known}"
            )
        return fields

    def _normalised(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """[m, C, H, W] in the network's type, recoloured and erased as the batch says; channels last in memory."""
        import torch

        image = batch["image"]  # uint8 [m, H, W, C]
        if image.device not in self._mean_and_std:
            pair = (torch.tensor(values, device=image.device) * 255 for values in (self.config.mean, self.config.std))
            self._mean_and_std[image.device] = tuple(pair)  # [1] or [C] each
        mean, std = self._mean_and_std[image.device]
        image = augment.recolour(image, batch["colour"]) if "colour" in batch else image.float()
        image = (image - mean) / std
        if "erase" in batch:
            image = augment.erase(image, batch["erase"])
        dtype = next(model.parameters()).dtype  # type: ignore[attr-defined]
        return image.permute(0, 3, 1, 2).to(dtype, memory_format=torch.channels_last)

    def _label(self, sample: Sample) -> np.ndarray:
        """int64 []"""
        label = sample["cls"]
        if not 0 <= label < self.config.classes:
            raise DataError(
                f"sample {sample.key} has label {label}; with task.classes {self.config.classes} labels go from 0 to "
                f"{self.config.classes - 1}: mend the label, or set task.classes to how many classes there are"
            )
        return np.array(label, dtype=np.int64)
