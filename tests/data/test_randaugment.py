"""RandAugment's operations against Pillow, where both mean the same, and what is drawn."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from pipeline.data import randaugment
from pipeline.data.randaugment import OPERATIONS, SIGNED, RandAugment, operate

STRENGTHS = (0.0, 0.2, 0.55, 1.0)
ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "colour": ImageEnhance.Color,
    "sharpness": ImageEnhance.Sharpness,
}


def pictures() -> list[np.ndarray]:
    """Grey and colour: noise, a dark smooth one, one value, a few values."""
    rng = np.random.default_rng(3)
    noise = rng.integers(0, 256, (23, 17, 3), dtype=np.uint8)
    slope = np.linspace(30, 120, 23 * 17).reshape(23, 17, 1).astype(np.uint8) + np.array([0, 9, 20], np.uint8)
    flat = np.full((23, 17, 3), 77, np.uint8)
    few = rng.choice(np.array([3, 90, 200], np.uint8), (40, 40, 3))
    return [*(each for picture in (noise, slope, flat, few) for each in (picture, picture[:, :, :1]))]


def pillow(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)


def furthest(ours: np.ndarray, theirs: Image.Image) -> int:
    other = np.asarray(theirs).reshape(ours.shape)
    assert ours.dtype == other.dtype == np.uint8
    return int(np.abs(ours.astype(int) - other).max())


@pytest.mark.parametrize("number", range(8))
def test_tables_are_pillows_to_the_bit(number: int) -> None:
    picture = pictures()[number]
    image = pillow(picture)
    assert furthest(operate(picture, "autocontrast", 1.0), ImageOps.autocontrast(image)) == 0
    assert furthest(operate(picture, "equalize", 1.0), ImageOps.equalize(image)) == 0
    for strength in STRENGTHS:
        bits = 8 - round(4 * strength)
        assert furthest(operate(picture, "posterize", strength), ImageOps.posterize(image, bits)) == 0
        threshold = 256 - round(256 * strength)
        assert furthest(operate(picture, "solarize", strength), ImageOps.solarize(image, threshold)) == 0
    assert operate(picture, "identity", 1.0) is picture


@pytest.mark.parametrize("name", list(ENHANCERS))
def test_enhancements_are_pillows_to_one_step(name: str) -> None:
    """Pillow rounds its grey in whole numbers, which moves a value by one here and there."""
    moved = []
    for picture in pictures():
        for strength in (*STRENGTHS, -0.3, -1.0):
            theirs = ENHANCERS[name](pillow(picture)).enhance(1 + 0.9 * strength)
            assert furthest(operate(picture, name, strength), theirs) <= 1  # type: ignore[arg-type]
            moved.append(furthest(operate(picture, name, strength), pillow(picture)))  # type: ignore[arg-type]
    assert max(moved) > 50


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
@pytest.mark.parametrize("strength", [0.35, 1.0, -0.6])
def test_movements_are_pillows_inside_the_frame(name: str, strength: float) -> None:
    """Pillow cuts off where ours fades to black, at the frame's edge; within it both take the same pixels."""
    rng = np.random.default_rng(4)
    height, width = 26, 31
    picture = np.asarray(Image.fromarray(rng.integers(0, 256, (7, 8, 3), dtype=np.uint8)).resize((width, height)))
    moved = operate(picture, name, strength)  # type: ignore[arg-type]
    angle = math.radians(30 * strength)
    linear = {
        "rotate": (math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)),
        "shear_x": (1.0, 0.3 * strength, 0.0, 1.0),
        "shear_y": (1.0, 0.0, 0.3 * strength, 1.0),
    }.get(name, (1.0, 0.0, 0.0, 1.0))
    a, b, d, e = linear
    right, down = (
        0.45 * strength * (name == axis) * side for axis, side in (("translate_x", width), ("translate_y", height))
    )
    # from Pillow's corner to our centre
    c, f = (1 - a) * width / 2 - b * height / 2 + right, (1 - e) * height / 2 - d * width / 2 + down
    theirs = pillow(picture).transform(
        (width, height), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR
    )
    white = np.full((height, width, 1), 255, np.uint8)
    inside = operate(white, name, strength)[:, :, 0] == 255  # type: ignore[arg-type]
    assert inside.mean() > 0.3 and np.abs(moved.astype(int) - np.asarray(theirs))[inside].max() <= 1
    assert furthest(moved, pillow(picture)) > 20
    if name == "rotate" and strength > 0:  # which way round: as Pillow turns a picture
        turned = np.asarray(pillow(picture).rotate(30 * strength, Image.Resampling.BILINEAR))
        assert np.abs(moved.astype(int) - turned)[inside].max() <= 1


def test_nothing_moves_at_strength_0() -> None:
    for picture in pictures():
        for name in SIGNED:
            assert np.array_equal(operate(picture, name, 0.0), picture), name


def test_draws_follow_from_the_generator_and_reach_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[tuple[str, float]] = Counter()

    def note(image: np.ndarray, name: randaugment.Operation, strength: float) -> np.ndarray:
        seen[name, strength] += 1
        return operate(image, name, strength)

    monkeypatch.setattr(randaugment, "operate", note)
    settings, picture = RandAugment(count=3, magnitude=8).model_dump(), pictures()[0]
    once, again = (randaugment.randaugment(picture, **settings, rng=np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(once, again) and once.shape == picture.shape and once.dtype == np.uint8
    seen.clear()
    rng = np.random.default_rng(6)
    for _ in range(300):
        randaugment.randaugment(picture, **settings, rng=rng)
    assert {name for name, _ in seen} == set(OPERATIONS) and sum(seen.values()) == 900
    for name in OPERATIONS:
        assert {strength for each, strength in seen if each == name} == ({0.8, -0.8} if name in SIGNED else {0.8})
    few = RandAugment(count=2, among=("rotate", "identity"))
    seen.clear()
    randaugment.randaugment(picture, **few.model_dump(), rng=rng)
    assert {name for name, _ in seen} <= {"rotate", "identity"}
