"""`data simulate` against truth: predicted bytes and waits beside those of workers that read over a slow link.

Every node has a link of its own: a server process on loopback that pauses before each answer and shares a bandwidth
among all answers. Every worker is a process that reads through a run's own way (Stream, its cache, its loader), all of
them in lockstep: they wait for each other when each has its batch, then all sleep for as long as a step would compute.
Nothing is decoded and nothing computed, so what is compared is the reading alone. Programs have started before the
clock runs; caches are empty. "Without limits" is what the same workers wait where the link has neither latency nor
limit: that much of a wait is the machine's, and no model of a link knows it.

    python benchmarks/simulate.py --save
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import report

from pipeline.config import Config, load_resolved
from pipeline.data.pack.writer import Packing, silent, write_split
from pipeline.data.reader import Sample
from pipeline.data.remote.link import Link
from pipeline.data.remote.simulate import Forecast, Topology, of_config, simulate
from pipeline.data.stream import Stream

ROOT = Path(__file__).parents[1]
SAMPLES, SAMPLE_BYTES, SHARDS = 3000, 40_000, 8
BATCH, MICRO, BLOCK_BYTES, BLOCKS, CACHE_BYTES = 128, 32, 1 << 18, 64, 1 << 30
TOLERANCE = 0.1
CONFIG = """
name: simulated
steps: {steps}
global_batch_size: {batch}
micro_batch_size: {micro}
data:
  train: {{a: {{folder: "{place}"}}}}
  block_bytes: {block}
  shuffle_blocks: {blocks}
  cache: "{cache}"
  cache_bytes: {cache_bytes}
task: {{name: image_classification, architecture: resnet, image_size: 8, channels: 1, classes: 10}}
optim: {{name: adamw, lr: 1e-3}}
cluster: {{workers: {workers}}}
"""


class Case(NamedTuple):
    """A topology. latency: seconds.  bandwidth: bytes/s of each node.  step_seconds: of computing."""

    nodes: int
    workers: int
    latency: float
    bandwidth: float
    step_seconds: float


CASES = [Case(1, 2, 0.025, 6e6, 0.5), Case(2, 1, 0.060, 4e6, 0.4)]


class Measured(NamedTuple):
    """bytes: from the store, of each node.  waits: seconds before each step."""

    bytes: list[int]
    waits: list[float]


class Lengths:
    """A task that looks at every byte, and makes a number of it."""

    augments = False

    def prepare(self, sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        return {"bytes": np.array([len(sample.raw("bin"))])}


def write(folder: Path) -> Path:
    """Samples of uneven sizes, drawn from a seed."""
    rng = random.Random(0)
    contents = ((f"{i:06d}", {"bin": rng.randbytes(rng.randint(100, 2 * SAMPLE_BYTES))}) for i in range(SAMPLES))
    packing = Packing(shard_bytes=SAMPLES * SAMPLE_BYTES // SHARDS, min_shards=SHARDS)
    write_split(folder, contents, SAMPLES, SAMPLE_BYTES, packing, silent)
    return folder


@contextmanager
def served(folder: Path, case: Case) -> Iterator[str]:
    """The folder at a URL, over a link."""
    command = [sys.executable, "-m", "tests.data.file_server", str(folder), str(case.latency), str(case.bandwidth)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait()


def config_of(place: str | Path, cache: Path, case: Case, steps: int) -> Config:
    path = cache.with_suffix(".yaml")
    path.write_text(
        CONFIG.format(
            steps=steps,
            batch=BATCH,
            micro=MICRO,
            place=place,
            block=BLOCK_BYTES,
            blocks=BLOCKS,
            cache=cache,
            cache_bytes=CACHE_BYTES,
            workers=case.nodes * case.workers,
        )
    )
    return load_resolved(path)


def work(config: Config, rank: int, case: Case, together: Any, answers: Any) -> None:
    """One worker: (rank, bytes that it fetched, seconds before each step as all waited)."""
    world, waits = case.nodes * case.workers, []
    stream = Stream(config)
    here = range(rank - rank % case.workers, rank - rank % case.workers + case.workers)
    together.wait()
    end = time.perf_counter()
    with stream.loader(Lengths(), rank, world, 0, here) as loader:
        for step in range(config.steps):
            loader.step(step)
            together.wait()
            waits.append(time.perf_counter() - end)
            time.sleep(case.step_seconds)
            end = time.perf_counter()
    remote = stream.datasets[0].remote
    assert remote is not None
    answers.put((rank, remote.remote.fetched, waits))
    stream.close()


def measure(folder: Path, case: Case, steps: int) -> Measured:
    """One run of a case."""
    context, world = multiprocessing.get_context("spawn"), case.nodes * case.workers
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="millstream-simulate-")))
        together, answers = context.Barrier(world), context.Queue()
        workers = []
        for node in range(case.nodes):
            place = stack.enter_context(served(folder, case))
            config = config_of(place, scratch / f"cache{node}", case, steps)
            for rank in range(node * case.workers, (node + 1) * case.workers):
                workers.append(context.Process(target=work, args=(config, rank, case, together, answers)))
                workers[-1].start()
        found = sorted(answers.get(timeout=600) for _ in workers)
        for worker in workers:
            worker.join()
    fetched = [
        sum(found[rank][1] for rank in range(n * case.workers, (n + 1) * case.workers)) for n in range(case.nodes)
    ]
    return Measured(fetched, np.mean([waits for _, _, waits in found], axis=0).tolist())


def predict(folder: Path, scratch: Path, case: Case, steps: int) -> Forecast:
    mixture, sets = of_config(config_of(folder, scratch / "forecast", case, steps))
    link = Link(case.latency, case.bandwidth)
    topology = Topology(case.nodes, case.workers, MICRO, link, CACHE_BYTES, step_seconds=case.step_seconds)
    return simulate(mixture, sets, topology, steps)


def off(predicted: float, measured: float) -> str:
    share = predicted / measured - 1
    return f"{share:+.1%} {'met' if abs(share) <= TOLERANCE else 'MISSED'}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare `data simulate` with workers that read over a slow link")
    parser.add_argument("--repeats", type=int, default=3, help="of each; the median counts")
    parser.add_argument("--steps", type=int, default=SAMPLES // BATCH, help="of each run; an epoch by default")
    parser.add_argument("--only", type=int, choices=range(len(CASES)), help="one of the topologies")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/simulate-<date>.md")
    plan = parser.parse_args()
    load_before, rows = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory(prefix="millstream-simulate-") as scratch:
        folder = write(Path(scratch) / "train")
        for case in CASES if plan.only is None else [CASES[plan.only]]:
            forecast = predict(folder, Path(scratch), case, plan.steps)
            quiet = sum(measure(folder, case._replace(latency=0.0, bandwidth=1e12), plan.steps).waits)
            runs = [measure(folder, case, plan.steps) for _ in range(plan.repeats)]
            name = f"{case.nodes} x {case.workers}, {case.latency * 1e3:g} ms, {case.bandwidth / 1e6:g} MB/s"
            name += f", steps of {case.step_seconds:g} s"
            first, rest = (
                statistics.median(of(run.waits) for run in runs) for of in (lambda w: w[0], lambda w: sum(w[1:]))
            )
            fetched = statistics.median(sum(run.bytes) for run in runs)
            pairs = {
                "bytes fetched, MB": ((forecast.fetched + forecast.ahead).sum() / 1e6, fetched / 1e6),
                "first batch, s": (float(forecast.waits[0]), first),
                "waits after it, s": (float(forecast.waits[1:].sum()), rest),
                "waits, s": (float(forecast.waits.sum()), first + rest),
            }
            spread = [sum(run.waits) for run in runs]
            for what, (predicted, measured) in pairs.items():
                note = f"{min(spread):.2f} to {max(spread):.2f}; {quiet:.2f}" if what == "waits, s" else ""
                rows.append([name, what, f"{predicted:.2f}", f"{measured:.2f}", off(predicted, measured), note])
    body = report.table(
        ["nodes x workers, link", "what", "predicted", "measured, median", "off", "all; without limits"], rows
    )
    print(body)
    if plan.save:
        facts = [
            f"{SAMPLES:,} samples, mean {SAMPLE_BYTES / 1e3:g} kB, {SHARDS} shards",
            f"Blocks of {BLOCK_BYTES >> 10} KiB, {BLOCKS} shuffled together",
            f"Steps of {BATCH} samples, micro batches of {MICRO}; {plan.steps} steps, {plan.repeats} runs of each",
            f"Within {TOLERANCE:.0%} is met",
        ]
        print(f"saved: {report.save('simulate', report.page('Simulated reading', facts, body, load_before))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
