"""Bytes of one field -> array, number, text or JSON value, by a short list of formats that cannot run code.

The last part of a field's name chooses the decoder, as in WebDataset ("seg.png" is a png):
    jpg jpeg jpe    uint8[height, width, channels] (simplejpeg; Pillow for CMYK)
    png webp        uint8[height, width, channels] (Pillow)
    wav flac ogg    sound.Audio: float32[frames, channels] and its rate
    npy             any array without Python objects
    cls             int
    txt             str, UTF-8
    json            what the JSON says
    bin             bytes
Images keep the channels they were stored with: 1 for grey, 3 for colour, 4 with transparency (palettes are resolved,
CMYK becomes RGB). Orientation tags are not applied. Other formats are read by functions of the user's own, named by
import path (`load_decoders`).

What it gives up: pickles, compressed archives and anything else that is not on the list; 16-bit images; damaged images
that a browser would still show; members over 1 GiB, pictures over 64 million pixels and sounds over 256 million
samples, so that a bad file cannot take all memory.
"""

from __future__ import annotations

import ast
import importlib
import io
import json
import math
import struct
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from pipeline.data.sound import read_sound, read_wav
from pipeline.errors import ConfigError, DataError

MAX_BYTES = 1 << 30  # of one member
MAX_PIXELS = 1 << 26  # of one image
MAX_HEADER_BYTES = 10_000  # of an npy header, numpy's own limit for headers it does not trust
MODES = {"1": "L", "L": "L", "RGB": "RGB", "RGBA": "RGBA", "LA": "RGBA", "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB"}
COLOURS = {1: "GRAY", 3: "RGB"}  # channels -> simplejpeg's name
JPEG_SKIPPED = {0xFFC4, 0xFFDB, 0xFFDD, 0xFFFE, *range(0xFFE0, 0xFFF0)}  # tables, comments, application data
JPEG_FRAMES = {0xFFC0, 0xFFC1, 0xFFC2}  # baseline, extended, progressive (ITU-T T.81, table B.1)
_JPEG_SEGMENT = struct.Struct(">HH").unpack_from  # marker, length
_JPEG_FRAME = struct.Struct(">xxxxxHHB").unpack_from  # height, width, channels
UNSAFE = ("pkl", "pickle", "pyd", "pth", "pt", "npz", "dill", "joblib")

Decoder = Callable[[Any], Any]
"""The bytes of one field -> its value; any exception says that the bytes are not of the format."""


def decode(extension: str, data: bytes | memoryview, extra: Mapping[str, Decoder] | None = None) -> Any:
    """The value of a field from its bytes; arrays may be read-only views of `data`. `extra`: from `load_decoders`.

    Raises DataError with what is wrong: an extension that is not on the list, too many bytes, pixels or samples, or
    bytes that are not of the format. Where the bytes come from is added by the reader.
    """
    kind = extension.rpartition(".")[2].lower()
    decoder = DECODERS.get(kind) or (extra.get(kind) if extra else None)
    if decoder is None:
        reason = "can run code when it is read; " if kind in UNSAFE else ""
        raise DataError(
            f"extension {kind!r} is not decoded: {reason}allowed are {', '.join([*DECODERS, *(extra or ())])}. Pack "
            "arrays as npy, structures as json; sample.raw gives the bytes as they are"
        )
    if len(data) > MAX_BYTES:
        raise DataError(f"{len(data)} bytes, at most {MAX_BYTES} are decoded; pack it in smaller pieces")
    try:
        return decoder(data)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # whatever a decoder says of bytes that are not its format
        raise DataError(f"not a readable {kind}: {error}") from error


def jpeg_into(data: bytes | memoryview, out: np.ndarray) -> bool:
    """Decode a JPEG straight into `out`, uint8[height, width, 1 or 3] and contiguous, if it has exactly that shape.

    What is written is what `decode` gives. False when the picture has another shape or colours, is damaged, or has an
    unusual header: `decode` tells which. `out` is untouched then, or half written by a damaged one. Rows of pixels that
    begin at a multiple of 32 bytes cost a tenth more at 64 pixels: libjpeg-turbo writes those around the cache.
    """
    shape = out.shape
    try:
        # compared before anything is decoded, and after: a header that lies cannot overrun `out`, whose size simplejpeg
        # checks by itself
        return (
            _jpeg_shape(data) == shape
            and len(data) <= MAX_BYTES
            and shape[0] * shape[1] <= MAX_PIXELS
            and simplejpeg.decode_jpeg(data, COLOURS[shape[2]], buffer=out).shape == shape
        )
    except (ValueError, struct.error):
        return False


def _jpeg_shape(data: bytes | memoryview) -> tuple[int, int, int] | None:
    """(height, width, channels) as the frame header of a common JPEG says; struct.error when the data end before it."""
    at = 2
    marker, length = _JPEG_SEGMENT(data, at)
    while marker in JPEG_SKIPPED:
        at += 2 + length
        marker, length = _JPEG_SEGMENT(data, at)
    return _JPEG_FRAME(data, at) if marker in JPEG_FRAMES else None


def load_decoders(paths: Mapping[str, str]) -> dict[str, Decoder]:
    """Import decoders of the user's own: {"tif": "my_package.my_module:function"} -> {"tif": function}.

    Each takes the bytes of a field (a read-only memoryview of at most MAX_BYTES) and returns its value; it may run in
    several threads. Raises ConfigError naming the entry: no such module or function, not callable, an extension that
    is decoded already or that is refused because its format can run code.
    """
    return {extension: _load_decoder(extension, path) for extension, path in paths.items()}


def _load_decoder(extension: str, path: str) -> Decoder:
    where = f"decoder {extension!r}: {path!r}"
    if not extension or "." in extension or extension != extension.lower():
        raise ConfigError(f"{where}: the extension must be the last part of a field's name, in lower case, such as tif")
    if extension in DECODERS:
        raise ConfigError(f"{where}: {extension} is decoded already; give the field another extension to read it anew")
    if extension in UNSAFE:
        raise ConfigError(
            f"{where}: {extension} can run code when it is read, and stays refused; pack the data in another format"
        )
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ConfigError(f"{where} is no import path; write package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        mend = f"install the package that has {error.name!r}, or put its folder on PYTHONPATH"
        raise ConfigError(f"{where} cannot be imported: {error}; {mend}") from None
    except Exception as error:  # a module is anyone's code
        raise ConfigError(f"{where}: importing {module_name} fails with {type(error).__name__}: {error}") from error
    decoder = getattr(module, name, None)
    if not callable(decoder):
        there = f"is a {type(decoder).__name__}" if hasattr(module, name) else "is not there"
        raise ConfigError(f"{where}: {name} in {module_name} {there}; name a function that takes bytes")
    return decoder


def _jpeg(data: bytes | memoryview) -> np.ndarray:
    height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    _check_pixels(int(height), int(width))
    if space in ("CMYK", "YCCK"):
        return _image(data, "JPEG")
    return simplejpeg.decode_jpeg(data, COLOURS[1 if space == "Gray" else 3])


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
    """An array as numpy.save writes it, without a copy."""
    dtype, shape, order, begin = npy_header(data)
    expected = dtype.itemsize * math.prod(shape)
    if len(data) - begin != expected:
        raise DataError(f"an array of {dtype} {shape} needs {expected} bytes, {len(data) - begin} are there")
    return np.frombuffer(data, dtype, math.prod(shape), begin).reshape(shape, order=order)


def npy_header(data: bytes | memoryview) -> tuple[np.dtype, tuple[int, ...], Any, int]:
    """Type, shape, order ("C" or "F") of an npy file, and where in it the numbers begin, in bytes.

    numpy.lib.format, versions 1 to 3. Raises DataError when it is none, or one of Python objects.
    """
    if data[:6] != b"\x93NUMPY" or data[6:7] not in (b"\1", b"\2", b"\3"):
        raise DataError("not an npy file: its first bytes are wrong")
    size, start = ("<H", 10) if data[6] == 1 else ("<I", 12)
    (length,) = struct.unpack_from(size, data, 8)
    begin = start + length
    if length > MAX_HEADER_BYTES:
        raise DataError(f"an npy header of {length} bytes, at most {MAX_HEADER_BYTES} are read")
    return *_npy_header(bytes(data[start:begin])), begin


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
    "wav": read_wav,
    "flac": lambda data: read_sound(data, "flac"),
    "ogg": lambda data: read_sound(data, "ogg"),
    "npy": _npy,
    "cls": _class,
    "txt": _text,
    "json": _json,
    "bin": bytes,
}
