"""Bytes of a sound file -> samples, all in one type: float32 in -1..1, whatever the file stored.

Whole numbers are divided by the largest that their bits can hold, so 16 and 24 bits come back exactly. A wav is read
here (a tenth of the time that libsndfile takes for a short clip), flac and ogg by libsndfile, held to the format that
the first bytes say.

What it gives up: other codecs in a wav (A-law, ADPCM, 64-bit floats), wavs that were written to a pipe and do not know
their length, RF64, and sounds over 256 million samples.
"""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

import numpy as np

from pipeline.errors import DataError

MAX_SAMPLES = 1 << 28  # of one sound, frames x channels: 1 GiB as float32, 93 minutes of one channel at 48 kHz
MAX_CHUNKS = 256  # of a wav, before its samples
FORMATS = {  # (codec, bits) of a wav -> numbers as stored, what they are multiplied by
    (1, 8): ("u1", 2.0**-7),
    (1, 16): ("<i2", 2.0**-15),
    (1, 24): ("<i4", 2.0**-31),
    (1, 32): ("<i4", 2.0**-31),
    (3, 32): ("<f4", 1.0),
}
EXTENSIBLE = 0xFFFE  # the codec begins the identifier of the sub-format then
MAGIC = {"flac": b"fLaC", "ogg": b"OggS"}
_CHUNK = struct.Struct("<4sI").unpack_from  # name, bytes


class Audio(NamedTuple):
    """A sound."""

    samples: np.ndarray  # float32[frames, channels], -1 to 1 (a file of floats and a lossy one may go beyond)
    rate: int  # frames per second


def read_wav(data: bytes | memoryview) -> Audio:
    """RIFF WAVE (Microsoft and IBM, Multimedia Programming Interface 1.0, 1991; with WAVE_FORMAT_EXTENSIBLE).

    Raises DataError or struct.error for what is not one.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise DataError("not a RIFF WAVE file: its first bytes are wrong")
    at, layout = 12, b""
    for _ in range(MAX_CHUNKS):
        name, size = _CHUNK(data, at)
        at += 8
        if name == b"data":
            return _samples(data, at, size, layout)
        if name == b"fmt ":
            layout = bytes(data[at : at + size])
        at += size + size % 2
    raise DataError(f"a wav without samples in its first {MAX_CHUNKS} chunks")


def _samples(data: bytes | memoryview, at: int, size: int, layout: bytes) -> Audio:
    """The `size` bytes of samples at `at`, stored as the format chunk `layout` says."""
    codec, channels, rate, _, frame_bytes, bits = struct.unpack_from("<HHIIHH", layout)
    if codec == EXTENSIBLE:
        (codec,) = struct.unpack_from("<H", layout, 24)
    if (codec, bits) not in FORMATS:
        raise DataError(f"a wav of codec {codec} with {bits} bits; store whole numbers (PCM), 32-bit floats, or flac")
    if not channels or not rate or frame_bytes != channels * bits // 8 or size % frame_bytes:
        raise DataError(f"a wav of {size} bytes, {channels} channels of {bits} bits, {frame_bytes} a frame, {rate} Hz")
    if size > len(data) - at:
        raise DataError(
            f"a wav that says {size} bytes of samples, and {len(data) - at} are there: it was cut, or written to a "
            "pipe; write it to a file"
        )
    count = size * 8 // bits
    _check(count // channels, channels)
    kind, scale = FORMATS[codec, bits]
    if bits == 24:  # the upper three bytes of four; the lowest belongs to what stands before, and is cleared
        stored = np.ndarray(count, kind, data, at - 1, strides=(3,)) & ~0xFF
    else:
        stored = np.frombuffer(data, kind, count, at)
    if bits == 8:  # the only ones without a sign
        stored = stored.astype(np.float32) - 128
    return Audio(np.multiply(stored, scale, dtype=np.float32).reshape(-1, channels), rate)


def read_sound(data: bytes | memoryview, kind: str) -> Audio:
    """A flac, or an ogg with Vorbis or Opus. Raises DataError for what is not one."""
    import soundfile  # a tenth of a second that pictures and text need not wait for

    if data[:4] != MAGIC[kind]:
        raise DataError(f"not {kind}: its first bytes are wrong")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            frames, rate = file.frames, file.samplerate
            _check(frames, file.channels)
            samples = file.read(dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise DataError(f"not a readable {kind}: {error.error_string}") from error
    if len(samples) != frames:
        raise DataError(f"{kind} of {frames} frames, {len(samples)} are there: it was cut")
    return Audio(samples, rate)


def _check(frames: int, channels: int) -> None:
    if frames * channels > MAX_SAMPLES:
        raise DataError(
            f"a sound of {frames} frames in {channels} channels, at most {MAX_SAMPLES} samples are decoded; cut it"
        )
