"""Sounds come back as they were written, in one type; libsndfile writes them, and is the second opinion on a wav."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile

from pipeline.data import sound
from pipeline.data.decode import decode
from pipeline.errors import DataError

RATE = 8000


def written(samples: np.ndarray, extension: str, format: str | None = None, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format=format or extension.upper(), subtype=subtype)
    return file.getvalue()


def noise(frames: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (frames, channels)).astype(np.float32)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT"])
@pytest.mark.parametrize("format", ["WAV", "WAVEX"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_a_wav_reads_as_libsndfile_reads_it(subtype: str, format: str, channels: int):
    for frames in (0, 1, 777):
        data = written(noise(frames, channels), "wav", format, subtype)
        audio = decode("wav", memoryview(data))
        expected, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
        assert audio.samples.dtype == np.float32 and audio.rate == rate == RATE
        assert audio.samples.shape == (frames, channels) and np.array_equal(audio.samples, expected)


@pytest.mark.parametrize(("extension", "bits"), [("wav", 16), ("wav", 24), ("flac", 16), ("flac", 24)])
def test_whole_numbers_come_back_exactly(extension: str, bits: int):
    numbers = np.array([[0, 1, -1, 2 ** (bits - 1) - 1, -(2 ** (bits - 1)), 12345]]).T
    stored = (numbers << (32 - bits)).astype(np.int32)
    audio = decode(extension, written(stored, extension, subtype=f"PCM_{bits}"))
    assert np.array_equal(audio.samples * 2.0 ** (bits - 1), numbers)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_comes_back_nearly(subtype: str):
    tone = (np.sin(np.arange(RATE) * 2 * np.pi * 440 / RATE) / 2).astype(np.float32)
    audio = decode("ogg", memoryview(written(tone, "ogg", subtype=subtype)))
    assert audio.samples.shape == (RATE, 1) and audio.rate == RATE
    assert np.abs(audio.samples[:, 0] - tone)[100:-100].mean() < 0.03


def test_chunks_around_the_samples_are_passed_over():
    plain = written(noise(10, 1), "wav")
    odd = b"LIST" + struct.pack("<I", 5) + b"hello\0"  # five bytes take six
    data = plain[:12] + odd + plain[12:] + odd
    assert np.array_equal(decode("wav", data).samples, decode("wav", plain).samples)
    with pytest.raises(DataError, match="without samples in its first 256 chunks"):
        decode("wav", plain[:12] + 300 * odd + plain[12:])


def test_a_wav_that_is_cut_or_of_another_codec_says_so():
    plain = written(noise(10, 1), "wav")
    for cut in range(len(plain)):
        with pytest.raises(DataError):
            decode("wav", plain[:cut])
    with pytest.raises(DataError, match="says 20 bytes of samples, and 19 are there"):
        decode("wav", plain[:-1])
    with pytest.raises(DataError, match="written to a pipe; write it to a file"):
        decode("wav", plain.replace(b"data" + struct.pack("<I", 20), b"data" + struct.pack("<I", 0xFFFFFFFE)))
    for subtype, words in (("ULAW", "codec 7 with 8 bits"), ("DOUBLE", "codec 3 with 64 bits")):
        with pytest.raises(DataError, match=words):
            decode("wav", written(noise(10, 1), "wav", subtype=subtype))
    for at, value in ((22, 0), (22, 2), (24, 0), (32, 3)):  # no channels, another number of them, no rate, odd frames
        with pytest.raises(DataError, match="a wav of 20 bytes"):
            decode("wav", plain[:at] + struct.pack("<H", value) + plain[at + 2 :])
    for extension in ("wav", "flac", "ogg"):
        with pytest.raises(DataError, match="first bytes are wrong"):
            decode(extension, written(noise(10, 1), "AIFF"))


def test_a_flac_that_is_cut_is_never_short():
    data = written(noise(20_000, 1), "flac")
    for part in (0.2, 0.5, 0.9, 0.999):
        with pytest.raises(DataError):
            decode("flac", data[: int(len(data) * part)])


def test_caps_hold_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch):
    sounds = {extension: written(noise(600, 2), extension) for extension in ("wav", "flac", "ogg")}
    monkeypatch.setattr(sound, "MAX_SAMPLES", 1199)
    for extension, data in sounds.items():
        with pytest.raises(DataError, match="600 frames in 2 channels, at most 1199"):
            decode(extension, data)
    monkeypatch.setattr(sound, "MAX_SAMPLES", 1200)
    for extension, data in sounds.items():
        assert decode(extension, data).samples.shape == (600, 2)
