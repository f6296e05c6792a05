"""Flat pieces of a model's state in safetensors files: written as a stream, read by the slice, each element once.

The files are ordinary safetensors; any library that reads those reads these. They are written here rather than by the
library so that one tensor at a time passes through memory, and through the hash, on its way to the disk. Nothing here
knows DeepSpeed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.checkpoint.manifest import FragmentPlace
from pipeline.errors import CheckpointError
from pipeline.models.tensor_file import DTYPES, SPELLED, Place, header, read_header


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
        if self.tensor.dtype not in SPELLED:
            raise CheckpointError(
                f"{self.key} of {self.name!r} is {self.tensor.dtype}, which cannot be stored; "
                "register the buffer with persistent=False, or keep it in another dtype"
            )
        label = f"{self.name}|{self.key}|{self.start}"
        return FragmentPlace(file, label, self.name, self.key, self.start, self.numel, SPELLED[self.tensor.dtype])


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
    tensors = {fragment.place("").tensor: (fragment.tensor.dtype, (fragment.numel,)) for fragment in fragments}
    yield header(tensors)[0]
    for fragment in fragments:
        yield bytes_of(fragment.tensor)


class Reader:
    """Slices of the state in a checkpoint's files: reads the bytes that are asked for and each file's header, once.

    Plain reads at an offset, no memory map: what is read is what arrives, and nothing of it stays behind.
    """

    def __init__(self, folder: Path, places: Iterable[FragmentPlace]) -> None:
        self._folder = folder
        self._files: dict[str, tuple[FileIO, dict[str, Place]]] = {}
        self._places: dict[tuple[str, str], list[FragmentPlace]] = defaultdict(list)
        for place in places:
            self._places[place.parameter, place.key].append(place)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        for file, _ in self._files.values():
            file.close()

    def read_into(self, target: Tensor, name: str, key: str, start: int) -> None:
        """Fill the 1-d `target` with elements [start, start + numel) of `key` of `name`, converted to its dtype.

        Raises OSError or ValueError when a file ends too early or is no safetensors file.
        """
        for place in self._places[name, key]:
            begin, end = max(start, place.start), min(start + target.numel(), place.start + place.numel)
            if begin < end:
                part = target[begin - start : end - start]
                dtype = DTYPES[place.dtype]
                direct = part.dtype == dtype and part.device.type == "cpu" and part.is_contiguous()
                host = part if direct else torch.empty(end - begin, dtype=dtype)
                self._read(place, begin - place.start, bytes_of(host))
                if not direct:
                    part.copy_(host)

    def _read(self, place: FragmentPlace, first: int, into: memoryview) -> None:
        """Elements from `first` on of one stored fragment."""
        file, places = self._opened(place.file)
        file.seek(places[place.tensor].begin + first * DTYPES[place.dtype].itemsize)
        while into:  # one call reads 2 GiB at most
            count = file.readinto(into)
            if not count:
                raise ValueError(f"{place.file} ends inside {place.tensor!r}")
            into = into[count:]

    def _opened(self, file: str) -> tuple[FileIO, dict[str, Place]]:
        """The file, and where its tensors lie."""
        if file not in self._files:
            opened = FileIO(self._folder / file)
            self._files[file] = opened, read_header(opened)
        return self._files[file]


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes in the host's memory: its own when it lies there in one piece, else a copy's."""
    return tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data
