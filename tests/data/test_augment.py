"""Augmented images keep size and type, follow from the generator given and nothing else, and stay in bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from pipeline.data.augment import (
    LUMA,
    draw_colour,
    draw_erase,
    erase,
    fit,
    random_crop,
    random_flip,
    random_resized_crop,
    recolour,
)


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

    def drawn(seed: int) -> list[float]:
        rng = np.random.default_rng(seed)
        return [*draw_colour(0.1, 0.2, 0.3, rng), *draw_erase(1.0, 32, rng)]

    assert np.array_equal(augmented(5), augmented(5)) and drawn(5) == drawn(5)
    assert not np.array_equal(augmented(5), augmented(6)) and drawn(5) != drawn(6)


@pytest.mark.parametrize("channels", [1, 3])
def test_fit_takes_the_centred_square_and_leaves_a_fitting_image_alone(channels: int) -> None:
    image = np.zeros((20, 40, channels), dtype=np.uint8)
    image[:, 10:30] = 200  # the centred square
    assert np.array_equal(fit(image, 10), np.full((10, 10, channels), 200, dtype=np.uint8))
    assert np.array_equal(fit(image.transpose(1, 0, 2), 10), np.full((10, 10, channels), 200, dtype=np.uint8))
    square = np.random.default_rng(7).integers(0, 256, (12, 12, channels), dtype=np.uint8)
    assert fit(square, 12) is square


def test_fit_keeps_a_share_of_the_square() -> None:
    image = np.random.default_rng(1).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    assert np.array_equal(fit(image, 24, 0.8), image[8:32, 3:27])  # 24 of 30 pixels, in the middle
    by_pillow = Image.fromarray(image[8:32, 3:27]).resize((12, 12), Image.Resampling.BILINEAR)
    assert np.abs(fit(image, 12, 0.8).astype(int) - np.asarray(by_pillow)).max() <= 1
    square = image[:30]
    assert fit(square, 30) is square and not np.array_equal(fit(square, 30, 0.5), square)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("side", "size"), [(100, 31), (90, 90 * 2), (64, 63), (7, 40)])
def test_resizing_is_that_of_pillow(channels: int, side: int, size: int) -> None:
    """Within one step of 255, whether it shrinks (antialiased) or enlarges; on noise, where aliasing would show."""
    image = np.random.default_rng(8).integers(0, 256, (side, side, channels), dtype=np.uint8)
    image.flags.writeable = False  # as a decoder may give it
    picture = Image.fromarray(image[:, :, 0] if channels == 1 else image)
    expected = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR)).reshape(size, size, channels)
    assert np.abs(fit(image, size).astype(int) - expected).max() <= 1


def test_recolouring_is_that_of_pillow() -> None:
    """Pillow rounds down to bytes after each of the three, so a few steps of 255 lie between."""
    blocks = np.random.default_rng(9).integers(0, 256, (4, 5, 5, 3), dtype=np.uint8)
    images = blocks.repeat(6, axis=1).repeat(6, axis=2)
    factors = np.array([[1, 1, 1], [0.5, 1, 1], [1.4, 0.3, 1.9], [0.7, 1.8, 0]], dtype=np.float32)
    recoloured = recolour(torch.from_numpy(images), torch.from_numpy(factors)).numpy()
    assert recoloured.dtype == np.float32 and np.array_equal(recoloured[0], images[0])
    for image, (brightness, contrast, saturation), found in zip(images, factors.tolist(), recoloured):
        picture = ImageEnhance.Brightness(Image.fromarray(image)).enhance(brightness)
        picture = ImageEnhance.Color(ImageEnhance.Contrast(picture).enhance(contrast)).enhance(saturation)
        assert np.abs(found - np.asarray(picture)).max() < 4


@pytest.mark.parametrize("channels", [1, 3])
def test_recolouring_is_its_formula_image_by_image(channels: int) -> None:
    rng = np.random.default_rng(10)
    images = rng.integers(0, 256, (6, 9, 7, channels), dtype=np.uint8)
    factors = rng.uniform(0, 2, (6, 3)).astype(np.float32)
    recoloured = recolour(torch.from_numpy(images), torch.from_numpy(factors))
    for row, (image, (brightness, contrast, saturation)) in enumerate(zip(images.astype(float), factors.tolist())):
        luma = np.array(LUMA) if channels == 3 else np.ones(1)
        image = np.clip(brightness * image, 0, 255)
        image = np.clip(contrast * image + (1 - contrast) * (image @ luma).mean(), 0, 255)
        image = np.clip(saturation * image + (1 - saturation) * (image @ luma)[:, :, None], 0, 255)
        assert np.abs(recoloured[row].numpy() - image).max() < 1e-3
        alone = recolour(torch.from_numpy(images[row : row + 1]), torch.from_numpy(factors[row : row + 1]))
        assert torch.equal(alone[0], recoloured[row])  # whatever else is in the batch


def test_colour_factors_lie_around_one() -> None:
    rng = np.random.default_rng(11)
    drawn = np.array([draw_colour(0.4, 3.0, 0.0, rng) for _ in range(500)])
    assert drawn.dtype == np.float32 and (drawn[:, 2] == 1).all()
    for factors, low, high in ((drawn[:, 0], 0.6, 1.4), (drawn[:, 1], 0.0, 4.0)):
        near = (high - low) / 20
        assert low <= factors.min() < low + near and high - near < factors.max() <= high


def test_erased_boxes_have_the_share_and_the_area_asked_for() -> None:
    rng, size = np.random.default_rng(12), 64
    boxes = np.array([draw_erase(0.3, size, rng) for _ in range(1000)])
    top, left, height, width = boxes[boxes[:, 2] > 0].T
    assert boxes.dtype == np.int64 and 240 < len(top) < 360
    assert (top + height <= size).all() and (left + width <= size).all() and min(top.min(), left.min()) == 0
    area, aspect = height * width / size**2, width / height
    assert 0.01 < area.min() < 0.04 and 0.3 < area.max() < 0.45
    assert 0.25 < aspect.min() < 0.4 and 2.5 < aspect.max() < 4
    assert not draw_erase(0.0, size, rng).any()


def test_erasing_clears_the_box_and_nothing_else() -> None:
    image = torch.rand(3, 8, 8, 2) + 1
    erased = erase(image, torch.tensor([[0, 0, 0, 0], [2, 3, 4, 1], [6, 0, 2, 8]]))
    expected = image.clone()
    expected[1, 2:6, 3:4] = 0
    expected[2, 6:8] = 0
    assert torch.equal(erased, expected)
