"""The content that all loaders of data.py read: the same bytes as tars, as MDS, as litdata's chunks, as one flat file.

    images64    JPEG of 64 x 64 pixels, 2.1 kB, and a class             .jpg .cls
    images256   JPEG of 256 to 400 pixels each way, 26 kB, and a class  .jpg .cls
    tokens      a row of 1,024 uint16 per member                        .npy, and tokens.bin for np.memmap
    packed      the same rows, 512 to a member                          .npy

The images are cut from photographs that come with scikit-image and scikit-learn, with noise, so that they cost a
decoder what real ones do; without these packages (toy size only) from smooth noise. All of it follows from a seed.
`members` and `labels` beside the tars say where each sample lies, for loaders that have no index of their own.
What it gives up: everything fits into the page cache.
"""

from __future__ import annotations

import io
import json
import mmap
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 1  # of what is written; another one is written anew
LENGTH, VOCABULARY, MEMBER_ROWS = 1024, 50257, 512
CLASSES = 1000
QUALITY, NOISE = {"images64": 88, "images256": 84}, {"images64": 8.0, "images256": 3.0}  # 2.1 kB and 26 kB each
SHARDS = {  # size -> kind -> shards, samples in each
    "full": {"images64": (20, 2500), "images256": (10, 500), "tokens": (20, 5000), "packed": (5, 39)},
    "toy": {"images64": (2, 40), "images256": (2, 12), "tokens": (2, 1024), "packed": (2, 2)},
}
PHOTOGRAPHS = [
    "astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel",
    "hubble_deep_field", "ihc", "moon", "motorcycle_left", "motorcycle_right",
    "retina", "rocket", "china", "flower",
]  # fmt: skip


class Content:
    """One kind of content: its samples' bytes by number, as a person's own map-style data set would have them.

    members: (shard, offset, length) of the first field.  labels: class of each.  Buffers are private, so writable:
    torch takes them as they are, and warns about others.
    """

    def __init__(self, folder: Path) -> None:
        self.members: list[tuple[int, int, int]] = np.load(folder / "members.npy").tolist()
        self.labels: list[int] = np.load(folder / "labels.npy").tolist()
        self.tars: list[memoryview] = []
        for path in tars(folder):
            with path.open("rb") as file:
                self.tars.append(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)))

    def __len__(self) -> int:
        return len(self.members)

    def data(self, number: int) -> memoryview:
        """The bytes of the first field."""
        shard, offset, length = self.members[number]
        return self.tars[shard][offset : offset + length]


def tars(folder: Path) -> list[Path]:
    """The shards of one kind, by name."""
    return sorted((folder / "tar").glob("*.tar"))


def make(data: Path, size: str, photographs: Path | None, formats: Callable[[Path], None] | None) -> Path:
    """Write what is missing below DATA/SIZE and return that; `formats` adds the peers' own formats to it, once."""
    from pipeline.data import index

    folder = data / size
    note = folder / "content.json"
    facts = {"version": VERSION, "photographs": photographs is not None}
    if not note.exists() or json.loads(note.read_text()) != facts:
        shutil.rmtree(folder, ignore_errors=True)
        _write(folder, size, photographs)
        note.write_text(json.dumps(facts))
    for kind in SHARDS[size]:
        index.build(folder / kind / "tar")  # always: its format may be another one now
    if formats and not (folder / "formats").exists():
        formats(folder)
        (folder / "formats").touch()
    return folder


def _write(folder: Path, size: str, photographs: Path | None) -> None:
    """All kinds as tars, and the flat file."""
    rows = _rows(SHARDS[size]["tokens"])
    sources = _photographs(photographs) if photographs else _smooth(np.random.default_rng(0))
    makers: dict[str, Callable[[int], tuple[dict[str, bytes], int]]] = {
        "images64": _images("images64", sources, (64, 64), size=64),
        "images256": _images("images256", sources, (256, 400), size=None),
        "tokens": lambda number: ({"npy": _npy(rows[number])}, 0),
        "packed": lambda number: ({"npy": _npy(rows[number * MEMBER_ROWS : (number + 1) * MEMBER_ROWS])}, 0),
    }
    for kind, maker in makers.items():
        _write_tars(folder / kind, *SHARDS[size][kind], maker)
    rows.tofile(folder / "tokens.bin")


def _write_tars(folder: Path, shards: int, samples: int, maker: Callable[[int], tuple[dict[str, bytes], int]]) -> None:
    """`shards` tars of `samples` each, and where the samples lie."""
    (folder / "tar").mkdir(parents=True)
    members, labels = [], []
    for shard in range(shards):
        with tarfile.open(folder / "tar" / f"{shard:04d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(shard * samples, (shard + 1) * samples):
                fields, label = maker(number)
                members.append((shard, tar.offset + tarfile.BLOCKSIZE, len(next(iter(fields.values())))))
                labels.append(label)
                for extension, data in fields.items():
                    member = tarfile.TarInfo(f"{number:08d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    np.save(folder / "members.npy", np.array(members, np.int64))
    np.save(folder / "labels.npy", np.array(labels, np.int64))


def _rows(shape: tuple[int, int]) -> np.ndarray:
    """uint16[rows, LENGTH] of tokens."""
    return np.random.default_rng(1).integers(0, VOCABULARY, (shape[0] * shape[1], LENGTH), dtype=np.uint16)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _images(
    kind: str, sources: list[Any], sides: tuple[int, int], size: int | None
) -> Callable[[int], tuple[dict[str, bytes], int]]:
    """A maker of JPEGs: a piece of a photograph, `sides` pixels or (with `size`) any share of it, then noise."""
    from PIL import Image

    def make_one(number: int) -> tuple[dict[str, bytes], int]:
        rng = np.random.default_rng([2, size or 0, number])
        source = sources[int(rng.integers(len(sources)))]
        if size:
            width = height = int(rng.integers(size, min(source.size) // 2 + 1))
        else:
            width, height = (min(int(rng.integers(sides[0], sides[1] + 1)), side) for side in source.size)
        left = int(rng.integers(source.width - width + 1))
        top = int(rng.integers(source.height - height + 1))
        piece = source.crop((left, top, left + width, top + height))
        if size:
            piece = piece.resize((size, size), Image.Resampling.BILINEAR)
        pixels = np.asarray(piece) + rng.normal(0, NOISE[kind], (*piece.size[::-1], 3))
        buffer = io.BytesIO()
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        picture.save(buffer, "JPEG", quality=QUALITY[kind], subsampling="4:2:0")
        label = int(rng.integers(CLASSES))
        return {"jpg": buffer.getvalue(), "cls": b"%d" % label}, label

    return make_one


def _photographs(folder: Path) -> list[Any]:
    """The pictures of PHOTOGRAPHS below `folder` in colour, none with a side under 300 pixels."""
    from PIL import Image

    found = {path.stem: path for path in sorted(folder.rglob("*")) if path.suffix in (".png", ".jpg")}
    pictures = []
    for name in PHOTOGRAPHS:
        with Image.open(found[name]) as image:
            picture = image.convert("RGB")
        scale = max(1.0, 400 / min(picture.size))
        pictures.append(picture.resize((round(picture.width * scale), round(picture.height * scale))))
    return pictures


def _smooth(rng: np.random.Generator) -> list[Any]:
    """Pictures of smooth noise, where there are no photographs."""
    from PIL import Image

    coarse = rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(picture).resize((512, 512), Image.Resampling.BICUBIC) for picture in coarse]


def shuffled(samples: int, batch: int) -> Iterator[list[int]]:
    """Numbers of `batch` samples at a time in a random order, for ever: how the limits and map-style sets are read."""
    rng = np.random.default_rng(3)
    while True:
        order = rng.permutation(samples).tolist()
        yield from (order[place : place + batch] for place in range(0, samples - batch + 1, batch))
