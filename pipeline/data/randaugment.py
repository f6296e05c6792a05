"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719): a few operations at one strength, drawn anew for every image.

    uint8 [H, W, C] --(operations drawn from the image's own generator)--> uint8 [H, W, C]

The fourteen operations and their ranges are the paper's, at strengths 0 to 10; translations are in shares of the side,
up to 0.45 of it. Contrast, brightness, colour and sharpness go up or down, movements left or right, by a coin. What
it gives up: filters of movements finer than bilinear. New pixels are black.

Where an operation depends on a pixel's value alone it is a table of 256 entries, the fastest way for bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import numpy as np
from pydantic import Field

from pipeline.data.augment import LUMA
from pipeline.sections import Count, Strict

if TYPE_CHECKING:
    from numpy.random import Generator

Operation = Literal[
    "identity", "autocontrast", "equalize", "posterize", "solarize", "brightness", "contrast", "colour", "sharpness",
    "rotate", "shear_x", "shear_y", "translate_x", "translate_y",
]  # fmt: skip
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
STRONGEST = 10.0
DEGREES, SHEAR, TRANSLATION, FACTOR, BITS = 30.0, 0.3, 0.45, 0.9, 4  # at that strength
SIGNED = frozenset(OPERATIONS) - {"identity", "autocontrast", "equalize", "posterize", "solarize"}


class RandAugment(Strict):
    """How many operations, how strong, among which."""

    count: Count = Field(default=2, description="operations on each image, one after the other")
    magnitude: float = Field(default=9.0, ge=0, le=STRONGEST, description="0: nothing moves; 10: rotated by 30 degrees")
    among: Annotated[tuple[Operation, ...], Field(min_length=1)] = Field(
        default=OPERATIONS, description="operations that are drawn; one that is named twice comes twice as often"
    )


def randaugment(
    image: np.ndarray, count: int, magnitude: float, rng: Generator, among: Sequence[Operation] = OPERATIONS
) -> np.ndarray:
    """`count` operations one after the other, each any `among` them, with strength `magnitude` in 0..10."""
    for _ in range(count):
        name = among[int(rng.integers(len(among)))]
        strength = magnitude / STRONGEST
        if name in SIGNED and rng.random() < 0.5:
            strength = -strength
        image = operate(image, name, strength)
    return image


def operate(image: np.ndarray, name: Operation, strength: float) -> np.ndarray:
    """One operation; `strength` is a share of the strongest, negative for the other direction."""
    height, width = image.shape[:2]
    match name:
        case "autocontrast":
            return _by_channel(image, _stretched)
        case "equalize":
            return _by_channel(image, _equal)
        case "posterize":
            return image & np.uint8(0xFF << round(BITS * strength) & 0xFF)
        case "solarize":
            bytes_ = np.arange(256)
            return np.where(bytes_ < 256 - round(256 * strength), bytes_, 255 - bytes_).astype(np.uint8)[image]
        case "brightness":
            return _blend_table(0.0, 1 + FACTOR * strength)[image]
        case "contrast":
            return _blend_table(math.floor(_grey(image).mean() + 0.5), 1 + FACTOR * strength)[image]
        case "colour":
            return image if image.shape[2] == 1 else _blend(_grey(image), image, 1 + FACTOR * strength)
        case "sharpness":
            return _blend(_smooth(image), image, 1 + FACTOR * strength)
        case "rotate":
            angle = math.radians(DEGREES * strength)
            cos, sin = math.cos(angle), math.sin(angle)
            return affine(image, (cos, -sin, 0.0, sin, cos, 0.0))
        case "shear_x":
            return affine(image, (1.0, SHEAR * strength, 0.0, 0.0, 1.0, 0.0))
        case "shear_y":
            return affine(image, (1.0, 0.0, 0.0, SHEAR * strength, 1.0, 0.0))
        case "translate_x":
            return affine(image, (1.0, 0.0, TRANSLATION * strength * width, 0.0, 1.0, 0.0))
        case "translate_y":
            return affine(image, (1.0, 0.0, 0.0, 0.0, 1.0, TRANSLATION * strength * height))
    return image


def affine(image: np.ndarray, matrix: tuple[float, float, float, float, float, float]) -> np.ndarray:
    """Pixel (x, y) is taken from (a x + b y + c, d x + e y + f), both from the centre; bilinear, black outside."""
    height, width = image.shape[:2]
    a, b, c, d, e, f = matrix
    x, y = np.arange(width) - (width - 1) / 2, (np.arange(height) - (height - 1) / 2)[:, None]
    from_x = (a * x + b * y + c + (width - 1) / 2).astype(np.float32)  # [H, W]
    from_y = (d * x + e * y + f + (height - 1) / 2).astype(np.float32)
    left, top = np.floor(from_x), np.floor(from_y)
    right_share, bottom_share = (from_x - left)[:, :, None], (from_y - top)[:, :, None]
    # a frame of black around the image, in which all that comes from outside ends
    framed = np.zeros((height + 2, width + 2, image.shape[2]), np.float32)
    framed[1:-1, 1:-1] = image
    columns = [np.clip(left + side, 0, width + 1).astype(np.intp) for side in (1, 2)]
    rows = [np.clip(top + side, 0, height + 1).astype(np.intp) for side in (1, 2)]
    upper = framed[rows[0], columns[0]] * (1 - right_share) + framed[rows[0], columns[1]] * right_share
    lower = framed[rows[1], columns[0]] * (1 - right_share) + framed[rows[1], columns[1]] * right_share
    return np.floor(upper * (1 - bottom_share) + lower * bottom_share + 0.5).astype(np.uint8)


def _by_channel(image: np.ndarray, table_of: Callable[[np.ndarray], np.ndarray | None]) -> np.ndarray:
    """Each channel through a table that is made from its histogram, int64 [256]; None: it stays."""
    changed = image.copy()
    for channel in range(image.shape[2]):
        table = table_of(np.bincount(image[:, :, channel].ravel(), minlength=256))
        if table is not None:
            changed[:, :, channel] = table[image[:, :, channel]]
    return changed


def _stretched(histogram: np.ndarray) -> np.ndarray | None:
    """The darkest value becomes 0, the brightest 255."""
    present = np.flatnonzero(histogram)
    low, high = int(present[0]), int(present[-1])
    if low == high:
        return None
    scale = 255.0 / (high - low)
    return np.clip((np.arange(256) * scale - low * scale).astype(np.int64), 0, 255).astype(np.uint8)


def _equal(histogram: np.ndarray) -> np.ndarray | None:
    """About as many pixels of each value."""
    present = histogram[histogram > 0]
    step = int(present[:-1].sum()) // 255
    if len(present) < 2 or not step:
        return None
    before = np.cumsum(histogram) - histogram  # pixels that are darker
    return np.clip((step // 2 + before) // step, 0, 255).astype(np.uint8)


def _grey(image: np.ndarray) -> np.ndarray:
    """[H, W, C] -> [H, W, 1], whole numbers."""
    if image.shape[2] == 1:
        return image
    return np.floor(image @ np.array(LUMA) + 0.5)[:, :, None]


def _smooth(image: np.ndarray) -> np.ndarray:
    """Each pixel mixed with its eight neighbours, 5 to 1; the outermost stay."""
    height, width = image.shape[:2]
    if height < 3 or width < 3:
        return image
    values = image.astype(np.int32)
    sums = 4 * values[1:-1, 1:-1]
    for down in range(3):
        for right in range(3):
            sums += values[down : down + height - 2, right : right + width - 2]
    smooth = image.copy()
    smooth[1:-1, 1:-1] = np.floor(sums / 13 + 0.5)
    return smooth


def _blend(without: np.ndarray | float, image: np.ndarray, factor: float) -> np.ndarray:
    """From `without` (factor 0) to the image (1) and beyond."""
    start = np.asarray(without, dtype=np.float32)
    return np.clip(start + np.float32(factor) * (image - start), 0, 255).astype(np.uint8)


def _blend_table(without: float, factor: float) -> np.ndarray:
    return _blend(without, np.arange(256, dtype=np.float32), factor)
