"""Folders of images or sounds by class -> samples: SOURCE/<class>/*.jpg, SOURCE/<class>/*.wav.

Files keep their bytes: what was compressed once is not compressed again. Each is decoded once, before anything is
written, so that a bad file is found now and not in the middle of a run. The extension in the shards says what the bytes
are, whatever the name says. What it gives up: files without a class, and classes in folders of folders.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from pipeline.data.decode import MAX_BYTES, decode
from pipeline.data.pack.source import Bad, Item, Source, fingerprint, grouped, plain_keys
from pipeline.data.pack.work import json_bytes
from pipeline.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SOUND_SUFFIXES = (".wav", ".flac", ".ogg")
SUFFIXES = {"images": IMAGE_SUFFIXES, "audio": SOUND_SUFFIXES}
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's names of formats
STARTS = {b"RIFF": "wav", b"fLaC": "flac", b"OggS": "ogg"}  # first bytes of a sound


class _File(NamedTuple):
    path: Path
    name: str  # relative to the source, with slashes
    key: str
    label: int


def folder_source(place: Path, kind: str) -> Source:
    """kind: "images" or "audio". Raises DataError when there are none.

    Keys are class/name in plain ASCII. Classes are numbered in the order of their names.
    """
    shown = "|".join(suffix[1:] for suffix in SUFFIXES[kind])
    paths = sorted(class_files(place, kind)) if place.is_dir() else []
    if not paths:
        what = "images" if kind == "images" else "sounds"
        raise DataError(f"no {what} in {place}; they are looked for as {place.name}/<class>/*.{shown}")
    classes = sorted({path.parent.name for path in paths})
    number = {name: label for label, name in enumerate(classes)}
    keys = plain_keys((path.parent.name, path.stem) for path in paths)
    names = [path.relative_to(place).as_posix() for path in paths]
    files = [_File(path, name, key, number[path.parent.name]) for path, name, key in zip(paths, names, keys)]
    return Source(
        kind=kind,
        place=place,
        units=grouped(files, [path.stat().st_size for path in paths]),
        read=partial(_read, kind),
        seen=fingerprint(paths, kind),
        what="images" if kind == "images" else "sounds",
        samples=len(paths),
        classes=classes,
        beside={"classes.json": json_bytes(classes)},
        warnings=_left_out(place, paths, shown),
    )


def class_files(place: Path, kind: str) -> Iterator[Path]:
    """SOURCE/<class>/<file>; hidden files and folders (.DS_Store, ._photo.jpg) are no data."""
    suffixes = SUFFIXES[kind]
    return (path for path in place.glob("[!.]*/[!.]*") if path.suffix.lower() in suffixes and path.is_file())


def _left_out(place: Path, packed: Sequence[Path], shown: str) -> tuple[str, ...]:
    """A warning for files below `place` that were not packed, by what they are."""
    taken = set(packed)
    files = (
        path for path in place.rglob("*") if path not in taken and not path.name.startswith(".") and path.is_file()
    )
    left = Counter(path.suffix.lower() or "no suffix" for path in files)
    if not left:
        return ()
    kinds = ", ".join(f"{count} x {suffix}" for suffix, count in left.most_common(5))
    return (f"not packed, since they are not {place.name}/<class>/*.{shown}: {kinds}",)


def _read(kind: str, files: Sequence[_File]) -> Iterator[Item | Bad]:
    for file in files:
        try:
            if file.path.stat().st_size > MAX_BYTES:
                raise DataError(f"is over {MAX_BYTES} bytes, which no reader decodes; make it smaller")
            data = file.path.read_bytes()
            extension = image_extension(data) if kind == "images" else _sound_extension(data)
            decode(extension, data)
        except (DataError, OSError, ValueError, Image.DecompressionBombError) as error:
            yield Bad(file.name, str(error))
        else:
            yield Item(file.key, {extension: data, "cls": b"%d" % file.label}, file.name, file.label)


def image_extension(data: bytes) -> str:
    """jpg, png or webp, by the bytes. DataError when it is none of them."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            return EXTENSIONS[image.format or ""]
    except UnidentifiedImageError:
        raise DataError("is neither JPEG, PNG nor WebP" if data else "is empty") from None


def _sound_extension(data: bytes) -> str:
    if extension := STARTS.get(data[:4]):
        return extension
    raise DataError("is neither wav, flac nor ogg" if data else "is empty")
