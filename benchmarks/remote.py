"""Bytes per second of shards at a URL, beside webdataset's `pipe:curl` and plain GETs of whole shards in parallel.

A plain HTTP server on loopback, in a process of its own, waits 25 ms before each answer and then sends: once as fast as
it can, and once at no more than 60 MB/s for each connection, as object stores do (about 50 to 100 MB/s). The limit is
the same for every case and for the plain GETs; how many connections there are is each reader's own (millstream has 16,
GETs as said, pipe:curl one). Without a limit the cores are the limit: server and client share them. Every case reads
all samples of all shards once, in a process of its own that begins with nothing cached:

    millstream    a run's own loader, as a run has it by default: shuffled, digests compared, bytes kept on the disk
    webdataset    `pipe:curl` as its documentation has it, in the order of the shards, bytes not decoded
    gets          4 threads, and 16, as many as millstream has, that fetch whole shards into memory and do nothing with
                  them: what the link gives to so many connections
    gets, kept    the same, each shard written to a file, as a cache of whole shards does

Rates count from opening the data set to the last sample, imports excluded. Each case runs once in every round, in an
order drawn for that round; ratios are taken inside a round, and medians over rounds are told.

    resume    from opening the data set, nothing cached, to the first batch in the middle of an epoch
    round     plain GETs, 16 at a time, of exactly the blocks that this batch needs

    python benchmarks/remote.py --save
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import report

HERE = Path(__file__).parent
OURS, CURL, GETS, KEPT = "millstream", "webdataset, pipe:curl", "gets, 4 threads", "gets, 4 threads, kept"
MANY = "gets, 16 threads"
TARGETS = {CURL: 5.0, GETS: 0.8, MANY: 0.8}
SAMPLE_BYTES, BATCH = 26_000, 64
PAUSE = 0.025  # seconds before each answer
RATES = {"no limit": 1e12, "60 MB/s a connection": 60e6}  # bytes per second
SEED = 7


def write(folder: Path, shards: int, shard_bytes: int) -> None:
    """Shards of equal samples, bytes that nothing compresses, indexed."""
    from pipeline.data import index
    from tests.small_tars import write_tar

    rng = np.random.default_rng(0)
    count = shard_bytes // (SAMPLE_BYTES + 1024)
    for shard in range(shards):
        members = [(f"{shard:03d}-{i:05d}.bin", rng.bytes(SAMPLE_BYTES)) for i in range(count)]
        write_tar(folder / f"{shard:06d}.tar", members)
    index.build(folder)


@contextmanager
def served(folder: Path, rate: float) -> Iterator[str]:
    """The folder's URL."""
    command = [sys.executable, "-m", "tests.data.file_server", str(folder), str(PAUSE), "1e12", str(rate)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


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


def ours(url: str, names: list[str], cache: Path) -> int:
    """All samples once, through the loader of a run."""
    opened, total = stream(url, cache), 0
    with opened.loader(Bytes(), rank=0, world_size=1, first=0) as loader:
        for step in range(len(opened.datasets[0]) // BATCH):
            total += int(loader.step(step)[0].batch["bytes"].sum())
    opened.close()
    return total


def curl(url: str, names: list[str], cache: Path) -> int:
    """All samples once."""
    wds: Any = importlib.import_module("webdataset")
    sources = [f"pipe:curl -s -f {url}/{name}" for name in names]
    return sum(len(sample["bin"]) for sample in wds.WebDataset(sources, shardshuffle=False))


def gets(url: str, names: list[str], cache: Path, keep: bool = False, threads: int = 4) -> int:
    """All shards whole."""
    pool, local = _pool(threads), threading.local()

    def one(name: str) -> int:
        answer = pool.request("GET", f"{url}/{name}", preload_content=False)
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
        return sum(executor.map(one, names))


def resume(url: str, names: list[str], cache: Path) -> dict[str, float]:
    """Seconds to the first batch in the middle of an epoch, and of the block reads that it needs."""
    _pool(1).request("GET", f"{url}/shards.idx")  # what is loaded once in a process
    began = time.perf_counter()
    opened = stream(url, cache)
    first = len(opened.datasets[0]) // BATCH // 2
    with opened.loader(Bytes(), rank=0, world_size=1, first=first) as loader:
        loader.step(first)
    took = time.perf_counter() - began
    remote, tars = opened.datasets[0].remote, opened.datasets[0].index.shards
    _, _, numbers = opened.mixture.rows(first, 0, BATCH)
    needed = []
    for piece in np.unique(remote.pieces.of(numbers)).tolist():
        shard = remote.pieces.rows(piece)[0]
        begin, end = remote.open(shard)[1].extents[remote.pieces.block_in(piece)]
        needed.append((f"{url}/{tars.name(shard)}", {"Range": f"bytes={begin}-{end - 1}"}))
    opened.close()
    pool = _pool(16)
    began = time.perf_counter()
    with ThreadPoolExecutor(16) as threads:
        total = sum(threads.map(lambda one: len(pool.request("GET", one[0], headers=one[1]).data), needed))
    return {"resume": took, "round": time.perf_counter() - began, "blocks": len(needed), "bytes": total}


def _pool(size: int) -> Any:
    urllib3: Any = importlib.import_module("urllib3")
    return urllib3.PoolManager(maxsize=size)


CASES: dict[str, Callable[..., Any]] = {
    OURS: ours,
    CURL: curl,
    GETS: gets,
    MANY: partial(gets, threads=16),
    KEPT: partial(gets, keep=True),
}


def case(plan: argparse.Namespace) -> None:
    """One case in this process; says what it did as JSON."""
    names = json.loads(plan.names)
    for module in ("webdataset", "urllib3", "pipeline.data.stream", "pipeline.data.remote.shards", "torch"):
        importlib.import_module(module)
    cache = Path(tempfile.mkdtemp(prefix="millstream-remote-", dir=plan.work))
    try:
        if plan.case == "resume":
            print(json.dumps(resume(plan.url, names, cache)))
            return
        began, cpu = time.perf_counter(), sum(os.times()[:4])
        total = CASES[plan.case](plan.url, names, cache)
        facts = {"bytes": total, "seconds": time.perf_counter() - began, "processor": sum(os.times()[:4]) - cpu}
        print(json.dumps(facts))
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def run(plan: argparse.Namespace, url: str, name: str, names: list[str]) -> dict[str, float]:
    """A case in a process of its own."""
    command = [sys.executable, __file__, "--case", name, "--url", url, "--names", json.dumps(names)]
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--work", str(plan.work)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(plan: argparse.Namespace, shard_mb: int, folder: Path, limit: str) -> tuple[str, str]:
    """Two tables for shards of one size, served with one limit."""
    shards = plan.megabytes // shard_mb
    names = [f"{shard:06d}.tar" for shard in range(shards)]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in [*CASES, "resume"]}
    with served(folder, RATES[limit]) as url:
        for number in range(plan.rounds):
            for name in random.Random(number).sample([*rounds], len(rounds)):
                print(f"shards of {shard_mb} MB, {limit}: round {number + 1} of {plan.rounds}, {name}", file=sys.stderr)
                rounds[name].append(run(plan, url, name, names))
    rows = []
    for name in CASES:
        rates = [one["bytes"] / one["seconds"] / 1e6 for one in rounds[name]]
        work = [one["bytes"] / one["processor"] / 1e6 for one in rounds[name]]
        ratios = [mine["bytes"] / mine["seconds"] / 1e6 / rate for mine, rate in zip(rounds[OURS], rates)]
        middle, target = statistics.median(ratios), TARGETS.get(name)
        verdict = "" if target is None else f"{'met' if middle >= target else 'MISSED'} (>= {target:g})"
        told = "" if name == OURS else f"{middle:.3g} ({min(ratios):.3g} to {max(ratios):.3g})"
        rows.append([name, f"{statistics.median(rates):,.0f}", f"{statistics.median(work):,.0f}", told, verdict])
    header = [
        f"{shards} shards of {shard_mb} MB, {limit}",
        "MB/s",
        "MB/CPU-s of the client",
        "millstream / it, median (range)",
        "target",
    ]
    first = report.table(header, rows)
    found = rounds["resume"]
    ratios = [one["resume"] / one["round"] for one in found]
    middle = {name: statistics.median(one[name] for one in found) for name in found[0]}
    row = [
        f"{middle['blocks']:.0f} blocks, {middle['bytes'] / 1e6:.0f} MB",
        f"{middle['resume']:.3f}",
        f"{middle['round']:.3f}",
    ]
    row += [f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
    return first, report.table(
        [f"first batch after a resume needs ({limit})", "resume, s", "round, s", "resume / round"], [row]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure reading shards at a URL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=1024, help="of all shards together")
    parser.add_argument("--shard-mb", type=int, action="append", help="instead of 16 and 128")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="for shards and caches")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/remote-<date>.md")
    for hidden in ("--case", "--url", "--names"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    plan = parser.parse_args()
    if plan.case:
        case(plan)
        return 0
    load, parts = os.getloadavg()[0], []
    for shard_mb in plan.shard_mb or (16, 128):
        with tempfile.TemporaryDirectory(prefix="millstream-remote-", dir=plan.work) as folder:
            write(Path(folder), plan.megabytes // shard_mb, shard_mb * 1_000_000)
            for limit in RATES:
                parts += measure(plan, shard_mb, Path(folder), limit)
                print("\n\n".join(parts[-2:]), end="\n\n", flush=True)
    if plan.save:
        facts = [f"{plan.rounds} rounds; {PAUSE * 1000:g} ms before each answer; samples of {SAMPLE_BYTES:,} bytes"]
        facts += ["Server, client and all else share the cores"]
        path = report.save("remote", report.page("Shards at a URL", facts, "\n\n".join(parts), load))
        print(f"saved in {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
