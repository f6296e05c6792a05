"""Orders of mosaicml-streaming and litdata, for shuffle.py, in an interpreter that has them.

    python benchmarks/shuffle_peers.py 20 2500 7 2    # shards, samples in a shard, seeds, epochs

A line of JSON for each order and seed: its name, and its sample numbers; or why it is left out.

mosaicml-streaming imports torchvision for its example data sets. Beside a torch for CPUs torchvision does not find two
of its operators; they are declared here without a body, since nobody calls them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Iterator


def mosaicml(shards: int, size: int, seeds: int, epochs: int) -> Iterator[list[int]]:
    """One list per seed, by the function that its loaders shuffle with, one canonical node, default block."""
    import numpy as np
    from peer_import import load

    shuffle = load("streaming.base.shuffle").get_shuffle_py1e
    sizes = np.full(shards, size, np.int64)
    for seed in range(seeds):
        yield [int(number) for epoch in range(epochs) for number in shuffle(sizes, 1, seed, epoch)]


def number(sample: int) -> dict[str, int]:
    return {"number": sample}


def litdata(shards: int, size: int, seeds: int, epochs: int) -> Iterator[list[int]]:
    """One list per seed, read from chunks of `size` numbers, which it must write first."""
    library = importlib.import_module("litdata")
    with tempfile.TemporaryDirectory(prefix="millstream-shuffle-") as folder:
        for variable in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER"):
            os.environ[variable] = f"{folder}/{variable}"
        with contextlib.redirect_stdout(sys.stderr):
            inputs = list(range(shards * size))
            library.optimize(
                number, inputs, f"{folder}/set", chunk_size=size, num_workers=1, keep_data_ordered=True, verbose=False
            )
        for seed in range(seeds):
            dataset = library.StreamingDataset(f"{folder}/set", f"{folder}/cache-{seed}", shuffle=True, seed=seed)
            yield [sample["number"] for _ in range(epochs) for sample in dataset]


def main() -> int:
    plan = [int(argument) for argument in sys.argv[1:]]
    for package, words, orders in (("mosaicml-streaming", "py1e", mosaicml), ("litdata", "shuffle=True", litdata)):
        try:
            for numbers in orders(*plan):
                name = f"{package} {importlib.metadata.version(package)}, {words}"
                print(json.dumps({"name": name, "numbers": numbers}), flush=True)
        except ImportError as error:
            print(json.dumps({"name": package, "left out": f"{type(error).__name__}: {error}"}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
