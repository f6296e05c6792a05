"""Every format that is read, at its edges, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.data import decode as decode_module
from pipeline.data.decode import decode
from pipeline.errors import DataError

PIXELS = (np.mgrid[0:24, 0:32].sum(0)[:, :, None] * np.array([2, 3, 4])).astype(np.uint8)


def encoded(array: np.ndarray | Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(file, format, **options)
    return file.getvalue()


def saved(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "JPG", "seg.jpg"])
def test_jpeg(extension: str):
    data = encoded(PIXELS, "JPEG", quality=95)
    image = decode(extension, memoryview(data))
    assert image.dtype == np.uint8 and image.shape == (24, 32, 3)
    assert np.abs(image.astype(int) - np.asarray(Image.open(io.BytesIO(data)))).max() <= 4
    grey = decode(extension, encoded(PIXELS[:, :, 0], "JPEG", quality=95))
    assert grey.shape == (24, 32, 1)
    assert np.abs(grey[:, :, 0].astype(int) - PIXELS[:, :, 0]).max() <= 8


def test_cmyk_jpeg_becomes_colour():
    assert decode("jpg", encoded(Image.fromarray(PIXELS).convert("CMYK"), "JPEG")).shape == (24, 32, 3)


@pytest.mark.parametrize("format", ["png", "webp"])
def test_lossless_images(format: str):
    options = {"lossless": True, "exact": True} if format == "webp" else {}
    assert np.array_equal(decode(format, encoded(PIXELS, format, **options)), PIXELS)
    rgba = np.dstack([PIXELS, 255 - PIXELS[:, :, :1]])
    assert np.array_equal(decode(format, encoded(rgba, format, **options)), rgba)


def test_png_modes():
    grey = PIXELS[:, :, 0]
    assert np.array_equal(decode("png", encoded(grey, "PNG")), grey[:, :, None])
    palette = Image.fromarray(PIXELS).quantize(256)
    assert np.array_equal(decode("png", encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))
    assert decode("png", encoded(palette, "PNG", transparency=0)).shape == (24, 32, 4)
    assert np.array_equal(
        decode("png", encoded(Image.fromarray(grey > 20), "PNG"))[:, :, 0], (grey > 20) * np.uint8(255)
    )
    assert decode("png", encoded(Image.fromarray(grey).convert("LA"), "PNG")).shape == (24, 32, 4)
    with pytest.raises(DataError, match="mode I;16; store 8-bit grey or RGB"):
        decode("png", encoded(Image.fromarray(grey.astype(np.uint16) * 200), "PNG"))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        np.array(3.5),
        np.zeros((0, 4), np.uint16),
        np.array([1, 2], ">i4"),
        np.array([(1, 2.0)], [("a", "<i4"), ("b", "<f8")]),
        np.array(["ab", "c"]),
        np.array([True, False]),
    ],
)
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy(array: np.ndarray, version: tuple[int, int]):
    data = saved(array, version=version)
    got = decode("npy", memoryview(data))
    assert got.dtype == array.dtype and got.shape == array.shape and got.tobytes() == array.tobytes()
    assert not got.flags.writeable  # a view of the data, not a copy


def test_npy_is_never_pickle_and_must_be_whole():
    with pytest.raises(DataError, match="Python objects can run code"):
        decode("npy", saved(np.array([{}], dtype=object), allow_pickle=True))
    data = saved(np.arange(10))
    for cut in range(len(data)):
        with pytest.raises(DataError):
            decode("npy", data[:cut])
    with pytest.raises(DataError, match="needs 80 bytes, 81 are there"):
        decode("npy", data + b"x")
    for old, new in ((b"'descr'", b"'other'"), (b"(10,)", b"(-1,)"), (b"'<i8'", b"'?!?'"), (b"False", b"(((((")):
        with pytest.raises(DataError):
            decode("npy", data.replace(old, new))
    with pytest.raises(DataError, match="npy header of 20000 bytes"):
        decode("npy", b"\x93NUMPY\x01\x00" + (20000).to_bytes(2, "little") + bytes(30000))


def test_numbers_text_and_json():
    assert decode("cls", b"7") == 7 and decode("cls", memoryview(b" -3\n")) == -3
    assert decode("txt", memoryview("ü\n".encode())) == "ü\n"
    value = {"a": [1, None, "ü"]}
    assert decode("json", memoryview(json.dumps(value).encode())) == value
    assert decode("bin", memoryview(b"\x00\xff")) == b"\x00\xff"
    for extension, data in (("cls", b"cat"), ("cls", b""), ("txt", b"\xff"), ("json", b"{"), ("json", b"[" * 100_000)):
        with pytest.raises(DataError, match=f"not a readable {extension}"):
            decode(extension, data)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_damaged_images_raise(extension: str):
    """Empty, cut anywhere in the picture, another format under this name."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(noise, "jpeg" if extension == "jpg" else extension)
    for damaged in (b"", data[:20], data[: len(data) // 2], data[: len(data) - 100], b"GIF89a" + data):
        with pytest.raises(DataError):
            decode(extension, damaged)
    other = encoded(noise, "bmp")
    with pytest.raises(DataError, match=f"not a readable {extension}"):
        decode(extension, other)


def test_caps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 24 * 32 - 1)
    for extension, format in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")):
        with pytest.raises(DataError, match="24 x 32 pixels, at most 767"):
            decode(extension, encoded(PIXELS, format))
    monkeypatch.setattr(decode_module, "MAX_BYTES", 3)
    with pytest.raises(DataError, match="4 bytes, at most 3"):
        decode("txt", b"abcd")


def test_a_png_that_claims_to_be_huge_is_refused_before_it_takes_memory():
    data = bytearray(encoded(PIXELS, "PNG"))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(DataError):
        decode("png", bytes(data))


def test_the_rest_is_refused_with_the_list():
    with pytest.raises(DataError, match=r"'tiff' is not decoded: allowed are jpg, .*npy.*npy, structures as json"):
        decode("tiff", b"")
    for extension in ("pkl", "pyd", "pt", "npz"):
        with pytest.raises(DataError, match="can run code when it is read"):
            decode(extension, pickle.dumps({}))
