"""What remote.py measures, each case in this program's own process, which says what it did as JSON.

python benchmarks/remote_cases.py CASE --url URL --plain URL --names '["000000.tar", ...]' --work FOLDER
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

OURS, CURL, GETS, KEPT = "millstream", "webdataset, pipe:curl", "gets, 4 threads", "gets, 4 threads, kept"
MANY, RANGES, RESUME = "gets, 16 threads", "gets of 4 MiB, 16 threads", "resume"
BATCH = 64
SEED = 7


class Shards(NamedTuple):
    """url: as a run names them.  plain: where curl finds the same files."""

    url: str
    plain: str
    names: list[str]


class Bytes:
    """A task that takes the bytes of every sample and tells how many there were."""

    augments = False

    def prepare(self, sample: Any, rng: Any) -> dict[str, np.ndarray]:
        return {"bytes": np.array(len(sample.raw("bin")))}

    def gather(self, samples: Any) -> dict[str, np.ndarray] | None:
        views = samples.raw("bin")
        return None if views is None else {"bytes": np.array([len(view) for view in views])}


def stream(url: str, cache: Path) -> Any:
    """As a run opens its data."""
    from pipeline.config import Config
    from pipeline.data.stream import Stream

    values = {
        "name": "benchmark",
        "steps": 1,
        "global_batch_size": BATCH,
        "micro_batch_size": BATCH,
        "seed": SEED,
        "data": {"train": url, "cache": str(cache)},
        "task": {"name": "image_classification", "classes": 10, "image_size": 64, "architecture": "resnet"},
        "optim": {"name": "adamw", "lr": 1e-3},
        "cluster": {"workers": 1},
    }
    return Stream(Config.model_validate(values))


def ours(shards: Shards, cache: Path) -> int:
    """All samples once, through the loader of a run."""
    opened, total = stream(shards.url, cache), 0
    with opened.loader(Bytes(), rank=0, world_size=1, first=0) as loader:
        for step in range(len(opened.datasets[0]) // BATCH):
            total += int(loader.step(step)[0].batch["bytes"].sum())
    opened.close()
    return total


def curl(shards: Shards, cache: Path) -> int:
    """All samples once."""
    wds: Any = importlib.import_module("webdataset")
    sources = [f"pipe:curl -s -f {shards.plain}/{name}" for name in shards.names]
    return sum(len(sample["bin"]) for sample in wds.WebDataset(sources, shardshuffle=False))


def gets(shards: Shards, cache: Path, keep: bool = False, threads: int = 4) -> int:
    """All shards whole."""
    pool, local = _pool(threads), threading.local()

    def one(name: str) -> int:
        answer = pool.request("GET", f"{shards.plain}/{name}", preload_content=False)
        if not keep:
            size = int(answer.headers["Content-Length"])
            if getattr(local, "buffer", None) is None or len(local.buffer) < size:
                local.buffer = bytearray(size)
        with open(cache / name if keep else os.devnull, "wb") as file:
            total = 0
            while chunk := answer.read(1 << 18, decode_content=False):
                if keep:
                    file.write(chunk)
                else:
                    local.buffer[total : total + len(chunk)] = chunk
                total += len(chunk)
        answer.release_conn()
        return total

    cache.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(threads) as executor:
        return sum(executor.map(one, shards.names))


def ranges(shards: Shards, cache: Path) -> int:
    """All shards in ranges of bytes."""
    pool, size = _pool(16), 4 << 20

    def length(name: str) -> int:
        return int(pool.request("HEAD", f"{shards.plain}/{name}").headers["Content-Length"])

    def one(begin: int, name: str) -> int:
        return len(pool.request("GET", f"{shards.plain}/{name}", headers=_range(begin, begin + size)).data)

    with ThreadPoolExecutor(16) as threads:
        lengths = zip(shards.names, threads.map(length, shards.names))
        wanted = [(begin, name) for name, count in lengths for begin in range(0, count, size)]
        return sum(threads.map(one, *zip(*wanted)))


def resume(shards: Shards, cache: Path) -> dict[str, float]:
    """Seconds to the first batch in the middle of an epoch, and of the block reads that it needs."""
    _pool(1).request("GET", f"{shards.plain}/shards.idx")  # what is loaded once in a process
    began = time.perf_counter()
    opened = stream(shards.url, cache)
    first = len(opened.datasets[0]) // BATCH // 2
    with opened.loader(Bytes(), rank=0, world_size=1, first=first) as loader:
        loader.step(first)
        took = time.perf_counter() - began  # without what it takes to end the loader's threads
    remote, tars = opened.datasets[0].remote, opened.datasets[0].index.shards
    _, _, numbers = opened.mixture.rows(first, 0, BATCH)
    needed = []
    for piece in np.unique(remote.pieces.of(numbers)).tolist():
        shard = remote.pieces.rows(piece)[0]
        begin, end = remote.open(shard)[1].extents[remote.pieces.block_in(piece)]
        needed.append((f"{shards.plain}/{tars.name(shard)}", _range(begin, end)))
    opened.close()
    pool = _pool(16)
    began = time.perf_counter()
    with ThreadPoolExecutor(16) as threads:
        total = sum(threads.map(lambda one: len(pool.request("GET", one[0], headers=one[1]).data), needed))
    return {"resume": took, "round": time.perf_counter() - began, "blocks": len(needed), "bytes": total}


def _range(begin: int, end: int) -> dict[str, str]:
    return {"Range": f"bytes={begin}-{end - 1}"}


def _pool(size: int) -> Any:
    urllib3: Any = importlib.import_module("urllib3")
    return urllib3.PoolManager(maxsize=size)


CASES: dict[str, Callable[[Shards, Path], int]] = {
    OURS: ours,
    CURL: curl,
    GETS: gets,
    MANY: partial(gets, threads=16),
    RANGES: ranges,
    KEPT: partial(gets, keep=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="One case of remote.py")
    parser.add_argument("case", choices=[*CASES, RESUME])
    parser.add_argument("--url", required=True)
    parser.add_argument("--plain", required=True)
    parser.add_argument("--names", type=json.loads, required=True)
    parser.add_argument("--work", type=Path, required=True)
    plan = parser.parse_args()
    modules = ["webdataset", "urllib3", "pipeline.data.stream", "pipeline.data.remote.shards", "torch"]
    for module in [*modules, *(["s3fs"] if plan.url.startswith("s3:") else [])]:
        importlib.import_module(module)
    shards = Shards(plan.url, plan.plain, plan.names)
    cache = Path(tempfile.mkdtemp(prefix="millstream-remote-", dir=plan.work))
    try:
        if plan.case == RESUME:
            print(json.dumps(resume(shards, cache)))
            return
        began, cpu = time.perf_counter(), sum(os.times()[:4])
        total = CASES[plan.case](shards, cache)
        facts = {"bytes": total, "seconds": time.perf_counter() - began, "processor": sum(os.times()[:4]) - cpu}
        print(json.dumps(facts))
    finally:
        shutil.rmtree(cache, ignore_errors=True)


if __name__ == "__main__":
    main()
