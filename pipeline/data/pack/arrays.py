"""Images kept as rows of an array or a table -> pixels and classes in memory -> PNG, which loses nothing.

A file is read whole (.npy, .npz without pickle, .csv, .csv.gz), the class is taken from a column or from a file of
its own, and the rest of each row becomes one image. Nothing is guessed about the range of the values: they must be
whole numbers from 0 to 255, or become so by `scale`. What it gives up: arrays larger than memory, and classes in
words.
"""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from pipeline.data.pack.source import UNITS, Item, Source, fingerprint
from pipeline.data.pack.work import json_bytes
from pipeline.errors import DataError

SUFFIXES = (".npy", ".npz", ".csv", ".csv.gz")
IMAGE_NAMES = ("images", "x", "X", "data")
LABEL_NAMES = ("labels", "y", "target", "targets")
UNIT_BYTES = 4 << 20  # of pixels, about, that are made PNG by one thread at a time


@dataclass(frozen=True)
class Arrays:
    """Where in the arrays the pixels and the class are."""

    shape: tuple[int, ...] | None = (
        None  # of one image, (height, width) or (height, width, channels), when rows are flat
    )
    label: Literal["last", "first"] = "last"  # the column of the class, when the classes are not elsewhere
    labels: Path | None = None  # an .npy of its own for the classes
    scale: float = 1.0  # multiplies the values, which must then be whole and 0 to 255


def array_source(place: Path, arrays: Arrays) -> Source:
    """The rows of an array or table as {row number}.png and .cls. Raises DataError as `read_arrays` does."""
    files = [place] if arrays.labels is None else [place, arrays.labels]
    try:
        seen = fingerprint(files, ["arrays", arrays.shape, arrays.label, arrays.scale])
    except OSError as error:
        raise DataError(f"{place} cannot be read: {error}") from error
    pixels, _, distinct = _loaded(place, arrays, seen)
    renumbered: tuple[str, ...] = ()
    if not np.array_equal(distinct, np.arange(len(distinct))):
        renumbered = (
            f"the {len(distinct)} classes are numbered {distinct[0]} to {distinct[-1]} in {place.name} and 0 to "
            f"{len(distinct) - 1} in the shards; classes.json keeps the numbers of the source as names",
        )
    count = len(pixels)
    rows = max(1, UNIT_BYTES // pixels[0].nbytes, count // UNITS)
    classes = [str(value) for value in distinct]
    return Source(
        kind="arrays",
        place=place,
        units=[range(first, min(first + rows, count)) for first in range(0, count, rows)],
        read=partial(_read, place, arrays, seen),
        seen=seen,
        what="images",
        samples=count,
        classes=classes,
        beside={"classes.json": json_bytes(classes)},
        warnings=renumbered,
    )


def _read(place: Path, arrays: Arrays, seen: str, rows: range) -> Iterator[Item]:
    pixels, labels, _ = _loaded(place, arrays, seen)
    for i in rows:
        yield Item(f"{i:08d}", {"png": _png(pixels[i]), "cls": b"%d" % labels[i]}, label=int(labels[i]))


@lru_cache(maxsize=1)  # once in a process, whichever unit is read
def _loaded(place: Path, arrays: Arrays, seen: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels, for each image its place among the classes, and the classes as the source numbers them.

    seen: the fingerprint of the files, so that changed ones are read again.
    """
    pixels, values = read_arrays(place, arrays)
    distinct, labels = np.unique(values, return_inverse=True)
    return pixels, labels, distinct


def _png(image: np.ndarray) -> bytes:
    """PNG bytes of uint8[height, width] or [height, width, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def read_arrays(source: Path, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Read pixels uint8[n, height, width] or [n, height, width, 3] and classes int64[n] from one file.

    Raises DataError when the file is empty or unreadable, or when shape, values or classes do not fit together.
    """
    values, classes = _load(source)
    if arrays.labels is not None:
        classes = _load_numpy(arrays.labels)
    if values.ndim < 2 or not len(values):
        raise DataError(f"{source.name} has shape {values.shape}; images are expected as its rows, at least one")
    if classes is None and values.ndim > 2:
        raise DataError(
            f"{source.name} has shape {values.shape} and no class column; give the classes as an .npy (labels)"
        )
    if classes is None:
        column = 0 if arrays.label == "first" else values.shape[1] - 1
        classes, values = values[:, column], np.delete(values, column, axis=1)
    pixels = _pixels(source.name, values, arrays)
    whole = classes.astype(np.int64) if np.issubdtype(classes.dtype, np.number) else None
    if classes.shape != (len(values),) or whole is None or not np.array_equal(whole, classes):
        raise DataError(
            f"{source.name}: the classes ({classes.dtype}{list(classes.shape)}) must be one whole number for each of "
            f"the {len(values)} images; is the class in the {arrays.label} column?"
        )
    return pixels, whole


def _pixels(name: str, values: np.ndarray, arrays: Arrays) -> np.ndarray:
    """uint8[n, height, width] or [n, height, width, 3] from rows."""
    shape = arrays.shape or values.shape[1:]
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3)):
        side = int(np.sqrt(values[0].size))
        hint = f"{side}x{side}" if side * side == values[0].size else "HEIGHTxWIDTH or HEIGHTxWIDTHx3"
        raise DataError(f"{name}: one image has shape {tuple(shape)}; give its shape (such as {hint})")
    if int(np.prod(shape)) != values[0].size:
        text = "x".join(map(str, shape))
        raise DataError(
            f"{name}: {text} is {int(np.prod(shape))} values, but a row has {values[0].size} beside the class"
        )
    if not np.issubdtype(values.dtype, np.number):
        raise DataError(f"{name} holds {values.dtype}, not numbers")
    scaled = values if arrays.scale == 1 else values * arrays.scale
    low, high = float(scaled.min()), float(scaled.max())
    rounded = np.rint(scaled)
    if not (low >= 0 and high <= 255 and np.allclose(scaled, rounded, rtol=0, atol=1e-3)):  # a NaN fails here too
        raise DataError(
            f"{name}: pixel values go from {low:g} to {high:g}; they must be whole numbers from 0 to 255: "
            f"give a scale to multiply them with, such as {255 / high if high > 0 else 1:g}"
        )
    pixels = rounded.astype(np.uint8).reshape(len(values), *shape)
    return pixels[..., 0] if len(shape) == 3 and shape[2] == 1 else pixels


def _load(source: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Values and, where the file keeps them apart, classes."""
    name = source.name.lower()
    if name.endswith((".csv", ".csv.gz")):
        return _load_csv(source), None
    if name.endswith(".npy"):
        return _load_numpy(source), None
    if not name.endswith(".npz"):
        raise DataError(f"{source.name} is no array file; these are read: {', '.join(SUFFIXES)}")
    try:
        with np.load(source, allow_pickle=False) as archive:
            names = archive.files
            images = next((key for key in IMAGE_NAMES if key in names), None)
            labels = next((key for key in LABEL_NAMES if key in names), None)
            if images is None:
                raise DataError(
                    f"{source.name} holds {', '.join(names)}; the images are looked for as {', '.join(IMAGE_NAMES)}, "
                    f"the classes as {', '.join(LABEL_NAMES)}: save them as .npy and pack each part by itself"
                )
            return archive[images], archive[labels] if labels else None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{source} cannot be read: {error}") from error


def _load_numpy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as .npy: {error}") from error


def _load_csv(source: Path) -> np.ndarray:
    """float32[rows, columns]; a first line of words is taken for a header. Whole numbers up to 2**24 stay exact."""
    try:
        with gzip.open(source, "rt") if source.name.lower().endswith(".gz") else open(source) as file:
            first = file.readline()
            text = file if _is_header(first) else _chain(first, file)
            lines = [line for line in text if line.strip()]
        if not lines:
            raise DataError(f"{source.name} has no rows")
        return np.loadtxt(lines, delimiter=",", dtype=np.float32, ndmin=2)
    except (OSError, EOFError, ValueError) as error:  # ValueError: a ragged row or a word, named with its line by numpy
        raise DataError(f"{source.name} cannot be read as numbers separated by commas: {error}") from error


def _is_header(line: str) -> bool:
    try:
        float(line.split(",")[0] or "0")
    except ValueError:
        return True
    return False


def _chain(first: str, file: io.TextIOBase):
    yield first
    yield from file
