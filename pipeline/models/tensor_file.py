"""A safetensors file by its parts: a header that says where each tensor lies, then the bytes, one tensor after another.

The library maps a file into memory, where pages that were read count as used until the system wants them back. Here
bytes go from the file into the tensor that they are for, or the other way, and nothing else is held. What it gives up:
types that no network of ours has, such as fp8, and big-endian machines.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import DataError

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SPELLED = {dtype: spelled for spelled, dtype in DTYPES.items()}
PIECE_BYTES = 1 << 24  # of a tensor that is converted on its way
_LARGEST_HEADER = 100_000_000  # bytes; the library's own limit


class Place(NamedTuple):
    """Where a tensor lies in its file: bytes [begin, end); `dtype` in safetensors' words."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: BinaryIO) -> dict[str, Place]:
    """Every tensor by name, in the order of the bytes; leaves `file` where these begin. Raises ValueError."""
    size = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
    if size > _LARGEST_HEADER:
        raise ValueError("it does not begin as a safetensors file")
    try:
        raw = json.loads(file.read(size))
        raw.pop("__metadata__", None)
        places = {
            name: Place(each["dtype"], tuple(each["shape"]), *(8 + size + at for at in each["data_offsets"]))
            for name, each in raw.items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its header is damaged: {error!r}") from error
    return dict(sorted(places.items(), key=lambda item: item[1].begin))


def header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, Place]]:
    """The bytes with which a file of these tensors begins, and where in the file each of them goes."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        table[name] = {"dtype": SPELLED[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8 bytes
    start = 8 + len(text)
    places = {
        name: Place(SPELLED[dtype], shape, *(start + at for at in table[name]["data_offsets"]))
        for name, (dtype, shape) in tensors.items()
    }
    return struct.pack("<Q", len(text)) + text, places


def read_into(target: Tensor, path: Path, place: Place) -> None:
    """Fill `target`, of the place's shape and in one piece on the host, from the file; other dtypes are converted.

    Raises DataError when the file ends too early.
    """
    flat, dtype = target.detach().view(-1), DTYPES[place.dtype]
    straight = dtype == target.dtype
    buffer = bytearray(0 if straight else min(PIECE_BYTES, place.end - place.begin))
    with path.open("rb", buffering=0) as file:
        file.seek(place.begin)
        if straight:
            _fill(file, flat.view(torch.uint8).numpy().data, path)
            return
        for start in range(0, flat.numel(), PIECE_BYTES // dtype.itemsize):
            part = flat[start : start + PIECE_BYTES // dtype.itemsize]
            piece = memoryview(buffer)[: part.numel() * dtype.itemsize]
            _fill(file, piece, path)
            part.copy_(torch.frombuffer(piece, dtype=dtype))


def _fill(file: Any, view: memoryview, path: Path) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise DataError(f"{path} ends in the middle of a tensor: it was not copied whole; bring it again")
        done += count
