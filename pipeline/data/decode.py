"""Bytes of one field -> array, number, text or JSON value, by a short list of formats that cannot run code.

The last part of a field's name chooses the decoder, as in WebDataset ("seg.png" is a png):
    jpg jpeg jpe    uint8[height, width, channels] (simplejpeg; Pillow for CMYK)
    png webp        uint8[height, width, channels] (Pillow)
    npy             any array without Python objects
    cls             int
    txt             str, UTF-8
    json            what the JSON says
    bin             bytes
Images keep the channels they were stored with: 1 for grey, 3 for colour, 4 with transparency (palettes are resolved,
CMYK becomes RGB). Orientation tags are not applied.

What it gives up: pickles, compressed archives and anything else that is not on the list; 16-bit images; damaged images
that a browser would still show; members over 1 GiB and pictures over 64 million pixels, so that a bad file cannot take
all memory.
"""

from __future__ import annotations

import ast
import io
import json
import math
import struct
from functools import lru_cache
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from pipeline.errors import DataError

MAX_BYTES = 1 << 30  # of one member
MAX_PIXELS = 1 << 26  # of one image
MAX_HEADER_BYTES = 10_000  # of an npy header, numpy's own limit for headers it does not trust
MODES = {"1": "L", "L": "L", "RGB": "RGB", "RGBA": "RGBA", "LA": "RGBA", "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB"}
UNSAFE = ("pkl", "pickle", "pyd", "pth", "pt", "npz", "dill", "joblib")


def decode(extension: str, data: bytes | memoryview) -> Any:
    """The value of a field from its bytes; arrays may be read-only views of `data`.

    Raises DataError with what is wrong: an extension that is not on the list, too many bytes or pixels, or bytes that
    are not of the format. Where the bytes come from is added by the reader.
    """
    kind = extension.rpartition(".")[2].lower()
    decoder = DECODERS.get(kind)
    if decoder is None:
        reason = "can run code when it is read; " if kind in UNSAFE else ""
        raise DataError(
            f"extension {kind!r} is not decoded: {reason}allowed are {', '.join(DECODERS)}. Pack arrays as npy, "
            "structures as json; sample.raw gives the bytes as they are"
        )
    if len(data) > MAX_BYTES:
        raise DataError(f"{len(data)} bytes, at most {MAX_BYTES} are decoded; pack it in smaller pieces")
    try:
        return decoder(data)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # whatever a decoder says of bytes that are not its format
        raise DataError(f"not a readable {kind}: {error}") from error


def _jpeg(data: bytes | memoryview) -> np.ndarray:
    height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    _check_pixels(int(height), int(width))
    if space in ("CMYK", "YCCK"):
        return _image(data, "JPEG")
    return simplejpeg.decode_jpeg(data, "GRAY" if space == "Gray" else "RGB")


def _image(data: bytes | memoryview, format: str) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=(format,)) as image:
        _check_pixels(image.height, image.width)
        mode = MODES.get(image.mode)
        if image.mode == "P":
            mode = "RGBA" if "transparency" in image.info else "RGB"
        if mode is None:
            raise DataError(f"a picture of mode {image.mode}; store 8-bit grey or RGB, or other numbers as npy")
        array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array[:, :, None] if array.ndim == 2 else array


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DataError(f"a picture of {height} x {width} pixels, at most {MAX_PIXELS} are decoded; make it smaller")


def _npy(data: bytes | memoryview) -> np.ndarray:
    """An array as numpy.save writes it (numpy.lib.format, versions 1 to 3), without a copy."""
    if data[:6] != b"\x93NUMPY" or data[6:7] not in (b"\1", b"\2", b"\3"):
        raise DataError("not an npy file: its first bytes are wrong")
    size, start = ("<H", 10) if data[6] == 1 else ("<I", 12)
    (length,) = struct.unpack_from(size, data, 8)
    begin = start + length
    if length > MAX_HEADER_BYTES:
        raise DataError(f"an npy header of {length} bytes, at most {MAX_HEADER_BYTES} are read")
    dtype, shape, order = _npy_header(bytes(data[start:begin]))
    expected = dtype.itemsize * math.prod(shape)
    if len(data) - begin != expected:
        raise DataError(f"an array of {dtype} {shape} needs {expected} bytes, {len(data) - begin} are there")
    return np.frombuffer(data, dtype, math.prod(shape), begin).reshape(shape, order=order)


@lru_cache(maxsize=256)  # all rows of a data set have the same header
def _npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...], Any]:
    fields = ast.literal_eval(header.decode("utf-8"))
    dtype = np.dtype(fields["descr"])
    if dtype.hasobject:
        raise DataError("an npy of Python objects can run code when it is read; save numbers, or pack it as json")
    shape = tuple(fields["shape"])
    if any(not isinstance(length, int) or length < 0 for length in shape):
        raise DataError(f"an npy header with the shape {shape}")
    return dtype, shape, "F" if fields["fortran_order"] else "C"


def _class(data: bytes | memoryview) -> int:
    return int(str(data, "ascii"))


def _text(data: bytes | memoryview) -> str:
    return str(data, "utf-8")


def _json(data: bytes | memoryview) -> Any:
    return json.loads(bytes(data))


DECODERS = {
    "jpg": _jpeg,
    "jpeg": _jpeg,
    "jpe": _jpeg,
    "png": lambda data: _image(data, "PNG"),
    "webp": lambda data: _image(data, "WEBP"),
    "npy": _npy,
    "cls": _class,
    "txt": _text,
    "json": _json,
    "bin": bytes,
}
