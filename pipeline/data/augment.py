"""Image augmentation on uint8 arrays, before a batch exists: crops, flips, resizing.

Every function is pure: what is random is drawn from the generator given, which the loader keys by (seed, epoch,
sample number), so an image is augmented the same way whichever worker or thread prepares it. Geometry only; colours
and mixup are arithmetic, which the device does better. What it gives up: anything but square targets.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image


def random_crop(image: np.ndarray, padding: int, rng: np.random.Generator) -> np.ndarray:
    """Move the image by up to `padding` pixels each way, filling with zeros: uint8 [H, W, C] -> [H, W, C]."""
    height, width = image.shape[:2]
    top, left = rng.integers(0, 2 * padding + 1, size=2)
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    return padded[top : top + height, left : left + width]


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
    for _ in range(10):
        pixels = height * width * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        cut_width, cut_height = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < cut_width <= width and 0 < cut_height <= height:
            left = int(rng.integers(0, width - cut_width + 1))
            top = int(rng.integers(0, height - cut_height + 1))
            return _resized(image[top : top + cut_height, left : left + cut_width], size)
    cut_width, cut_height = min(width, round(height * aspect[1])), min(height, round(width / aspect[0]))
    return _resized(_centre(image, cut_height, cut_width), size)


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror left and right, for half of the images: [H, W, C] -> [H, W, C]."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """The largest centred square, resized: [H, W, C] -> [size, size, C]. An image of that size is returned as it is."""
    height, width = image.shape[:2]
    if height == width == size:
        return image
    side = min(height, width)
    return _resized(_centre(image, side, side), size)


def _centre(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle [height, width, C] of an image."""
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    """[H, W, C] -> [size, size, C] with Pillow's antialiased bilinear filter."""
    grey = image.shape[2] == 1
    picture = Image.fromarray(np.ascontiguousarray(image[:, :, 0] if grey else image))
    pixels = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
    return pixels[:, :, None] if grey else pixels
