"""Every format that is read, at its edges, damaged, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import decode as decode_module
from pipeline.data.decode import DECODERS, decode, jpeg_into, load_decoders
from pipeline.errors import ConfigError, DataError
from tests.data.test_sound import written

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


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "comment": b"x" * 70_000}])
def test_a_jpeg_decodes_into_a_row_of_its_shape_and_no_other(options: dict):
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    comment = options.pop("comment", None)
    for pixels in (noise, noise[:, :, 0]):
        data = encoded(pixels, "JPEG", **options)
        if comment:  # a segment longer than most, and two of them
            segment = b"\xff\xfe" + (65_535).to_bytes(2, "big") + comment[:65_533]
            data = data[:2] + 2 * segment + data[2:]
        expected = decode("jpg", data)
        rows = np.full((3, *expected.shape), 7, dtype=np.uint8)
        assert jpeg_into(memoryview(data), rows[1])
        assert np.array_equal(rows[1], expected) and (rows[[0, 2]] == 7).all()
        for shape in (
            (24, 32, 4 - expected.shape[2]),
            (24, 31, expected.shape[2]),
            (48, 32, expected.shape[2]),
            (1, 1, 3),
        ):
            other = np.full(shape, 7, dtype=np.uint8)
            assert not jpeg_into(data, other) and (other == 7).all()


def test_what_is_no_plain_jpeg_is_left_to_decode(monkeypatch: pytest.MonkeyPatch):
    out = np.zeros((24, 32, 3), np.uint8)
    data = encoded(PIXELS, "JPEG")
    assert jpeg_into(data, out)
    cmyk = encoded(Image.fromarray(PIXELS).convert("CMYK"), "JPEG")
    for other in (cmyk, b"", data[:-300], encoded(PIXELS, "PNG"), data[:2] + b"\xff" + data[2:]):
        assert not jpeg_into(other, out)
    frame = data.index(b"\xff\xc0") + 5
    lies = data[:frame] + (2400).to_bytes(2, "big") + data[frame + 2 :]  # the picture of this header would not fit
    assert not jpeg_into(lies, out)
    appended = data[:2] + data[frame - 5 : frame + 14] + data[2:frame] + (2400).to_bytes(2, "big") + data[frame + 2 :]
    assert not jpeg_into(appended, out)  # a frame header of the right shape before the one that counts
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 24 * 32 - 1)
    assert not jpeg_into(data, out)


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


def examples() -> dict[str, bytes]:
    """One field of every format."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    tone = np.sin(np.arange(3000) / 7).reshape(1500, 2).astype(np.float32) / 2
    pictures = {name: encoded(noise, format) for name, format in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))}
    sounds = {name: written(tone, name) for name in ("wav", "flac", "ogg")}
    rest = {"npy": saved(np.arange(300)), "cls": b"31", "txt": "grün und blau".encode(), "bin": b"\x00\xff"}
    return pictures | sounds | rest | {"jpeg": pictures["jpg"], "jpe": pictures["jpg"], "json": b'{"a": [1, null]}'}


@pytest.mark.parametrize("extension", sorted(DECODERS))
def test_damage_gives_a_data_error_or_a_value(extension: str):
    """Bits flipped, pieces cut off, zeroed or repeated, wherever the draw falls: nothing else is ever raised."""
    data, rng = examples()[extension], np.random.default_rng(zlib.crc32(extension.encode()))
    decode(extension, data)
    refused = 0
    for turn in range(120):
        damaged = bytearray(data)
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
        if turn % 4 == 1:  # the first bytes say the most
            at %= 64
        match turn % 4:
            case 0 | 1:
                damaged[at] ^= 1 << int(rng.integers(8))
            case 2:
                del damaged[at:]
            case 3:
                damaged[at : at + length] = rng.choice([bytes(length), b"\xff" * length, data[:length]])
        try:
            decode(extension, memoryview(damaged))
        except DataError:
            refused += 1
    assert refused or extension in ("bin", "txt", "cls")


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


def test_decoders_of_ones_own_are_named_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_formats.py").write_text(
        "def rot13(data):\n    return str(data, 'ascii').translate(TABLE)\nTABLE = {97: 'n'}"
    )
    (tmp_path / "my_broken.py").write_text("import nothing_called_this\n")
    (tmp_path / "my_failing.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    extra = load_decoders({"rot": "my_formats:rot13"})
    assert decode("a.ROT", memoryview(b"aha"), extra) == "nhn"
    with pytest.raises(DataError, match="not a readable rot: 'ascii' codec"):
        decode("rot", memoryview(b"\xff"), extra)
    with pytest.raises(DataError, match=r"'rat' is not decoded: allowed are jpg, .*, rot"):
        decode("rat", b"", extra)
    monkeypatch.setattr(decode_module, "MAX_BYTES", 3)
    with pytest.raises(DataError, match="4 bytes, at most 3"):
        decode("rot", b"abcd", extra)
    for extension, path, words in (
        ("rot", "my_formats:rot14", "rot14 in my_formats is not there"),
        ("rot", "my_formats:TABLE", "TABLE in my_formats is a dict; name a function"),
        ("rot", "my_formats.rot13", "no import path; write package.module:function"),
        ("rot", ":rot13", "no import path"),
        ("rot", "my_absent:f", "install the package that has 'my_absent'"),
        ("rot", "my_broken:f", "install the package that has 'nothing_called_this'"),
        ("rot", "my_failing:f", "importing my_failing fails with ZeroDivisionError"),
        ("jpg", "my_formats:rot13", "jpg is decoded already"),
        ("pkl", "my_formats:rot13", "pkl can run code when it is read, and stays refused"),
        ("a.rot", "my_formats:rot13", "the last part of a field's name"),
        ("ROT", "my_formats:rot13", "in lower case"),
        ("", "my_formats:rot13", "such as tif"),
    ):
        with pytest.raises(ConfigError, match=f"decoder {extension!r}: {path!r}.*{words}"):
            load_decoders({"ok": "my_formats:rot13", extension: path})
