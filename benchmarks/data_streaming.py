"""mosaicml-streaming and litdata over the content of data.py: their formats, and reading them as each documents.

They are installed in a venv of their own (peers.txt); so nothing here may be imported at the top but numpy. Chunks
and shards are of 32 MB, images and rows are stored as bytes and decoded by Millstream's decoders ("equal"). "default"
is Pillow for mosaicml-streaming, its `jpeg` encoding. litdata's default for JPEGs, torchvision.io, loads with a CUDA
build of torch only; it decodes slower than simplejpeg, so litdata is measured at its better one. Tokens are MDS's
`ndarray` and litdata's TokensLoader, what each advises for them.

    python benchmarks/data_streaming.py FOLDER     writes both formats beside the tars in FOLDER
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from data_content import LENGTH, Content
from data_peers import PREFETCH, cropped, image, pillow_cropped, row
from peer_import import load

CHUNK_BYTES = 32_000_000
KINDS = ("images64", "images256", "tokens")


def write(folder: Path) -> None:
    """Both formats of every kind that is measured."""
    for kind in KINDS:
        content = Content(folder / kind)
        _write_mds(folder / kind, content)
        _write_litdata(folder / kind, content)


def _write_mds(folder: Path, content: Content) -> None:
    streaming = load("streaming")
    columns = {"data": "bytes", "cls": "int"}
    if folder.name == "tokens":
        columns = {"data": f"ndarray:uint16:{LENGTH}"}
    with streaming.MDSWriter(out=str(folder / "mds"), columns=columns, size_limit=CHUNK_BYTES) as writer:
        for number in range(len(content)):
            data, label = content.data(number), content.labels[number]
            sample = {"data": row(data)} if folder.name == "tokens" else {"data": bytes(data), "cls": label}
            writer.write(sample)


def _write_litdata(folder: Path, content: Content) -> None:
    litdata, is_tokens = load("litdata"), folder.name == "tokens"
    numbers = np.array_split(np.arange(len(content)), len(content.tars))
    loader = importlib.import_module("litdata.streaming.item_loader").TokensLoader(LENGTH) if is_tokens else None
    litdata.optimize(
        partial(_of_litdata, folder),
        numbers,
        str(folder / "litdata"),
        chunk_bytes=None if is_tokens else CHUNK_BYTES,
        chunk_size=CHUNK_BYTES // (2 * LENGTH) * LENGTH if is_tokens else None,
        num_workers=1,
        item_loader=loader,
        verbose=False,
    )


def _of_litdata(folder: Path, numbers: np.ndarray) -> Iterator[Any]:
    """Some samples as litdata is given them; runs in its process."""
    import torch

    content = Content(folder)
    for number in numbers.tolist():
        data = content.data(number)
        if folder.name == "tokens":
            yield torch.from_numpy(row(data).copy())
        else:
            yield {"data": bytes(data), "cls": content.labels[number]}


def mosaicml(kind: str, decoder: str, folder: Path, batch: int, workers: int) -> Generator[Any, None, None]:
    """decoder: "default", "equal" or "none"."""
    streaming = load("streaming")
    decode = _default_decoder(kind) if decoder == "default" else {"images64": image, "images224": cropped}.get(kind)

    class Decoded(streaming.StreamingDataset):
        def __getitem__(self, at: int) -> Any:
            sample = super().__getitem__(at)
            return decode(sample["data"]) if decode else sample["data"], sample.get("cls", 0)

    samples = Decoded(local=str(folder / "mds"), shuffle=True, batch_size=batch)
    keep: dict[str, Any] = {"prefetch_factor": PREFETCH, "persistent_workers": True} if workers else {}
    loader = streaming.StreamingDataLoader(samples, batch_size=batch, num_workers=workers, drop_last=True, **keep)
    try:
        while True:
            yield from (values[0] for values in loader)
    finally:  # it would outlive the process, which ends at once
        for path in Path("/dev/shm").glob(f"{samples._shm_prefix_int:06}_*"):
            path.unlink(missing_ok=True)


def _default_decoder(kind: str) -> Callable[[bytes], np.ndarray]:
    """What the `jpeg` encoding of MDS does, then an array."""
    decode = importlib.import_module("streaming.base.format.mds.encodings").mds_decode
    if kind == "images224":
        return lambda data: pillow_cropped(decode("jpeg", data))
    return lambda data: np.asarray(decode("jpeg", data))


def litdata(kind: str, folder: Path, batch: int, workers: int) -> Generator[Any, None, None]:
    """Samples shuffled in and over chunks; bytes are not collated."""
    library = load("litdata")
    decode = {"images64": image, "images224": cropped}.get(kind)
    of_set: dict[str, Any] = {}
    of_loader: dict[str, Any] = {"prefetch_factor": PREFETCH, "persistent_workers": True} if workers else {}
    if kind == "tokens":
        of_set["item_loader"] = importlib.import_module("litdata.streaming.item_loader").TokensLoader(LENGTH)
    elif decode:
        of_set["transform"] = lambda sample: (decode(sample["data"]), sample["cls"])
    else:
        of_loader["collate_fn"] = lambda samples: [sample["data"] for sample in samples]
    samples = library.StreamingDataset(str(folder / "litdata"), shuffle=True, drop_last=True, **of_set)
    loader = library.StreamingDataLoader(samples, batch_size=batch, num_workers=workers, drop_last=True, **of_loader)
    while True:
        yield from (values[0] if decode else values for values in loader)


CASES: dict[str, dict[str, Callable[[Path, int, int], Generator[Any, None, None]]]] = {
    "mosaicml-streaming": {
        **{kind: partial(mosaicml, kind, "equal") for kind in ("tokens", "images64", "images224")},
        **{kind: partial(mosaicml, kind, "none") for kind in ("bytes64", "bytes256")},
    },
    "mosaicml-streaming, Pillow": {kind: partial(mosaicml, kind, "default") for kind in ("images64", "images224")},
    "litdata": {kind: partial(litdata, kind) for kind in ("tokens", "images64", "images224", "bytes64", "bytes256")},
}

if __name__ == "__main__":
    os.environ.setdefault("DATA_OPTIMIZER_CACHE_FOLDER", str(Path(sys.argv[1]) / "cache"))
    write(Path(sys.argv[1]))
