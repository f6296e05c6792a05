"""Samples per second of Millstream's loop, of a bare DeepSpeed loop and of transformers' Trainer, on the same models.

    millstream   pipeline.train.train as it is: shards read and compared with their digests, decoded by the loader's
                 thread, metrics of every step in a journal that is synced to disk
    bare         forward, backward, step; batches ready in memory, no metrics: the least a person would write
    trainer      transformers' Trainer on those ready batches, with its default logging (every 500 steps)

All three take the same network, optimizer, clipping, DeepSpeed configuration, batch sizes and threads. The peers'
images lie in memory as a person would write them (contiguous [m, C, H, W]); --layout channels-last tells what comes
from that alone, since which is faster depends on network and processor. Each runs in processes of its own and they
take turns, A B C A B C: a round is some steps to warm up, which are not counted, and some that are. The figure is the
median over the rounds of the ratio within a round, so that a machine that is busy for a while slows all three alike.

Two starts of the same program differ by several percent, mostly by how often glibc's allocator returns memory to the
kernel and faults it in again. So there are several starts, and the allocator is told to keep its memory, for all three
alike; --allocator default leaves it alone.

    python benchmarks/step.py --save
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

import cases
import report
from loops import CONTENDERS
from workers import Workers

KEEP_MEMORY = {  # of glibc, read when a process starts; the threshold is the largest that it takes
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
TARGETS = {"bare": 0.95, "trainer": 1.0}


def measure(case: str, plan: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """(seconds, processor seconds) per step of rank 0 of each contender in each round that counts, all in turn."""
    with tempfile.TemporaryDirectory(prefix="millstream-step-") as folder:
        zero, precision = {"stage": plan.stage}, {"dtype": plan.dtype}
        cluster = {"workers": plan.workers, "threads_per_worker": plan.threads}
        path = cases.write(Path(folder), case, plan.size, zero=zero, precision=precision, cluster=cluster)
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
        for _ in range(plan.starts):
            shutil.rmtree(Path(folder) / "runs", ignore_errors=True)
            take_turns(plan, path, rounds)
    return rounds


def take_turns(plan: argparse.Namespace, path: Path, rounds: dict[str, list[tuple[float, float]]]) -> None:
    """One start of all contenders; adds their figures to `rounds`."""
    with ExitStack() as stack:
        started = {
            name: stack.enter_context(Workers(function, plan.workers, plan, path))
            for name, function in CONTENDERS.items()
        }
        for workers in started.values():
            workers.hear()  # ready for the first step
        for number in range(plan.rounds + 1):
            for name, workers in started.items():
                workers.say("go")
                seconds, processor_seconds = workers.hear()[0]
                if number:
                    rounds[name].append((seconds / plan.steps, processor_seconds / plan.steps))
        for workers in started.values():
            workers.say("go")
            workers.end()


def lines(case: str, size: str, rounds: dict[str, list[tuple[float, float]]]) -> list[list[str]]:
    """Rows of the table."""
    batch = (cases.CONVNETS if case == "convnet" else cases.LANGUAGES)[size]["batch"][0]
    rows = []
    for name, of_loop in rounds.items():
        ratios = [theirs / ours for (ours, _), (theirs, _) in zip(rounds["millstream"], of_loop)]
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        target = TARGETS.get(name)
        verdict = "" if target is None else f"{'met' if middle >= target else 'MISSED'} (>= {target:.2f})"
        ratio = "" if target is None else f"{middle:.3f} ({low:.3f} to {high:.3f})"
        wall, processor = (statistics.median(values) * 1000 for values in zip(*of_loop))
        rows.append([case, name, f"{batch / wall * 1000:.1f}", f"{wall:.1f}", f"{processor:.1f}", ratio, verdict])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure three training loops side by side")
    parser.add_argument("--case", choices=cases.CASES, action="append", help="one of them, instead of both")
    parser.add_argument("--size", choices=cases.SIZES, default="small", help="large: for a GPU")
    parser.add_argument("--starts", type=int, default=5, help="of fresh processes")
    parser.add_argument("--rounds", type=int, default=3, help="of each start that count")
    parser.add_argument("--steps", type=int, default=6, help="of a round that count, at least 1")
    parser.add_argument("--warmup", type=int, default=3, help="steps of a round that do not; empties the loader's lead")
    parser.add_argument("--workers", type=int, default=1, help="processes per loop")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--stage", type=int, choices=range(4), default=1, help="of ZeRO")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--layout",
        choices=("contiguous", "channels-last"),
        default="contiguous",
        help="of the peers' images in memory; what Millstream's are is its own affair",
    )
    parser.add_argument("--allocator", choices=("keep", "default"), default="keep", help="glibc's, of all loops")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/step-<date>.md")
    plan = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(plan.threads)
    if plan.allocator == "keep":
        os.environ |= KEEP_MEMORY
    load = os.getloadavg()[0]
    rows = []
    for case in plan.case or cases.CASES:
        rows += lines(case, plan.size, measure(case, plan))
    header = ["case", "loop", "samples/s", "ms/step", "CPU ms/step", "millstream / it, median (range)", "target"]
    body = report.table(header, rows)
    print(body)
    if plan.save:
        facts = [f"{plan.workers} process(es) of {plan.threads} thread(s) each, ZeRO-{plan.stage}, {plan.dtype}"]
        facts += [f"{plan.starts} starts of {plan.rounds} rounds of {plan.steps} counted steps"]
        facts += [f"Images of the peers: {plan.layout}; allocator: {plan.allocator}"]
        print(f"saved in {report.save('step', report.page('Samples per second', facts, body, load))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
