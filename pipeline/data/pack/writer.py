"""Writes a finished data set folder: shards, index and card, all or nothing, and again from where it stopped.

A source says how many samples there are and yields them; here they are held out, put in order, cut into ordinary
WebDataset tars, indexed and moved into place by one rename (work.py). The same source and options give the same bytes,
also when the packing was killed on its way: a shard is whole or absent, and those that are there are kept.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import index
from pipeline.data.pack.pieces import end, piece
from pipeline.data.pack.work import json_bytes
from pipeline.data.parallel import Mapping as Over
from pipeline.data.root import ROOT
from pipeline.data.storage import find_shards
from pipeline.errors import DataError
from pipeline.whole_file import put

MEMBER_BYTES = 768  # a tar member beside its data: a header of 512, and padding to a block of 512, on average

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) while packing; `stage` is a word to show, such as "write train"."""


@dataclass(frozen=True)
class Packing:
    """How a data set is written, whatever it is made of."""

    holdout: float = 0.0  # of the samples (text: documents): below 1 a share, from 1 on a number of them
    seed: int = 0  # of the shuffle
    shuffle: bool = True
    shard_bytes: int = 32 << 20  # about, before compression
    min_shards: int = 4  # per split, so that small sets can be read from several places too
    threads: int = 1  # for checking and encoding; changes nothing in the result
    licence: str | None = None  # of the source, kept in the card
    origin: str | None = None  # of the source, in words for the card; None: its name
    command: str | None = None  # that packs it again, kept in the card


@dataclass(frozen=True)
class Packed:
    """What has been written: `samples` by split ("train", "test"), and what a person should know about it."""

    folder: Path
    samples: dict[str, int]
    warnings: tuple[str, ...]


def silent(stage: str, done: int, total: int) -> None:
    """The progress of a caller that shows none."""


def plan(packing: Packing, source: str) -> dict[str, Any]:
    """All that the bytes of a data set follow from. source: its files, their sizes and times, how they are read."""
    names = ("holdout", "seed", "shuffle", "shard_bytes", "min_shards")
    options = {name: value for name, value in asdict(packing).items() if name in names}
    return {"format": 1, "source": source, **options}


def held_out(keys: Sequence[str], holdout: float, what: str = "samples") -> np.ndarray:
    """Which of `keys` are held out for the test set: bool[n]; see `lowest`."""
    return lowest(np.array([name_hash(key) for key in keys], np.uint64), holdout, what)


def lowest(hashes: np.ndarray, holdout: float, what: str = "samples") -> np.ndarray:
    """Which samples are held out for the test set: bool[n], from the hashes uint64[n] of their keys.

    Exactly round(holdout * n) of them (or `holdout` itself from 1 on): those whose key has the lowest hash. So the
    choice follows from the keys alone, and a sample keeps its side for as long as its neighbours in hash order stay.
    Samples of one hash (what is kept together) stand on one side, so there may be more of them than asked for.
    """
    n = len(hashes)
    if holdout < 0 or (holdout >= 1 and holdout != int(holdout)):
        raise DataError(f"holdout {holdout:g} is neither a share between 0 and 1 nor a whole number of {what}")
    count = int(holdout) if holdout >= 1 else round(holdout * n)
    if count >= n:
        raise DataError(f"holdout {holdout:g} takes {count} of {n} {what} and leaves none to train on; hold out fewer")
    if holdout and not count:
        raise DataError(f"holdout {holdout:g} of {n} {what} is none; hold out a number of them, or pack more {what}")
    if not count:
        return np.zeros(n, dtype=bool)
    mask = hashes <= np.partition(hashes, count - 1)[count - 1]
    if mask.all():
        raise DataError(
            f"holdout {holdout:g} leaves no {what} to train on: those kept together are too many; hold out fewer"
        )
    return mask


def name_hash(name: str) -> int:
    """64 bits that decide who is held out, from the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


def splits(mask: np.ndarray, packing: Packing) -> dict[str, np.ndarray]:
    """The sample numbers of each split in the order in which they are written: {"train": int64[...], "test": ...}."""
    parts = {"train": np.flatnonzero(~mask), "test": np.flatnonzero(mask)}
    return {name: numbers[permutation(len(numbers), packing)] for name, numbers in parts.items() if len(numbers)}


def permutation(n: int, packing: Packing) -> np.ndarray:
    """The order in which n samples are written, int64[n]; from Philox's raw bits, equal in all versions of numpy."""
    if not packing.shuffle:
        return np.arange(n)
    key = np.array([packing.seed % 2**64, 0], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")


def common(digests: Sequence[bytes], mask: np.ndarray, what: str = "samples") -> list[str]:
    """A warning when held-out samples are, byte for byte, among the training samples too: they measure memory."""
    seen = {digest for digest, held in zip(digests, mask) if not held}
    twice = sum(digest in seen for digest, held in zip(digests, mask) if held)
    if not twice:
        return []
    return [f"{twice} of the {int(mask.sum())} held-out {what} are also, byte for byte, among the training {what}"]


def write_split(
    folder: Path,
    samples: Iterator[tuple[str, Mapping[str, bytes]]],
    count: int,
    sample_bytes: float,
    packing: Packing,
    progress: Progress,
) -> None:
    """Write `count` samples (key, {extension: bytes}), of about `sample_bytes` each, into a `folder`; index it.

    Shards that are there already are kept, and their samples passed over.
    """
    folder.mkdir(exist_ok=True)
    shards, done = shard_count(count, count * sample_bytes, packing), 0
    for shard in range(shards):
        path, first, last = shard_path(folder, shard), done, (shard + 1) * count // shards
        chosen = islice(samples, last - first)
        if path.exists():
            done += sum(1 for _ in chosen)
        else:
            put(path, ended(_reported(chosen, f"write {folder.name}", first, count, progress)))
            done = last
        progress(f"write {folder.name}", done, count)
    build_index(folder, progress=progress)


def shard_count(samples: int, size: float, packing: Packing) -> int:
    """In how many shards `samples` samples of `size` bytes in all are written."""
    return min(max(packing.min_shards, int(np.ceil(size / packing.shard_bytes)), 1), samples)


def shard_path(folder: Path, shard: int) -> Path:
    """Of one shard of a split."""
    return folder / f"{folder.name}-{shard:06d}.tar"


def build_index(folder: Path, mapping: Over = map, progress: Progress = silent) -> None:
    """Index the shards of a split, unless that is done."""
    if (folder / ROOT).exists():
        return
    shards, done, total = [], 0, sum(find_shards(folder).values())
    for shard in index.scan(folder, mapping):
        shards.append(shard)
        done += shard.bytes
        progress(f"index {folder.name}", done, total)
    index.commit(folder, shards)


def ended(chunks: Iterable[bytes | bytearray]) -> Iterator[bytes | bytearray]:
    """A whole tar from pieces."""
    size = 0
    for chunk in chunks:
        size += len(chunk)
        yield chunk
    yield end(size)


def _reported(
    samples: Iterable[tuple[str, Mapping[str, bytes]]], stage: str, first: int, count: int, progress: Progress
) -> Iterator[bytes]:
    for done, (key, fields) in enumerate(samples, first):
        progress(stage, done, count)
        yield piece(key, fields)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON for people: indented, UTF-8, a newline at the end."""
    path.write_bytes(json_bytes(value))


def write_card(folder: Path, kind: str, source: Path, packing: Packing, facts: Mapping[str, Any]) -> None:
    """Write card.json beside the shards: what this data set is, where it comes from, how it was made."""
    try:
        version = importlib.metadata.version("millstream")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    source_name = packing.origin or source.resolve().name
    origin = {"source": source_name, "licence": packing.licence, "command": packing.command}
    order = {"holdout": packing.holdout, "seed": packing.seed, "shuffled": packing.shuffle}
    card = {"format": 1, "kind": kind, "split": folder.name, **facts, **origin, **order, "millstream": version}
    write_json(folder / "card.json", card)
