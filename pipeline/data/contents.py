"""What a field's bytes say of themselves in their first part: shape of an array, size of a picture, length of a sound.

Nothing is decoded: npy, jpeg, png, webp and wav carry a header, text is counted. What it gives up: a file that is
damaged behind its header counts as good here; other formats have no measures.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.errors import DataError

MAX_NPY_HEADER = 10_000  # bytes, numpy's own limit for headers it does not trust


class Look(NamedTuple):
    """What one field's bytes are. kind: such as "uint16[n]" or "JPEG RGB".  measures: such as {"width": 64.0}."""

    kind: str
    measures: dict[str, float]


def can_look(field: str) -> bool:
    """Whether fields of this name have something to measure."""
    return _extension(field) in LOOKS


def look(field: str, data: memoryview) -> Look:
    """Kind and measures of the bytes of one field; DataError when they are not of the format that the name says."""
    extension = _extension(field)
    try:
        return LOOKS[extension](data)
    except Exception as error:  # parsers of foreign bytes raise many kinds
        raise DataError(f"not a readable {extension}: {error}") from error


def _extension(field: str) -> str:
    return field.rpartition(".")[2].lower()


def _array(data: memoryview) -> Look:
    file = io.BytesIO(data[: MAX_NPY_HEADER + 16])
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file, max_header_size=MAX_NPY_HEADER)
    axes = ", ".join(["n", *map(str, shape[1:])]) if shape else ""
    measures = {"length": float(shape[0])} if shape else {}
    return Look(f"{dtype}[{axes}]", measures)


def _picture(data: memoryview) -> Look:
    with Image.open(io.BytesIO(data)) as image:
        return Look(f"{image.format} {image.mode}", {"width": float(image.width), "height": float(image.height)})


def _text(data: memoryview) -> Look:
    text = str(data, "utf-8")
    return Look("UTF-8", {"characters": float(len(text)), "words": float(len(text.split()))})


def _sound(data: memoryview) -> Look:
    with wave.open(io.BytesIO(data)) as sound:
        rate, channels, bits = sound.getframerate(), sound.getnchannels(), 8 * sound.getsampwidth()
        return Look(f"{rate:,} Hz, {bits} bits, {channels} channel(s)", {"seconds": sound.getnframes() / rate})


LOOKS: dict[str, Callable[[memoryview], Look]] = {
    **dict.fromkeys(("jpg", "jpeg", "jpe", "png", "webp"), _picture),
    "npy": _array,
    "txt": _text,
    "wav": _sound,
}
