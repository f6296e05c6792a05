"""Raw files -> WebDataset shards: what they are, who is held out, in which order, and what goes beside the shards.

    source (folders.py, table.py, arrays.py, tars.py) -> spool -> train/ and test/, each with index and card

Text and chats become rows of tokens on a way of their own (text.py, chats.py). Class names go beside the shards
(classes.json), class numbers into them. Shards get equal numbers of samples, which after shuffling is nearly equal
bytes; where it is not, shards are cut between equal numbers and equal bytes.

What it gives up: writing to a URL; pack into a folder, and `millstream data send` that.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.data import parallel
from pipeline.data.pack import arrays as arrays_module
from pipeline.data.pack import rows, spool, table
from pipeline.data.pack.arrays import Arrays, array_source
from pipeline.data.pack.chats import Chats, pack_chats
from pipeline.data.pack.columns import Columns
from pipeline.data.pack.corpus import PATTERNS, find_files
from pipeline.data.pack.folders import class_files, folder_source
from pipeline.data.pack.source import Source
from pipeline.data.pack.spool import Spool
from pipeline.data.pack.table import table_source
from pipeline.data.pack.tars import Chosen, tar_source
from pipeline.data.pack.text import Text, pack_text
from pipeline.data.pack.work import refuse_existing, work_folder
from pipeline.data.pack.writer import (
    Packed,
    Packing,
    Progress,
    build_index,
    lowest,
    plan,
    shard_count,
    shard_path,
    silent,
    splits,
    write_card,
)
from pipeline.data.parallel import Mapping
from pipeline.errors import DataError
from pipeline.whole_file import put

Kind = Literal["images", "audio", "arrays", "table", "tars", "text", "chats"]
CALLED: dict[Kind, str] = {"text": "text files", "audio": "sounds", "table": "tables"}
UNEVEN = 1.1  # times the mean: shards of equal numbers that are larger than this are cut otherwise


def pack(
    source: Path,
    out: Path,
    packing: Packing,
    *,
    kind: Kind | None = None,
    arrays: Arrays | None = None,
    text: Text | None = None,
    chats: Chats | None = None,
    columns: Columns | None = None,
    chosen: Chosen | None = None,
    mapping: Mapping | None = None,
    progress: Progress = silent,
) -> Packed:
    """Pack `source` into OUT/train and, when something is held out, OUT/test.

    `kind` None: what `detect` finds. mapping: who reads the units of the source; threads when it is None. Raises
    DataError when `out` exists, when the source is empty or unclear, or when anything in it cannot be packed.

    Killed or interrupted on its way, the same call goes on, and gives the bytes that it would have given undisturbed.
    """
    if ":/" in out.as_posix():
        raise DataError(f"{out} is a URL; pack into a folder, then `millstream data send FOLDER URL`")
    refuse_existing(out)  # before a long look at the source
    text = text or Text()
    if mapping is not None:  # other machines have other working folders
        source = source.absolute()
    kind = kind or detect(source, text.patterns)
    if kind == "text":
        return pack_text(source, out, packing, text, progress=progress)
    if kind == "chats":
        return pack_chats(source, out, packing, chats or Chats(), progress=progress)
    if kind in ("images", "audio"):
        found = folder_source(source, kind)
    elif kind == "arrays":
        found = array_source(source, arrays or Arrays())
    elif kind == "table":
        found = table_source(source, columns or Columns(), progress)
    else:
        found = tar_source(source, chosen or Chosen())
    return pack_source(found, out, packing, mapping, progress)


def detect(source: Path, patterns: Sequence[str] = PATTERNS) -> Kind:
    """What `source` is, from names alone (and the first lines of a .csv).

    Raises DataError when it is nothing that can be packed, or two things.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist; give the file or folder to pack")
    if source.is_file():
        if table.is_table(source):
            return "table"
        if source.name.lower().endswith(arrays_module.SUFFIXES):
            return "arrays"
        if any(fnmatch(source.name, pattern) for pattern in patterns):
            return "text"
        known = " ".join([*arrays_module.SUFFIXES, *rows.SUFFIXES, *patterns])
        raise DataError(f"{source.name} is of no kind that is packed ({known}); say that it is text if it is")
    if table.is_saved(source):
        return "table"
    counts: dict[Kind, int] = {
        "images": sum(1 for _ in class_files(source, "images")),
        "text": len(find_files(source, patterns)),
        "audio": sum(1 for _ in class_files(source, "audio")),
        "table": len(table.table_files(source)),
        "tars": sum(1 for _ in source.glob("[!.]*.tar")),
    }
    first, second = sorted(counts, key=counts.__getitem__, reverse=True)[:2]
    if not counts[first]:
        raise DataError(
            f"{source} holds nothing to pack: no images as {source.name}/<class>/*.jpg|jpeg|png|webp, no sounds as "
            f"{source.name}/<class>/*.wav|flac|ogg, no tables ({' '.join(rows.SUFFIXES)}), no .tar, "
            f"no text files ({' '.join(patterns)})"
        )
    # a README beside the images, or a few icons among source files, leave no doubt
    if counts[second] * 10 > counts[first]:
        both: list[Kind] = [kind for kind in counts if kind in (first, second)]
        there = " and ".join(f"{counts[kind]} {CALLED.get(kind, kind)}" for kind in both)
        raise DataError(f"{source} holds {there}; say which to pack: {' or '.join(both)}")
    return first


def pack_images(source: Path, out: Path, packing: Packing, *, progress: Progress = silent) -> Packed:
    """Pack SOURCE/<class>/*.png|jpg|jpeg|webp as {key}.jpg (or png, webp: what it really is) and {key}.cls."""
    return pack_source(folder_source(source, "images"), out, packing, None, progress)


def pack_arrays(source: Path, out: Path, packing: Packing, arrays: Arrays, *, progress: Progress = silent) -> Packed:
    """Pack the rows of an array or table as {row number}.png and .cls. Raises DataError as `read_arrays` does."""
    return pack_source(array_source(source, arrays), out, packing, None, progress)


def pack_source(
    source: Source, out: Path, packing: Packing, mapping: Mapping | None = None, progress: Progress = silent
) -> Packed:
    """Spool a source, then write it into OUT/train and OUT/test; see `pack`."""
    threads = parallel.threads(packing.threads)
    with (
        work_folder(out, plan(packing, source.seen)) as work,
        closing(spool.gather(source, work.folder / "spool", mapping or threads, progress)) as found,
    ):
        mask = lowest(found.records["name"], packing.holdout, source.what)
        warnings = [*source.warnings, *_remarks(source, found, mask, packing.holdout)]
        samples: dict[str, int] = {}
        for name, numbers in splits(mask, packing).items():
            folder = work.out / name
            folder.mkdir(exist_ok=True)
            sizes = found.records["bytes"][numbers].astype(np.int64)
            edges = cut(sizes, shard_count(len(numbers), float(sizes.sum()), packing))
            shards = [(shard_path(folder, i), numbers[a:b]) for i, (a, b) in enumerate(pairwise(edges))]
            done = 0
            for written in spool.write(found, shards, threads):
                done += written
                progress(f"write {name}", done, len(numbers))
            build_index(folder, mapping or map, progress)
            for file, content in source.beside.items():
                put(folder / file, [content])
            _write_card(folder, source, found.records["label"][numbers], packing, warnings)
            samples[name] = len(numbers)
    return Packed(out, samples, (*work.warnings, *warnings))


def cut(sizes: np.ndarray, shards: int) -> list[int]:
    """Where shards begin and end, for samples of int64[n] bytes in the order in which they are written.

    Equal numbers of samples, unless that makes a shard a tenth and a sample larger than the mean.
    """
    n = len(sizes)
    edges = [i * n // shards for i in range(shards + 1)]
    sums = np.concatenate([[0], np.cumsum(sizes)])
    largest = np.diff(sums[edges]).max()
    if largest <= UNEVEN * sums[-1] / shards + sizes.max():
        return edges
    share = (sums / sums[-1] + np.arange(n + 1) / n) / 2
    inner = np.searchsorted(share, np.arange(1, shards) / shards).tolist()
    for i in range(len(inner)):  # every shard has a sample
        low = (inner[i - 1] if i else 0) + 1
        inner[i] = min(max(inner[i], low), n - (shards - 1 - i))
    return [0, *inner, n]


def _remarks(source: Source, found: Spool, mask: np.ndarray, holdout: float) -> list[str]:
    """What a person should know about what was read."""
    warnings: list[str] = []
    content, labels = found.records["content"], found.records["label"]
    twice = int(np.isin(content[mask], content[~mask]).sum()) if holdout else 0
    if twice:
        warnings.append(
            f"{twice} of the {int(mask.sum())} held-out samples are also, byte for byte, among the training samples"
        )
    if source.classes is None:
        return warnings
    if len(source.classes) == 1:
        warnings.append(
            f"there is one class only ({source.classes[0]}): nothing can be learned from it by classification"
        )
    classes = source.classes
    known = (labels >= 0) & (labels < len(classes))
    unseen = sorted(set(labels[mask & known].tolist()) - set(labels[~mask].tolist()))
    if unseen:
        names = ", ".join(str(classes[label]) for label in unseen)
        warnings.append(f"no sample to train on is left of: {names}; hold out fewer")
    return warnings


def _write_card(folder: Path, source: Source, labels: np.ndarray, packing: Packing, warnings: list[str]) -> None:
    facts: dict[str, object] = {"samples": len(labels)}
    if source.classes is not None:
        known = labels[(labels >= 0) & (labels < len(source.classes))]
        counts = np.bincount(known, minlength=len(source.classes)).tolist()
        facts["classes"] = dict(zip(source.classes, counts))
    licensed = replace(packing, licence=packing.licence or source.licence)
    write_card(folder, source.kind, source.place, licensed, {**facts, "warnings": warnings})
