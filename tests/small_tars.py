"""Small tars, their members chosen one by one, and what the reader makes of them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from pipeline.data.reader import open_dataset

Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Members, format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(count: int, start: int = 0) -> Members:
    """Ragged text samples with a class each."""
    return [
        member
        for i in range(start, start + count)
        for member in ((f"{i:05d}.txt", f"sample {i} ".encode() * (i % 7 * 20)), (f"{i:05d}.cls", b"%d" % (i % 10)))
    ]


def contents(folder: Path) -> dict[str, dict[str, bytes]]:
    with open_dataset(folder) as dataset:
        found = [dataset.sample(number) for number in range(len(dataset))]
        return {sample.key: {name: bytes(sample.raw(name)) for name in sample.fields} for sample in found}


def grouped(members: Members) -> dict[str, dict[str, bytes]]:
    result: dict[str, dict[str, bytes]] = {}
    for name, data in members:
        key, field = name.split(".", 1)
        result.setdefault(key, {})[field] = data
    return result
