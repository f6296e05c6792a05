"""Writes a finished data set folder: shards, index and card, all or nothing.

A source (pack.py, text.py) says how many samples there are and yields them; here they are held out, put in order, cut
into ordinary WebDataset tars, indexed and moved into place by one rename. The same source and options give the same
bytes: tar headers carry no time, owner or permissions of this machine. Shards get equal numbers of samples, not equal
bytes, which is the same thing after shuffling and needs no second pass over the samples.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import secrets
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import index
from pipeline.errors import DataError

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
    command: str | None = None  # that packs it again, kept in the card


@dataclass(frozen=True)
class Packed:
    """What has been written: `samples` by split ("train", "test"), and what a person should know about it."""

    folder: Path
    samples: dict[str, int]
    warnings: tuple[str, ...]


def silent(stage: str, done: int, total: int) -> None:
    """The progress of a caller that shows none."""


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` that becomes `out` when the block ends well, and vanishes when it does not.

    Only a kill leaves it behind, as .OUT.partial-*. Raises DataError when `out` exists (it is never overwritten), and
    for what the system refuses, such as a full disk.
    """
    out = Path(os.path.abspath(out))
    if out.exists() or out.is_symlink():
        raise DataError(f"{out} exists already; choose another folder, or remove it first, to pack this data set")
    temporary = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, out)
    except OSError as error:
        raise DataError(f"packing into {out} failed: {error}; nothing was kept, mend it and pack again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def held_out(keys: Sequence[str], holdout: float, what: str = "samples") -> np.ndarray:
    """Which of `keys` are held out for the test set: bool[n].

    Exactly round(holdout * n) of them (or `holdout` itself from 1 on): those whose key has the lowest hash. So the
    choice follows from the keys alone, and a sample keeps its side for as long as its neighbours in hash order stay.
    """
    n = len(keys)
    if holdout < 0 or (holdout >= 1 and holdout != int(holdout)):
        raise DataError(f"holdout {holdout:g} is neither a share between 0 and 1 nor a whole number of {what}")
    count = int(holdout) if holdout >= 1 else round(holdout * n)
    if count >= n:
        raise DataError(f"holdout {holdout:g} takes {count} of {n} {what} and leaves none to train on; hold out fewer")
    if holdout and not count:
        raise DataError(f"holdout {holdout:g} of {n} {what} is none; hold out a number of them, or pack more {what}")
    hashes = [hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest() for key in keys]
    mask = np.zeros(n, dtype=bool)
    mask[sorted(range(n), key=lambda i: (hashes[i], keys[i]))[:count]] = True
    return mask


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
    """Write `count` samples (key, {extension: bytes}), of about `sample_bytes` each, into a new `folder`; index it."""
    folder.mkdir()
    wanted = max(packing.min_shards, int(np.ceil(count * sample_bytes / packing.shard_bytes)), 1)
    shards = min(wanted, count)
    done, stage = 0, f"write {folder.name}"
    for shard in range(shards):
        name = f"{folder.name}-{shard:06d}.tar"
        with open(folder / name, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for _ in range((shard + 1) * count // shards - done):
                    key, fields = next(samples)
                    for extension, data in fields.items():
                        add_member(tar, f"{key}.{extension}", data)
                    done += 1
                    progress(stage, done, count)
            file.flush()
            os.fsync(file.fileno())
    index.build(folder)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add one member whose header depends on nothing but its name and size."""
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = len(data), 0, 0o644
    tar.addfile(member, io.BytesIO(data))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON for people: indented, UTF-8, a newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_card(folder: Path, kind: str, source: Path, packing: Packing, facts: Mapping[str, Any]) -> None:
    """Write card.json beside the shards: what this data set is, where it comes from, how it was made."""
    try:
        version = importlib.metadata.version("millstream")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    origin = {"source": source.resolve().name, "licence": packing.licence, "command": packing.command}
    order = {"holdout": packing.holdout, "seed": packing.seed, "shuffled": packing.shuffle}
    card = {"format": 1, "kind": kind, "split": folder.name, **facts, **origin, **order, "millstream": version}
    write_json(folder / "card.json", card)
