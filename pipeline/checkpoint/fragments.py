"""Flat pieces of a model's state in safetensors files: written as a stream, read by the slice, each element once.

The files are ordinary safetensors; any library that reads those reads these. They are written here rather than by the
library so that one tensor at a time passes through memory, and through the hash, on its way to the disk. Nothing here
knows DeepSpeed.
"""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.checkpoint.manifest import FragmentPlace
from pipeline.errors import CheckpointError

# dtypes of safetensors that a model's state may have
_SPELLED = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {spelled: dtype for dtype, spelled in _SPELLED.items()}


class Fragment(NamedTuple):
    """Elements [start, start + numel) of one state of one parameter; `tensor` is 1-d, a view where possible."""

    name: str
    key: str
    start: int
    tensor: Tensor

    @property
    def numel(self) -> int:
        return self.tensor.numel()

    def place(self, file: str) -> FragmentPlace:
        """Its entry in the manifest's table. Raises CheckpointError for a dtype that safetensors does not have."""
        if self.tensor.dtype not in _SPELLED:
            raise CheckpointError(
                f"{self.key} of {self.name!r} is {self.tensor.dtype}, which cannot be stored; "
                "register the buffer with persistent=False, or keep it in another dtype"
            )
        label = f"{self.name}|{self.key}|{self.start}"
        return FragmentPlace(file, label, self.name, self.key, self.start, self.numel, _SPELLED[self.tensor.dtype])


def check_coverage(
    parameters: Mapping[str, tuple[int, ...]], keys: Mapping[str, tuple[str, ...]], places: Iterable[FragmentPlace]
) -> None:
    """Raises CheckpointError unless each element of each key of each parameter is in one fragment, and no other is."""
    spans: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for place in places:
        spans[place.parameter, place.key].append((place.start, place.start + place.numel))
    for name, shape in parameters.items():
        for key in keys[name]:
            end = 0
            # the empty span at the end closes the row of fragments
            for start, stop in [*sorted(spans.pop((name, key), [])), (prod(shape), prod(shape))]:
                if start != end:
                    wrong = "is missing" if start > end else "is there twice"
                    raise CheckpointError(
                        f"checkpoint: {key} of {name!r}: element {min(start, end)} {wrong}. "
                        "Either it was saved with another optimizer, or its table of fragments is damaged."
                    )
                end = stop
    for name, key in spans:
        raise CheckpointError(
            f"checkpoint: it holds {key} of {name!r}, which this run does not have. "
            "Go on with the optimizer it was saved with, or start a new run."
        )


def file_chunks(fragments: Iterable[Fragment]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file of these fragments: the header, then one tensor at a time."""
    fragments = list(fragments)
    header: dict[str, Any] = {}
    end = 0
    for fragment in fragments:
        place, begin = fragment.place(""), end
        end += fragment.numel * fragment.tensor.element_size()
        header[place.tensor] = {"dtype": place.dtype, "shape": [place.numel], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8 bytes
    yield struct.pack("<Q", len(text)) + text
    for fragment in fragments:
        yield bytes_of(fragment.tensor)


class Reader:
    """Slices of the state in a checkpoint's files: reads the bytes that are asked for and each file's header, once.

    Plain reads at an offset, no memory map: what is read is what arrives, and nothing of it stays behind.
    """

    def __init__(self, folder: Path, places: Iterable[FragmentPlace]) -> None:
        self._folder = folder
        self._files: dict[str, tuple[FileIO, int, dict[str, Any]]] = {}
        self._places: dict[tuple[str, str], list[FragmentPlace]] = defaultdict(list)
        for place in places:
            self._places[place.parameter, place.key].append(place)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        for file, _, _ in self._files.values():
            file.close()

    def read_into(self, target: Tensor, name: str, key: str, start: int) -> None:
        """Fill the 1-d `target` with elements [start, start + numel) of `key` of `name`, converted to its dtype.

        Raises OSError or ValueError when a file ends too early or is no safetensors file.
        """
        for place in self._places[name, key]:
            begin, end = max(start, place.start), min(start + target.numel(), place.start + place.numel)
            if begin < end:
                part = target[begin - start : end - start]
                dtype = _DTYPES[place.dtype]
                direct = part.dtype == dtype and part.device.type == "cpu" and part.is_contiguous()
                host = part if direct else torch.empty(end - begin, dtype=dtype)
                self._read(place, begin - place.start, bytes_of(host))
                if not direct:
                    part.copy_(host)

    def _read(self, place: FragmentPlace, first: int, into: memoryview) -> None:
        """Elements from `first` on of one stored fragment."""
        file, data, header = self._opened(place.file)
        file.seek(data + header[place.tensor]["data_offsets"][0] + first * _DTYPES[place.dtype].itemsize)
        while into:  # one call reads 2 GiB at most
            count = file.readinto(into)
            if not count:
                raise ValueError(f"{place.file} ends inside {place.tensor!r}")
            into = into[count:]

    def _opened(self, file: str) -> tuple[FileIO, int, dict[str, Any]]:
        """The file, where its data begins, and its header."""
        if file not in self._files:
            opened = FileIO(self._folder / file)
            [length] = struct.unpack("<Q", opened.read(8))
            self._files[file] = opened, 8 + length, json.loads(opened.read(length))
        return self._files[file]


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes in the host's memory: its own when it lies there in one piece, else a copy's."""
    return tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data
