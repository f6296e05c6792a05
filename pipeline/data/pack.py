"""Raw files -> WebDataset shards: folders of images, arrays of images (arrays.py), text (text.py).

Images keep their bytes: what was compressed once is not compressed again. Each is decoded once, before anything is
written, so that a bad file is found now and not in the middle of a run. Arrays become PNG, which loses nothing. Class
names go beside the shards (classes.json), class numbers into them. What it gives up: images without classes.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash
from PIL import Image, UnidentifiedImageError

from pipeline.data import arrays as arrays_module
from pipeline.data.arrays import Arrays, read_arrays
from pipeline.data.corpus import PATTERNS, find_files
from pipeline.data.decode import decode
from pipeline.data.text import Text, pack_text
from pipeline.data.writer import (
    MEMBER_BYTES,
    Packed,
    Packing,
    Progress,
    common,
    held_out,
    new_folder,
    silent,
    splits,
    write_card,
    write_json,
    write_split,
)
from pipeline.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
}  # by what the bytes are, whatever the name says
Kind = Literal["images", "arrays", "text"]


@dataclass(frozen=True)
class _Picture:
    """One image file that has been decoded and found good."""

    extension: str
    size_bytes: int
    digest: bytes


@dataclass(frozen=True)
class _Labelled:
    """Samples of one class each, ready to be held out and written."""

    kind: Kind
    source: Path
    names: list[str]  # what decides who is held out
    digests: list[bytes]
    labels: np.ndarray  # int64[n]: place in `classes`
    classes: list[str]
    fields: Callable[[int], tuple[str, dict[str, bytes]]]  # number -> key, {extension: bytes}
    sample_bytes: float  # mean, in the tar
    warnings: list[str]


def pack(
    source: Path,
    out: Path,
    packing: Packing,
    *,
    kind: Kind | None = None,
    arrays: Arrays | None = None,
    text: Text | None = None,
    progress: Progress = silent,
) -> Packed:
    """Pack `source` into OUT/train and, when something is held out, OUT/test.

    `kind` None: what `detect` finds. Raises DataError when `out` exists, when the source is empty or unclear, or when
    anything in it cannot be packed; nothing is left behind then.
    """
    text = text or Text()
    kind = kind or detect(source, text.patterns)
    if kind == "images":
        return pack_images(source, out, packing, progress=progress)
    if kind == "arrays":
        return pack_arrays(source, out, packing, arrays or Arrays(), progress=progress)
    return pack_text(source, out, packing, text, progress=progress)


def detect(source: Path, patterns: Sequence[str] = PATTERNS) -> Kind:
    """What `source` is, from its names alone. Raises DataError when it is nothing that can be packed, or two things."""
    if not source.exists():
        raise DataError(f"{source} does not exist; give the file or folder to pack")
    if source.is_file():
        if source.name.lower().endswith(arrays_module.SUFFIXES):
            return "arrays"
        if any(fnmatch(source.name, pattern) for pattern in patterns):
            return "text"
        known = " ".join([*arrays_module.SUFFIXES, *patterns])
        raise DataError(f"{source.name} is of no kind that is packed ({known}); say that it is text if it is")
    images, texts = sum(1 for _ in _image_files(source)), len(find_files(source, patterns))
    if not images and not texts:
        raise DataError(
            f"{source} holds nothing to pack: no images as {source.name}/<class>/*.jpg|jpeg|png|webp, "
            f"no text files ({' '.join(patterns)})"
        )
    # a README beside the images, or a few icons among source files, leave no doubt
    if min(images, texts) * 10 > max(images, texts):
        raise DataError(f"{source} holds {images} images and {texts} text files; say which to pack: images or text")
    return "images" if images > texts else "text"


def pack_images(source: Path, out: Path, packing: Packing, *, progress: Progress = silent) -> Packed:
    """Pack SOURCE/<class>/*.png|jpg|jpeg|webp as {key}.jpg (or png, webp: what it really is) and {key}.cls.

    The key is class/name in plain ASCII. Classes are numbered in the order of their names. Raises DataError naming the
    files that do not decode.
    """
    paths = sorted(_image_files(source)) if source.is_dir() else []
    if not paths:
        raise DataError(f"no images in {source}; they are looked for as {source.name}/<class>/*.jpg|jpeg|png|webp")
    with new_folder(out) as folder:
        pictures = _checked(source, paths, packing.threads, progress)
        classes = sorted({path.parent.name for path in paths})
        labels = np.array([classes.index(path.parent.name) for path in paths])
        keys = _keys(paths)

        def fields(i: int) -> tuple[str, dict[str, bytes]]:
            return keys[i], {pictures[i].extension: paths[i].read_bytes(), "cls": b"%d" % labels[i]}

        labelled = _Labelled(
            kind="images",
            source=source,
            names=[path.relative_to(source).as_posix() for path in paths],
            digests=[picture.digest for picture in pictures],
            labels=labels,
            classes=classes,
            fields=fields,
            sample_bytes=2 * MEMBER_BYTES + float(np.mean([picture.size_bytes for picture in pictures])),
            warnings=_left_out(source, paths),
        )
        samples, warnings = _write(folder, labelled, packing, progress)
    return Packed(out, samples, warnings)


def pack_arrays(source: Path, out: Path, packing: Packing, arrays: Arrays, *, progress: Progress = silent) -> Packed:
    """Pack the rows of an array or table as {row number}.png and .cls. Raises DataError as `read_arrays` does."""
    with new_folder(out) as folder:
        progress("read", 0, 1)
        pixels, values = read_arrays(source, arrays)
        progress("read", 1, 1)
        distinct, labels = np.unique(values, return_inverse=True)
        renumbered: list[str] = []
        if not np.array_equal(distinct, np.arange(len(distinct))):
            renumbered.append(
                f"the {len(distinct)} classes are numbered {distinct[0]} to {distinct[-1]} in {source.name} and 0 to "
                f"{len(distinct) - 1} in the shards; classes.json keeps the numbers of the source as names"
            )

        some = pixels[:: max(1, len(pixels) // 64)]

        def fields(i: int) -> tuple[str, dict[str, bytes]]:
            return f"{i:08d}", {"png": _png(pixels[i]), "cls": b"%d" % labels[i]}

        labelled = _Labelled(
            kind="arrays",
            source=source,
            names=[f"{i:08d}" for i in range(len(pixels))],
            digests=[xxhash.xxh3_128_digest(image.tobytes()) for image in pixels],
            labels=labels,
            classes=[str(value) for value in distinct],
            fields=fields,
            sample_bytes=2 * MEMBER_BYTES + float(np.mean([len(_png(image)) for image in some])),
            warnings=renumbered,
        )
        samples, warnings = _write(folder, labelled, packing, progress)
    return Packed(out, samples, warnings)


def _write(
    folder: Path, labelled: _Labelled, packing: Packing, progress: Progress
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Hold out, shuffle, write all splits: samples by split, warnings."""
    mask = held_out(labelled.names, packing.holdout)
    warnings = [*labelled.warnings, *common(labelled.digests, mask)]
    if len(labelled.classes) == 1:
        warnings.append(
            f"there is one class only ({labelled.classes[0]}): nothing can be learned from it by classification"
        )
    unseen = sorted(set(labelled.labels.tolist()) - set(labelled.labels[~mask].tolist()))
    if unseen:
        names = ", ".join(labelled.classes[label] for label in unseen)
        warnings.append(f"no sample to train on is left of: {names}; hold out fewer")
    parts = splits(mask, packing)
    for name, numbers in parts.items():
        samples = (labelled.fields(int(i)) for i in numbers)
        write_split(folder / name, samples, len(numbers), labelled.sample_bytes, packing, progress)
        write_json(folder / name / "classes.json", labelled.classes)
        counts = np.bincount(labelled.labels[numbers], minlength=len(labelled.classes)).tolist()
        facts = {"samples": len(numbers), "classes": dict(zip(labelled.classes, counts)), "warnings": warnings}
        write_card(folder / name, labelled.kind, labelled.source, packing, facts)
    return {name: len(numbers) for name, numbers in parts.items()}, tuple(warnings)


def _image_files(source: Path) -> Iterator[Path]:
    """SOURCE/<class>/<image>; hidden files and folders (.DS_Store, ._photo.jpg) are no data."""
    return (path for path in source.glob("[!.]*/[!.]*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _left_out(source: Path, packed: Sequence[Path]) -> list[str]:
    """A warning for files below `source` that were not packed, by what they are."""
    taken = set(packed)
    files = (
        path for path in source.rglob("*") if path not in taken and not path.name.startswith(".") and path.is_file()
    )
    left = Counter(path.suffix.lower() or "no suffix" for path in files)
    if not left:
        return []
    kinds = ", ".join(f"{count} x {suffix}" for suffix, count in left.most_common(5))
    return [f"not packed, since they are not {source.name}/<class>/*.jpg|jpeg|png|webp: {kinds}"]


def _checked(source: Path, paths: Sequence[Path], threads: int, progress: Progress) -> list[_Picture]:
    """Decode every image once. Raises DataError naming those that are bad."""
    pictures: list[_Picture] = []
    bad: list[str] = []
    with ThreadPoolExecutor(threads) as pool:
        for i, checked in enumerate(pool.map(_check, paths)):
            progress("check", i + 1, len(paths))
            if isinstance(checked, _Picture):
                pictures.append(checked)
            else:
                bad.append(f"{paths[i].relative_to(source)}: {checked}")
    if bad:
        listed = "\n  ".join(bad[:10] + ([f"and {len(bad) - 10} more"] if len(bad) > 10 else []))
        raise DataError(f"{len(bad)} of {len(paths)} images in {source} are bad; mend or remove them:\n  {listed}")
    return pictures


def _check(path: Path) -> _Picture | str:
    """What the file is, or what is wrong with it."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            extension = EXTENSIONS[image.format or ""]
        decode(extension, data)
    except UnidentifiedImageError:
        return "is neither JPEG, PNG nor WebP" if path.stat().st_size else "is empty"
    except (DataError, OSError, ValueError, Image.DecompressionBombError) as error:
        return str(error)
    return _Picture(extension, len(data), xxhash.xxh3_128_digest(data))


def _keys(paths: Sequence[Path]) -> list[str]:
    """class/name of each image in ASCII that every tar reader takes, without dots, each different from all others."""
    keys: list[str] = []
    seen: set[str] = set()
    for path in paths:
        name = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)[:80]
        key = plain = f"{re.sub(r'[^A-Za-z0-9_-]', '_', path.parent.name)[:60]}/{name}"
        again = 2
        while key in seen:
            key, again = f"{plain}-{again}", again + 1
        seen.add(key)
        keys.append(key)
    return keys


def _png(image: np.ndarray) -> bytes:
    """PNG bytes of uint8[height, width] or [height, width, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
