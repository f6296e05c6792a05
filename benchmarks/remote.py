"""Bytes per second of shards at a URL, beside webdataset's `pipe:curl` and plain GETs of whole shards in parallel.

A plain HTTP server on loopback, in a process of its own, waits 25 ms before each answer and then sends: once as fast as
it can, and once at no more than 60 MB/s for each connection, as object stores do (about 50 to 100 MB/s). The limit is
the same for every case and for the plain GETs; how many connections there are is each reader's own (millstream has 16,
GETs as said, pipe:curl one). Without a limit the cores are the limit: server and client share them. A third server is
a real S3 one (moto), once as fast as it can and once with the same pause and limit; it ends the connection after each
answer. millstream reads s3:// from it, by signed addresses, and the others its plain http URLs. Every case reads all
samples of all shards once, in a process of its own that begins with nothing cached:

    millstream    a run's own loader, as a run has it by default: shuffled, digests compared, bytes kept on the disk
    webdataset    `pipe:curl` as its documentation has it, in the order of the shards, bytes not decoded
    gets          4 threads, and 16, as many as millstream has, that fetch whole shards into memory and do nothing with
                  them: what the link gives to so many connections
    gets of 4 MiB the same bytes in ranges, in no order that a trainer could use: what the server gives to blocks
    gets, kept    the same, each shard written to a file, as a cache of whole shards does

Rates count from opening the data set to the last sample, imports excluded. Each case runs once in every round, in an
order drawn for that round; ratios are taken inside a round, and medians over rounds are told.

    resume    from opening the data set, nothing cached, to the first batch in the middle of an epoch
    round     plain GETs, 16 at a time, of exactly the blocks that this batch needs

    python benchmarks/remote.py --save
    python benchmarks/remote.py --server s3 --shard-mb 16 --save    # a part of it
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import report
from remote_cases import CASES, CURL, GETS, MANY, OURS, RESUME

HERE = Path(__file__).parent
TARGETS = {CURL: 5.0, GETS: 0.8, MANY: 0.8}
SAMPLE_BYTES = 26_000
PAUSE = 0.025  # seconds before each answer

Facts = dict[str, float]


class Served(NamedTuple):
    """url: as a run names the shards.  plain: where curl finds them.  environment: what a client needs besides."""

    url: str
    plain: str
    environment: dict[str, str]


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
def http(folder: Path, rate: float) -> Iterator[Served]:
    """rate: bytes per second of each connection."""
    command = [sys.executable, "-m", "tests.data.file_server", str(folder), str(PAUSE), "1e12", str(rate)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{int(process.stdout.readline())}"
            yield Served(url, url, {})
        finally:
            process.kill()


@contextmanager
def s3(folder: Path, paced: Sequence[str] = ()) -> Iterator[Served]:
    """The shards sent to a bucket, as objects that anybody may read. paced: seconds and rate of remote_server.py."""
    from pipeline.data import send
    from pipeline.object_store import file_system
    from tests.checkpoint.object_store import BUCKET, ObjectStore

    store = ObjectStore([str(HERE / "remote_server.py"), *paced]) if paced else ObjectStore()
    store.start()
    try:
        os.environ.update(store.environment)
        send.send(folder, f"s3://{BUCKET}/set")
        files, root = file_system(f"s3://{BUCKET}/set")
        for path in folder.iterdir():
            files.chmod(f"{root}/{path.name}", "public-read")
        yield Served(f"s3://{BUCKET}/set", f"{store.endpoint}/{BUCKET}/set", store.environment)
    finally:
        store.kill()


SERVERS: dict[str, tuple[str, Callable[[Path], AbstractContextManager[Served]]]] = {
    "free": ("no limit", partial(http, rate=1e12)),
    "limited": ("60 MB/s a connection", partial(http, rate=60e6)),
    "s3": ("S3 server", s3),
    "s3-limited": ("S3 server, 60 MB/s a connection", partial(s3, paced=(str(PAUSE), "60e6"))),
}


def run(plan: argparse.Namespace, at: Served, name: str, names: list[str]) -> Facts:
    """A case in a process of its own."""
    command = [sys.executable, str(HERE / "remote_cases.py"), name, "--url", at.url, "--plain", at.plain]
    environment = {**os.environ, **at.environment, "PYTHONPATH": f"{HERE.parent}:{HERE}", "OMP_NUM_THREADS": "1"}
    command += ["--names", json.dumps(names), "--work", str(plan.work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(plan: argparse.Namespace, shard_mb: int, folder: Path, server: str) -> tuple[str, str]:
    """Two tables for shards of one size at one server."""
    limit, serve = SERVERS[server]
    shards = plan.megabytes // shard_mb
    names = [f"{shard:06d}.tar" for shard in range(shards)]
    rounds: dict[str, list[Facts]] = {name: [] for name in [*CASES, RESUME]}
    with serve(folder) as at:
        for number in range(plan.rounds):
            for name in random.Random(number).sample([*rounds], len(rounds)):
                print(f"shards of {shard_mb} MB, {limit}: round {number + 1} of {plan.rounds}, {name}", file=sys.stderr)
                rounds[name].append(run(plan, at, name, names))
    return _rates(rounds, f"{shards} shards of {shard_mb} MB, {limit}"), _first(rounds[RESUME], limit)


def _rates(rounds: dict[str, list[Facts]], what: str) -> str:
    rows = []
    for name in CASES:
        rates = [one["bytes"] / one["seconds"] / 1e6 for one in rounds[name]]
        work = [one["bytes"] / one["processor"] / 1e6 for one in rounds[name]]
        ratios = [mine["bytes"] / mine["seconds"] / 1e6 / rate for mine, rate in zip(rounds[OURS], rates)]
        middle, target = statistics.median(ratios), TARGETS.get(name)
        verdict = "" if target is None else f"{'met' if middle >= target else 'MISSED'} (>= {target:g})"
        told = "" if name == OURS else f"{middle:.3g} ({min(ratios):.3g} to {max(ratios):.3g})"
        rows.append([name, f"{statistics.median(rates):,.0f}", f"{statistics.median(work):,.0f}", told, verdict])
    header = [what, "MB/s", "MB/CPU-s of the client", "millstream / it, median (range)", "target"]
    return report.table(header, rows)


def _first(found: list[Facts], limit: str) -> str:
    ratios = [one["resume"] / one["round"] for one in found]
    middle = {name: statistics.median(one[name] for one in found) for name in found[0]}
    row = [f"{middle['blocks']:.0f} blocks, {middle['bytes'] / 1e6:.0f} MB"]
    row += [f"{middle['resume']:.3f}", f"{middle['round']:.3f}"]
    row += [f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
    header = [f"first batch after a resume needs ({limit})", "resume, s", "round, s", "resume / round"]
    return report.table(header, [row])


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Measure reading shards at a URL",
        epilog="example: python benchmarks/remote.py --server s3 --shard-mb 16 --megabytes 256 --rounds 3",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=1024, help="of all shards together")
    parser.add_argument("--shard-mb", type=int, action="append", help="instead of 16 and 128")
    parser.add_argument("--server", choices=SERVERS, action="append", help="instead of all")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="for shards and caches")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/remote-<date>.md")
    plan = parser.parse_args()
    load, parts = os.getloadavg()[0], []
    for shard_mb in plan.shard_mb or (16, 128):
        with tempfile.TemporaryDirectory(prefix="millstream-remote-", dir=plan.work) as folder:
            write(Path(folder), plan.megabytes // shard_mb, shard_mb * 1_000_000)
            for server in plan.server or SERVERS:
                parts += measure(plan, shard_mb, Path(folder), server)
                print("\n\n".join(parts[-2:]), end="\n\n", flush=True)
    if plan.save:
        facts = [
            f"{plan.rounds} rounds; samples of {SAMPLE_BYTES:,} bytes; server, client and all else share the cores"
        ]
        facts += [f"{PAUSE * 1000:g} ms before each answer, not of the S3 server (moto) without a limit"]
        path = report.save("remote", report.page("Shards at a URL", facts, "\n\n".join(parts), load))
        print(f"saved in {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
