"""Is a step planned as fast with a million shards and 10^10 samples as with ten shards?

The root is a real file of a million uneven pseudo-random shards. Their segments would take about 800 GB, so a seeded
generator behind the storage interface makes each when it is mapped, with the packer that the scan uses. The digest of a
segment is compared when it is opened, here as everywhere: the root holds the true digests of the shards that the
measured steps touch, found by a first pass over the same steps, and zeros for the others, which would raise if one of
them were opened.

A step's plan is: sample numbers of all of its micro batches, shards and rows of these, segments mapped, and each row's
record of both fields and its class. A process of its own does nothing but open the data set and plan steps at random
numbers; what the generator takes is measured apart from it. What this leaves out: reading segments from a disk.

    python benchmarks/scale.py --save
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()  # before anything heavy is imported: imports are a part of the start

import numpy as np  # noqa: E402
import report  # noqa: E402

from pipeline.data import root, segment  # noqa: E402
from pipeline.data.index import Index, open_index  # noqa: E402
from pipeline.data.mixture import Mixture, Source  # noqa: E402
from pipeline.data.order import block_samples  # noqa: E402
from pipeline.data.storage import Folder  # noqa: E402
from pipeline.sections import Data  # noqa: E402

PERIOD = 1 << 16  # samples after which lengths repeat; a shard begins anywhere in the period and has fewer
SHARD = 20_000  # samples of a shard, at most
SPREAD = 0.35  # of the logarithm of the samples of a shard
KEY = 6  # characters
MAPPED = 256  # segments that stay mapped, as many as the reader keeps
TARGETS = {"start_s": 2.0, "peak_GB": 1.0, "plan_ms": 50.0}
BATCH, MICRO_BATCH = 256, 32
SHUFFLED = Data.model_fields["shuffle_blocks"].default


class Generated:
    """A Storage: the root from a folder, segments from a seed. seconds, processor_seconds: that these took to make."""

    block_bytes = Folder.block_bytes

    def __init__(self, folder: Path, seed: int) -> None:
        self.place, self._seed = str(folder), seed
        self.seconds = self.processor_seconds = 0.0
        lengths = np.random.default_rng(seed).integers(100, 4000, 2 * PERIOD)
        lengths[PERIOD:] = lengths[:PERIOD]
        self.lengths = lengths
        sizes = 512 + (lengths + 511) // 512 * 512 + 1024  # of a picture and a class of one byte, in a tar
        self.ends = np.concatenate([[0], np.cumsum(sizes)])
        self.keys = [b"%0*d" % (KEY, row) for row in range(SHARD)]
        self.counts: np.ndarray | None = None

    def sizes(self, expected: int = 0) -> None:
        return None

    def close(self) -> None:
        pass

    def map(self, name: str) -> memoryview:
        return Folder(self.place).map(name)

    def segment(self, name: str, digest: str) -> memoryview:
        began, cpu = time.perf_counter(), time.process_time()
        assert self.counts is not None
        shard = int(name.partition(".")[0])
        made = self.made(shard, int(self.counts[shard]))
        self.seconds += time.perf_counter() - began
        self.processor_seconds += time.process_time() - cpu
        return memoryview(made)

    def shift(self, shards: Any) -> Any:
        """Where in the period these shards begin."""
        return (shards * 40_503 + self._seed) % PERIOD

    def tar_bytes(self, shards: Any, counts: Any) -> Any:
        """Of these shards."""
        shift = self.shift(shards)
        return (self.ends[shift + counts] - self.ends[shift] + 1024 + 10_239) // 10_240 * 10_240

    def made(self, shard: int, count: int) -> bytes:
        """Of one shard: a .jpg and a .cls for each sample."""
        shift = self.shift(shard)
        table = np.zeros((count, 2), segment.FIELD)
        begin = self.ends[shift : shift + count] - self.ends[shift]
        after = self.ends[shift + 1 : shift + count + 1] - self.ends[shift]
        table["offset"][:, 0], table["offset"][:, 1] = begin + 512, after - 512
        table["length"][:, 0], table["length"][:, 1] = self.lengths[shift : shift + count], 1
        table["digest"] = np.arange(2 * count, dtype=np.uint64).reshape(count, 2) * np.uint64(0x9E3779B97F4A7C15)
        table["digest"] += np.uint64(shard)
        table["name"][:, 1] = 1
        classes = {"cls": (np.arange(count) + shard) % 10}
        size, counts = int(self.tar_bytes(shard, count)), np.full(count, 2)
        return segment.pack(size, counts, table.reshape(-1), self.keys[:count], ["jpg", "cls"], classes)


def uneven(shards: int, samples: int, seed: int) -> np.ndarray:
    """int64[shards] of at least 1 and at most SHARD, `samples` in all, spread log-normally."""
    weights = np.random.default_rng(seed).lognormal(0.0, SPREAD, shards)
    counts = np.clip(weights * (samples / weights.sum()), 1, SHARD - 1).astype(np.int64)
    while (rest := samples - int(counts.sum())) > 0:  # what clipping and rounding took
        free = np.flatnonzero(counts < SHARD)
        counts[free[:rest]] += np.minimum(SHARD - counts[free[:rest]], -(-rest // len(free)))
    counts[np.argmax(counts)] += rest
    return counts


def write_root(storage: Generated, counts: np.ndarray, digests: dict[int, str]) -> None:
    """shards.idx of these shards, with zeros for the digests that are not given."""
    names = (f"{shard:07d}.tar" for shard in range(len(counts)))
    sizes = storage.tar_bytes(np.arange(len(counts)), counts).tolist()
    zeros = "0" * 32
    table = (
        root.Shard(name, count, size, digests.get(shard, zeros))
        for shard, (name, count, size) in enumerate(zip(names, counts.tolist(), sizes))
    )
    (Path(storage.place) / root.ROOT).write_bytes(root.write(table))


def order_of(index: Index, seed: int) -> Mixture:
    """As a run with the defaults would have it."""
    block, lanes = block_samples(index.samples, index.bytes, 1 << 20), BATCH // MICRO_BATCH
    only = Source("train", index.identity, index.samples, block)
    return Mixture.start([only], lanes=lanes, shuffle_blocks=SHUFFLED, seed=seed, global_batch=BATCH)


def steps_of(plan: argparse.Namespace) -> list[int]:
    """Step numbers all over the range, the last one among them."""
    return [*np.random.default_rng(plan.seed).integers(0, plan.last_step, plan.steps - 1).tolist(), plan.last_step]


def numbers_of(order: Mixture, step: int) -> np.ndarray:
    """int64[BATCH] sample numbers of a step, computed as the loader does: all micro batches together."""
    return order.plan(range(step, step + 1), range(BATCH // MICRO_BATCH), MICRO_BATCH)[2].ravel()


def prepare(plan: argparse.Namespace, folder: Path) -> int:
    """Write the root; returns how many shards the steps touch."""
    storage = Generated(folder, plan.seed)
    counts = uneven(plan.shards, plan.samples, plan.seed)
    write_root(storage, counts, {})
    index = open_index(storage)
    order = order_of(index, plan.seed)
    touched = {shard for step in steps_of(plan) for shard in index.places(numbers_of(order, step))[0].tolist()}
    digests = {shard: segment.digest(storage.made(shard, int(counts[shard]))) for shard in touched}
    write_root(storage, counts, digests)
    return len(touched)


def look_up(index: Index, mapped: dict[int, segment.Segment], numbers: np.ndarray) -> int:
    """Map what a step needs and find its rows there; returns the bytes of the step's samples."""
    total = 0
    shards, rows = index.places(numbers)
    by_shard = np.argsort(shards, kind="stable")
    shards, rows = shards[by_shard], rows[by_shard]
    edges = np.flatnonzero(np.diff(shards, prepend=-1, append=-1))
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist()):
        shard = int(shards[begin])
        if shard not in mapped:
            while len(mapped) >= MAPPED:
                mapped.pop(next(iter(mapped)))
            mapped[shard] = index.segment(shard)
        found, here = mapped[shard], rows[begin:end]
        records = found.table[np.stack([found.column("jpg")[here], found.column("cls")[here]])]
        classes = found.values("cls")
        assert classes is not None and (classes[here] == (here + shard) % 10).all()
        assert (records["length"][1] == 1).all()
        total += int(records["length"].sum())
    return total


def measure(plan: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What the process of its own does: open, plan, say how long it took."""
    storage = Generated(folder, plan.seed)
    began = time.perf_counter()
    index = open_index(storage)
    index.starts  # noqa: B018
    order = order_of(index, plan.seed)
    opened = time.perf_counter()
    storage.counts = index.shards.records["samples"]
    numbers_of(order, 0)
    started = time.perf_counter()
    mapped: dict[int, segment.Segment] = {}
    arithmetic, plans, processor, generated, total = [], [], [], [], 0
    for step in steps_of(plan):
        before, storage.seconds, storage.processor_seconds = time.perf_counter(), 0.0, 0.0
        cpu = time.process_time()
        numbers = numbers_of(order, step)
        index.places(numbers)
        between = time.perf_counter()
        total += look_up(index, mapped, numbers)
        plans.append(time.perf_counter() - before - storage.seconds)
        processor.append(time.process_time() - cpu - storage.processor_seconds)
        arithmetic.append(between - before)
        generated.append(storage.seconds)
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    times = {"arithmetic": arithmetic, "plans": plans, "processor": processor, "generated": generated}
    facts = {"open_s": opened - began, "start_s": started - BEGAN, "peak": peak, "bytes": total}
    return {**facts, **times, "identity": index.identity, "samples": index.samples, "shards": len(index.shards)}


def rows_of(found: dict[str, Any], root_bytes: int) -> list[list[str]]:
    """The table."""

    def judged(what: str, value: float, shown: str, target: str) -> list[str]:
        limit = TARGETS[target]
        return [what, shown, f"{'met' if value < limit else 'MISSED'} (< {limit:g} {target.rpartition('_')[2]})"]

    def spread(times: list[float]) -> str:
        high = sorted(times)[len(times) * 99 // 100]
        named = (("median", statistics.median(times)), ("99 %", high), ("most", max(times)))
        return ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in named)

    peak, most, used = found["peak"] / 1e9, max(found["plans"]) * 1e3, max(found["processor"]) * 1e3
    return [
        ["root on disk", f"{root_bytes / 1e6:.1f} MB", ""],
        ["open, check sha256, add up", f"{found['open_s']:.3f} s", ""],
        judged("start: imports, open, first rows", found["start_s"], f"{found['start_s']:.3f} s", "start_s"),
        judged("peak resident memory", peak, f"{peak:.3f} GB", "peak_GB"),
        ["numbers, shards, rows of a step", spread(found["arithmetic"]), ""],
        judged("plan of a step", most, spread(found["plans"]), "plan_ms"),
        judged("plan of a step, processor time", used, spread(found["processor"]), "plan_ms"),
        ["the generator's part, not counted", spread(found["generated"]), ""],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Plan steps over a million shards and 10^10 samples")
    parser.add_argument("--shards", type=int, default=10**6)
    parser.add_argument("--samples", type=int, default=10**10)
    parser.add_argument("--steps", type=int, default=1000, help="planned")
    parser.add_argument("--last-step", type=int, default=10**9, help="step numbers go up to this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/scale-<date>.md")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # the process of its own
    plan = parser.parse_args()
    if plan.measure:
        print(json.dumps(measure(plan, plan.measure)))
        return 0
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="millstream-scale-") as folder:
        touched = prepare(plan, Path(folder))
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout)
        body = report.table(["what", "measured", "target"], rows_of(found, (Path(folder) / root.ROOT).stat().st_size))
    facts = [
        f"{found['shards']:,} shards, {found['samples']:,} samples; {plan.steps:,} steps at random numbers up to "
        f"{plan.last_step:,}, {BATCH} samples each in micro batches of {MICRO_BATCH}, all planned by one process",
        f"{touched:,} shards are touched; their segments are generated and compared with true digests",
    ]
    print("\n".join([*facts, "", body]))
    if plan.save:
        print(f"saved in {report.save('scale', report.page('A million shards', facts, body, load))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
