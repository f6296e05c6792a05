"""Image augmentation: geometry on the uint8 array of one sample, colours and erasing on a whole batch of tensors.

Everything random is drawn from the generator given, which the loader keys by (seed, epoch, sample number), so an image
is augmented the same way whichever worker or thread prepares it. Crops, flips and resizing are done where they are
drawn; colours and erasing only draw their numbers there (`draw_colour`, `draw_erase`), which travel in the batch, and
are done to all images at once on the device (`recolour`, `erase`): on a CPU, too, five times as fast at 64 pixels and
1.3 times at 224.

Resizing and mirroring are torch's: its bilinear filter on bytes is a vectorised twin of Pillow's, up to five times as
fast, runs on the calling thread and lets others run beside it. What it gives up: anything but square targets, hue, and
a random order of the colour changes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from pipeline.errors import DataError
from pipeline.sections import Strict

if TYPE_CHECKING:
    from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # of red, green, blue (ITU-R BT.601): what "grey" means to image tools
Strength = Annotated[float, Field(ge=0)]


class Colour(Strict):
    """How far colours are changed in training; each factor is drawn from max(0, 1 - strength) to 1 + strength."""

    brightness: Strength = Field(default=0.0, description="0.4: factors from 0.6 to 1.4")
    contrast: Strength = Field(default=0.0, description="towards or away from the mean grey of the image")
    saturation: Strength = Field(default=0.0, description="towards or away from grey; needs 3 channels")


def in_channels(image: np.ndarray, channels: int, key: str) -> np.ndarray:
    """[H, W, C] -> [H, W, channels]: grey to colour by repeating, colour to grey by luma. DataError names the `key`."""
    given = image.shape[2]
    if given == channels:
        return image
    if given == 1:
        return np.repeat(image, channels, axis=2)
    if given == 3:
        return np.rint(image @ np.array(LUMA, dtype=np.float32)).astype(np.uint8)[:, :, None]
    raise DataError(
        f"sample {key} has {given} channels; an image with transparency has no one colour: flatten it and pack again"
    )


def random_crop(image: np.ndarray, padding: int, rng: np.random.Generator) -> np.ndarray:
    """Move the image by up to `padding` pixels each way, filling with zeros: uint8 [H, W, C] -> [H, W, C]."""
    height, width = image.shape[:2]
    down, right = rng.integers(0, 2 * padding + 1, size=2).tolist()
    down, right = down - padding, right - padding  # where the top left pixel comes from
    moved = np.zeros_like(image)
    from_rows, from_columns = (slice(max(by, 0), size + min(by, 0)) for by, size in ((down, height), (right, width)))
    to_rows, to_columns = (slice(max(-by, 0), size - max(by, 0)) for by, size in ((down, height), (right, width)))
    moved[to_rows, to_columns] = image[from_rows, from_columns]
    return moved


def random_resized_crop(
    image: np.ndarray,
    size: int,
    rng: np.random.Generator,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Cut out a random share of the area, at a random place and aspect, and resize it to [size, size, C].

    `area`: least and largest share of the image; `aspect`: width / height, drawn evenly in its logarithm (Szegedy et
    al. 2015). After ten draws that do not fit, the largest centred piece of an allowed aspect is taken.
    """
    height, width = image.shape[:2]
    box = _draw_box(height, width, area, aspect, rng)
    if box is None:
        return _resized(
            _centre(image, min(height, round(width / aspect[0])), min(width, round(height * aspect[1]))), size
        )
    top, left, box_height, box_width = box
    return _resized(image[top : top + box_height, left : left + box_width], size)


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror left and right, for half of the images: [H, W, C] -> [H, W, C]."""
    return _tensor(image).flip(1).numpy() if rng.random() < 0.5 else image  # numpy takes twenty times as long


def fit(image: np.ndarray, size: int, share: float = 1.0) -> np.ndarray:
    """A centred square, resized: [H, W, C] -> [size, size, C]. Its side is `share` of the largest one's.

    A square of that size is returned as it is. 0.875 is the usual "resize to 256, cut out 224", in one go.
    """
    height, width = image.shape[:2]
    side = max(1, round(share * min(height, width)))
    if height == width == side == size:
        return image
    return _resized(_centre(image, side, side), size)


def draw_colour(brightness: float, contrast: float, saturation: float, rng: np.random.Generator) -> np.ndarray:
    """Factors for `recolour`, float32[3], each drawn evenly from max(0, 1 - strength) to 1 + strength."""
    strengths = np.array([brightness, contrast, saturation])
    return rng.uniform(np.maximum(1 - strengths, 0), 1 + strengths).astype(np.float32)


def recolour(image: Tensor, factors: Tensor) -> Tensor:
    """Change brightness, then contrast, then saturation: uint8 [m, H, W, 1 or 3], [m, 3] -> float32 in 0..255.

    As torchvision's ColorJitter defines them: mixed with black, with the image's mean grey, with the grey of each
    pixel, and cut to the range after each. That also draws the order of the three; here it is fixed.
    """
    brightness, contrast, saturation = (factor.view(-1, 1, 1, 1) for factor in factors.unbind(1))
    planes = image.permute(0, 3, 1, 2).contiguous().float()  # a third of the time that interleaved colours take
    planes = planes.mul_(brightness).clamp_(0, 255)
    mean = _grey(planes.mean(dim=(2, 3), keepdim=True))  # [m, 1, 1, 1]
    planes = planes.mul_(contrast).add_((1 - contrast) * mean).clamp_(0, 255)
    if planes.shape[1] == 3:
        grey = _grey(planes)  # before they change in place
        planes = planes.mul_(saturation).add_((1 - saturation) * grey).clamp_(0, 255)
    return planes.permute(0, 2, 3, 1)


def _grey(planes: Tensor) -> Tensor:
    """[m, 1 or 3, ...] -> [m, 1, ...]"""
    if planes.shape[1] == 1:
        return planes
    red, green, blue = planes.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def draw_erase(
    probability: float,
    size: int,
    rng: np.random.Generator,
    *,
    area: tuple[float, float] = (0.02, 0.4),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> np.ndarray:
    """A box for `erase` in an image [size, size, C]: top, left, height, width, int64[4]; zeros: nothing is erased.

    Random erasing with the ranges of its paper (Zhong et al. 2020); the aspect is drawn evenly in its logarithm, and
    after ten draws that do not fit nothing is erased.
    """
    if rng.random() >= probability:
        return np.zeros(4, dtype=np.int64)
    return np.array(_draw_box(size, size, area, aspect, rng) or (0, 0, 0, 0), dtype=np.int64)


def erase(image: Tensor, boxes: Tensor) -> Tensor:
    """Set a box of each image to zero, the mean when they are normalised: [m, H, W, C], int64[m, 4] -> [m, H, W, C]."""
    import torch

    top, left, height, width = boxes[:, :, None].unbind(1)  # [m, 1] each
    row, column = (torch.arange(length, device=image.device) for length in image.shape[1:3])
    rows, columns = (row >= top) & (row < top + height), (column >= left) & (column < left + width)  # [m, H], [m, W]
    return image.masked_fill((rows[:, :, None] & columns[:, None, :])[..., None], 0)


def _draw_box(
    height: int, width: int, area: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """Top, left, height, width of a random share of the area at a random place; None after ten that do not fit."""
    for _ in range(10):
        share, slant, across, down = rng.random(4).tolist()  # at once: a call costs more than a number
        pixels = height * width * (area[0] + share * (area[1] - area[0]))
        ratio = aspect[0] * (aspect[1] / aspect[0]) ** slant
        box_width, box_height = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            return int(down * (height - box_height + 1)), int(across * (width - box_width + 1)), box_height, box_width
    return None


def _centre(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle [height, width, C] of an image."""
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    """[H, W, C] -> [size, size, C] with a bilinear filter as wide as the image is shrunk, so that nothing aliases."""
    from torch.nn import functional

    pixels = _tensor(image)[None].permute(0, 3, 1, 2)  # channels stay last in memory, which is the fast way
    return functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True).numpy()[0].transpose(1, 2, 0)


def _tensor(image: np.ndarray) -> Tensor:
    """The array as a tensor, without a copy where torch can hold it."""
    import torch

    return torch.from_numpy(image if image.flags.writeable else image.copy())
