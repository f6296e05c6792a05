"""webdataset and torch's DataLoader over the content of data.py, each with the settings that it documents as fastest.

webdataset: shards shuffled, a shuffle buffer of 1,000, WebLoader with batches made in the workers. Its default
decoders are Pillow for images and numpy's reader for npy; "equal" ones are those of Millstream: simplejpeg, a view of
the bytes. DataLoader: a map-style data set that slices mapped tars at places known beforehand, shuffled by its sampler.
Worker processes live on over epochs and prefetch 4 batches each.

Every function yields batches for ever: (folder, batch, workers) -> arrays or tensors, or lists of bytes.
"""

from __future__ import annotations

import importlib
import io
import math
import random
from collections.abc import Callable, Generator, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from data_content import MEMBER_ROWS, Content, tars
from PIL import Image

BUFFER = 1000  # samples in webdataset's shuffle buffer, as in its examples
PREFETCH = 4
CROP = 224
NPY_HEADER = 128  # bytes, of every npy here


def row(data: bytes | memoryview) -> np.ndarray:
    """uint16[1024], a view."""
    return np.frombuffer(data, np.uint16, offset=NPY_HEADER)


def rows(data: bytes | memoryview) -> np.ndarray:
    """uint16[512, 1024], a view."""
    return row(data).reshape(MEMBER_ROWS, -1)


def image(data: bytes | memoryview) -> np.ndarray:
    """uint8[height, width, 3]"""
    return simplejpeg.decode_jpeg(data, "RGB")


def cropped(data: bytes | memoryview) -> np.ndarray:
    """uint8[224, 224, 3] by the same decoder and the same crop as Millstream's side."""
    from pipeline.data.augment import random_resized_crop

    return random_resized_crop(image(data), CROP, _generator())


def pillow(data: bytes | memoryview) -> np.ndarray:
    """uint8[height, width, 3] by Pillow."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def pillow_cropped(picture: Image.Image) -> np.ndarray:
    """uint8[224, 224, 3]: torchvision's RandomResizedCrop on a picture of Pillow, without torchvision's own cost."""
    for _ in range(10):
        area = picture.width * picture.height * random.uniform(0.08, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if width <= picture.width and height <= picture.height:
            left, top = random.randint(0, picture.width - width), random.randint(0, picture.height - height)
            box = (left, top, left + width, top + height)
            return np.asarray(picture.resize((CROP, CROP), Image.Resampling.BILINEAR, box=box))
    return np.asarray(picture.resize((CROP, CROP), Image.Resampling.BILINEAR))


def webdataset(kind: str, decoder: str, folder: Path, batch: int, workers: int) -> Generator[Any, None, None]:
    """decoder: "default", "equal", "none"; for packed members also "rows", which are shuffled one by one."""
    wds: Any = importlib.import_module("webdataset")
    samples = wds.WebDataset([str(path) for path in tars(folder)], shardshuffle=100)
    field = "npy" if kind in ("tokens", "packed") else "jpg"
    if decoder == "rows":
        samples = samples.compose(_single_rows)
    samples = samples.shuffle(BUFFER)
    if decoder == "default":
        samples = samples.decode({"images64": "rgb8", "images224": "pil"}.get(kind, "rgb8"))
        if kind == "images224":
            samples = samples.map_dict(jpg=pillow_cropped)
    elif decoder == "equal":
        equal = {"images64": image, "images224": cropped, "tokens": row, "packed": rows}[kind]
        samples = samples.map_dict(**{field: equal} | ({"cls": int} if field == "jpg" else {}))
    samples = samples.to_tuple(*((field, "cls") if field == "jpg" else (field,))).batched(batch)
    keep: dict[str, Any] = {"prefetch_factor": PREFETCH, "persistent_workers": True} if workers else {}
    loader = wds.WebLoader(samples, batch_size=None, num_workers=workers, **keep)
    while True:
        yield from (values[0] for values in loader)


def _single_rows(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for sample in samples:
        yield from ({"__key__": sample["__key__"], "npy": single} for single in rows(sample["npy"]))


class MapStyle:
    """What torch.utils.data calls a map-style data set: one sample by its number, decoded as Millstream does."""

    def __init__(self, folder: Path, decode: Callable[[memoryview], Any]) -> None:
        self.content, self.decode = Content(folder), decode

    def __len__(self) -> int:
        return len(self.content)

    def __getitem__(self, number: int) -> Any:
        return self.decode(self.content.data(number))


class Labelled(MapStyle):
    """With its class."""

    def __getitem__(self, number: int) -> tuple[Any, int]:
        return self.decode(self.content.data(number)), self.content.labels[number]


def dataloader(kind: str, folder: Path, batch: int, workers: int) -> Generator[Any, None, None]:
    """The default collation stacks, for bytes it makes lists."""
    from torch.utils.data import DataLoader

    decode = {"images64": image, "images224": cropped, "tokens": row, "bytes64": bytes, "bytes256": bytes}[kind]
    keep: dict[str, Any] = {"prefetch_factor": PREFETCH, "persistent_workers": True} if workers else {}
    samples: Any = (Labelled if kind.startswith("images") else MapStyle)(folder, decode)
    loader: Any = DataLoader(samples, batch, shuffle=True, num_workers=workers, drop_last=True, **keep)
    while True:
        yield from (values[0] if kind.startswith("images") else values for values in loader)


@lru_cache(maxsize=1)
def _generator() -> np.random.Generator:
    """One for all samples of a process: the cheapest there is, and all that the peers promise."""
    return np.random.default_rng()


CASES: dict[str, dict[str, Callable[[Path, int, int], Generator[Any, None, None]]]] = {
    "webdataset": {
        **{kind: partial(webdataset, kind, "default") for kind in ("tokens", "packed", "images64", "images224")},
        **{kind: partial(webdataset, kind, "none") for kind in ("bytes64", "bytes256")},
    },
    "webdataset, equal decoder": {
        kind: partial(webdataset, kind, "equal") for kind in ("tokens", "packed", "images64", "images224")
    },
    "webdataset, rows": {"packed": partial(webdataset, "packed", "rows")},
    "DataLoader": {
        kind: partial(dataloader, kind) for kind in ("tokens", "images64", "images224", "bytes64", "bytes256")
    },
}
