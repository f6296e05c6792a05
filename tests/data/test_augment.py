"""Augmented images keep size and type, follow from the generator given and nothing else, and stay in bounds."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.augment import fit, random_crop, random_flip, random_resized_crop


def coordinates(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: channel 0 grows from left to right, channel 1 from top to bottom, both 0 to 255."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[:, :, 0] = np.linspace(0, 255, width)[None, :]
    image[:, :, 1] = np.linspace(0, 255, height)[:, None]
    return image


def test_random_crop_reaches_every_place_and_fills_with_zeros() -> None:
    image = np.zeros((9, 9, 1), dtype=np.uint8)
    image[4, 4] = 255
    rng = np.random.default_rng(0)
    places = set()
    for _ in range(400):
        moved = random_crop(image, 2, rng)
        assert moved.shape == image.shape and moved.dtype == np.uint8 and moved.sum() == 255
        places.add(tuple(np.argwhere(moved[:, :, 0])[0]))
    assert places == {(y, x) for y in range(2, 7) for x in range(2, 7)}


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (33, 33)])
def test_random_resized_crop_keeps_area_and_aspect_within_bounds(shape: tuple[int, int]) -> None:
    image, rng = coordinates(*shape), np.random.default_rng(1)
    areas, aspects = [], []
    for _ in range(200):
        cut = random_resized_crop(image, 64, rng, area=(0.25, 0.5)).astype(float)
        assert cut.shape == (64, 64, 3)
        width, height = np.ptp(cut[:, :, 0]) / 255, np.ptp(cut[:, :, 1]) / 255  # shares of the image's own
        areas.append(width * height)
        aspects.append(width * shape[1] / (height * shape[0]))
    # the bilinear filter and whole pixels move the edges a little
    assert 0.2 < min(areas) < 0.3 and 0.42 < max(areas) < 0.55
    assert 0.65 < min(aspects) < 0.85 and 1.2 < max(aspects) < 1.5


def test_random_resized_crop_of_an_image_too_long_for_any_draw_takes_its_middle() -> None:
    image = coordinates(4, 200)
    cut = random_resized_crop(image, 8, np.random.default_rng(2), area=(0.9, 1.0)).astype(float)
    assert abs(cut[:, :, 0].mean() - 127.5) < 3 and np.ptp(cut[:, :, 0]) < 10
    assert np.ptp(cut[:, :, 1]) > 150


def test_flip_mirrors_about_half_of_the_images() -> None:
    image, rng = coordinates(5, 6), np.random.default_rng(3)
    flipped = 0
    for _ in range(400):
        result = random_flip(image, rng)
        if np.array_equal(result, image[:, ::-1]):
            flipped += 1
        else:
            assert np.array_equal(result, image)
    assert 150 < flipped < 250


def test_equal_generators_give_equal_images() -> None:
    image = np.random.default_rng(4).integers(0, 256, (20, 30, 3), dtype=np.uint8)

    def augmented(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return random_flip(random_crop(random_resized_crop(image, 16, rng), 3, rng), rng)

    assert np.array_equal(augmented(5), augmented(5))
    assert not np.array_equal(augmented(5), augmented(6))


@pytest.mark.parametrize("channels", [1, 3])
def test_fit_takes_the_centred_square_and_leaves_a_fitting_image_alone(channels: int) -> None:
    image = np.zeros((20, 40, channels), dtype=np.uint8)
    image[:, 10:30] = 200  # the centred square
    assert np.array_equal(fit(image, 10), np.full((10, 10, channels), 200, dtype=np.uint8))
    assert np.array_equal(fit(image.transpose(1, 0, 2), 10), np.full((10, 10, channels), 200, dtype=np.uint8))
    square = np.random.default_rng(7).integers(0, 256, (12, 12, channels), dtype=np.uint8)
    assert fit(square, 12) is square
