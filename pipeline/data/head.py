"""One sample by its key: where it lies, what it holds, and its members as files of their own."""

from __future__ import annotations

import difflib
from itertools import islice
from pathlib import Path

from pipeline.data.reader import Dataset, Sample
from pipeline.errors import DataError
from pipeline.whole_file import put

LOOKED = 5000  # keys among which one like the wanted one is looked for


def find(dataset: Dataset, key: str) -> Sample:
    """The first sample with this key; DataError, with a key that is like it, when there is none."""
    wanted = key.encode("utf-8", "surrogateescape")
    for shard in range(len(dataset.index.shards)):
        found = dataset.index.segment(shard)
        if wanted not in bytes(found.view[found.starts[4] :]):
            continue
        for row in range(found.samples):
            if found.key(row) == key:
                return dataset.sample(int(dataset.index.starts[shard]) + row)
    some = [dataset.sample(number).key for number in islice(range(len(dataset)), LOOKED)]
    near = difflib.get_close_matches(key, some, 1) or some[:1]
    raise DataError(f"{dataset.index.place}: no sample has the key {key}; there is {near[0]}")


def write(sample: Sample, folder: Path) -> list[Path]:
    """Write every member of a sample into `folder`, named as in the tar; raises DataError when one is there already."""
    paths = [folder / f"{Path(sample.key).name}.{field}" for field in sample.fields]
    there = next((path for path in paths if path.exists()), None)
    if there is not None:
        raise DataError(f"{there} exists already; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, field in zip(paths, sample.fields):
            put(path, [sample.raw(field)])
    except OSError as error:
        raise DataError(f"{folder}: cannot be written to ({error.strerror}); choose another folder") from error
    return paths
