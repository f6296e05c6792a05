"""How well an order mixes what lies together in the shards, beside a full permutation and the peers' own shuffles.

    permutation   every sample anywhere: what the others are measured by (torch's RandomSampler is one)
    millstream    pipeline.data.order, by lanes, blocks that are shuffled together, and samples in a block
    webdataset    its `shuffle` stage with a buffer of so many samples, behind its `detshuffle` of the shards
    mosaicml      py1e, with its default block; litdata: `StreamingDataset(shuffle=True)`, a chunk per shard

No data are read but litdata's: an order is a list of sample numbers, 0 to n - 1 as they lie in the shards. Columns:

    spread        of the batches' mean sample numbers, divided by what independent draws would give: 1 is ideal
    neighbours    share of samples whose number is within 256 of the one before
    repeats       samples that came among the last 256, per epoch; only where two epochs meet can there be any
    class run     mean length of runs of one class, the shards being sorted by class, 100 classes: 1.01 is ideal
    classes       in a batch, mean: 92.4 is ideal for a batch of 256

Where w of the data set's b blocks are shuffled together, the spread of batches of m samples is about
sqrt(1 + m / w * (1 - w / b)), because what lies in one block comes at about the same time.

Medians over seeds, of two epochs each. mosaicml-streaming and litdata need other versions of libraries than
Millstream: --peers-python names an interpreter that has them. Without it they are left out.

    python benchmarks/shuffle.py --peers-python /path/to/peers/bin/python --save
    python benchmarks/shuffle.py --shards 100 --seeds 9 --only millstream --save
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import statistics
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import report

from pipeline.data.order import Order, block_samples
from pipeline.sections import Data

BATCH, NEAR, CLASSES, EPOCHS = 256, 256, 100, 2
TAR_BYTES = 4096  # of a sample: a JPEG of 2,117 B in 5 records of 512, a class in 1, a header of 512 each
LARGEST_SPREAD = 2.2
BLOCKS = Data.model_fields["shuffle_blocks"].default
DEFAULT = "millstream by default,"  # data.shuffle_blocks and data.block_bytes; lanes follow from the micro batch


class Quality(NamedTuple):
    """See the module's docstring."""

    spread: float
    neighbours: float
    repeats: float
    class_run: float
    classes: float


Sequence = Callable[[int, int, int], np.ndarray]
"""(shards, samples per shard, seed) -> sample numbers of two epochs, one after the other."""


def quality(numbers: np.ndarray, samples: int) -> Quality:
    """Of the sample numbers int64[k] of some epochs of `samples` samples, in batches of 256."""
    batches = numbers[: len(numbers) // BATCH * BATCH].reshape(-1, BATCH)
    ideal = np.sqrt((samples**2 - 1) / 12 / BATCH)
    classes = batches * CLASSES // samples
    runs = 1 + np.count_nonzero(np.diff(numbers * CLASSES // samples))
    last: dict[int, int] = {}
    repeats = 0
    for place, number in enumerate(numbers.tolist()):
        repeats += place - last.get(number, -NEAR - 1) <= NEAR
        last[number] = place
    return Quality(
        spread=float(np.sqrt(((batches.mean(axis=1) - (samples - 1) / 2) ** 2).mean()) / ideal),
        neighbours=float((np.abs(np.diff(numbers)) <= NEAR).mean()),
        repeats=repeats * samples / len(numbers),
        class_run=len(numbers) / runs,
        classes=float(np.mean([len(np.unique(batch)) for batch in classes])),
    )


def permutation(shards: int, size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(shards * size) for _ in range(EPOCHS)])


def random_sampler(shards: int, size: int, seed: int) -> np.ndarray:
    import torch

    sampler = torch.utils.data.RandomSampler(range(shards * size), generator=torch.Generator().manual_seed(seed))
    return np.array([number for _ in range(EPOCHS) for number in sampler])


def millstream(lanes: int, shuffle_blocks: int, block: int, shards: int, size: int, seed: int) -> np.ndarray:
    order = Order(shards * size, block, lanes, shuffle_blocks, seed)
    steps = EPOCHS * shards * size // BATCH
    return np.concatenate([order.rows(step, 0, BATCH, BATCH)[1] for step in range(steps)])


def webdataset(buffer: int | None, shards: int, size: int, seed: int) -> np.ndarray:
    from webdataset import filters

    options = {} if buffer is None else {"bufsize": buffer}
    of_shards = filters.detshuffle(seed=seed * EPOCHS)  # counts its epochs itself
    numbers: list[int] = []
    for epoch in range(EPOCHS):
        samples: Iterator[int] = (
            shard * size + row for shard in of_shards.run(iter(range(shards))) for row in range(size)
        )
        numbers += filters.shuffle(**options, rng=random.Random(seed * EPOCHS + epoch))(samples)
    return np.array(numbers)


def orders(shards: int, size: int) -> dict[str, Sequence]:
    """All that are computed in this process, by the name that is printed."""
    block = block_samples(shards * size, shards * (size * TAR_BYTES + 10240), 1 << 20)
    named: dict[str, Sequence] = {"full permutation": permutation, "torch RandomSampler": random_sampler}
    for lanes in (1, 4, 8, 64):
        named[f"{DEFAULT} {lanes} lanes, {BLOCKS} blocks of {block}"] = partial(millstream, lanes, BLOCKS, block)
    for blocks, other in ((BLOCKS, 64), (BLOCKS, 1024), (16, block), (64, block), (128, block), (256, block)):
        named[f"millstream, 4 lanes, {blocks} blocks of {other}"] = partial(millstream, 4, blocks, other)
    version = importlib.metadata.version("webdataset")
    named[f"webdataset {version}, shuffle() as it is: 1000"] = partial(webdataset, None)
    named[f"webdataset {version}, shuffle(5000)"] = partial(webdataset, 5000)
    return named


def peers(python: str, shards: int, size: int, seeds: int) -> dict[str, list[np.ndarray]]:
    """Orders of what can be imported in another interpreter, one per seed; says what cannot."""
    script = str(Path(__file__).with_name("shuffle_peers.py"))
    command = [python, script, *map(str, (shards, size, seeds, EPOCHS))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-3000:]}")
    found: dict[str, list[np.ndarray]] = {}
    for answer in map(json.loads, done.stdout.splitlines()):
        if "left out" in answer:
            print(f"{answer['name']} is left out: {answer['left out']}")
        else:
            found.setdefault(answer["name"], []).append(np.array(answer["numbers"]))
    return found


def row(name: str, found: list[Quality]) -> list[str]:
    """Of the table."""
    spread, neighbours, repeats, class_run, classes = (statistics.median(values) for values in zip(*found))
    low, high = min(one.spread for one in found), max(one.spread for one in found)
    met = f"{'met' if spread <= LARGEST_SPREAD else 'MISSED'} (<= {LARGEST_SPREAD})"
    cells = [f"{spread:.2f} ({low:.2f} to {high:.2f})", f"{neighbours:.1%}", f"{repeats:.1f}"]
    return [name, *cells, f"{class_run:.2f}", f"{classes:.1f}", met if name.startswith(DEFAULT) else ""]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare how well orders mix samples")
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--size", type=int, default=2500, help="samples in a shard")
    parser.add_argument("--seeds", type=int, default=25)
    parser.add_argument("--only", help="only orders whose name contains this")
    parser.add_argument("--peers-python", help="an interpreter that has mosaicml-streaming and litdata, or one of them")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/shuffle-<date>.md")
    plan = parser.parse_args()
    load, samples = os.getloadavg()[0], plan.shards * plan.size
    rows = []
    for name, sequence in orders(plan.shards, plan.size).items():
        if plan.only is None or plan.only in name:
            found = [quality(sequence(plan.shards, plan.size, seed), samples) for seed in range(plan.seeds)]
            rows.append(row(name, found))
    if plan.peers_python:
        for name, numbers in peers(plan.peers_python, plan.shards, plan.size, plan.seeds).items():
            rows.append(row(name, [quality(of_seed, samples) for of_seed in numbers]))
    else:
        print("mosaicml-streaming and litdata are left out: --peers-python names an interpreter that has them")
    header = ["order", "spread, median (range)", "neighbours", "repeats", "class run", "classes", "target"]
    body = report.table(header, rows)
    print(body)
    if plan.save:
        facts = [f"{samples:,} samples in {plan.shards} shards of {plan.size:,}, batch {BATCH}, {plan.seeds} seeds"]
        print(f"saved in {report.save('shuffle', report.page('Shuffle quality', facts, body, load))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
