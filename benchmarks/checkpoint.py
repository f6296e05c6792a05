"""Seconds to save, to load at another number of workers, to hash; beside DeepSpeed's own ways, on the same engine.

    blocking   what training waits for: our save behind the training, ours that waits, DeepSpeed's `save_checkpoint`
    reshard    our `restore` (which first compares every byte with its sha256), beside DeepSpeed's `ds_to_universal` and
               `load_checkpoint` with `load_universal`; the start of its process and its imports are not counted
    hashing    our save that waits, with and without computing sha256
    overhead   what checkpoints and failures cost a long run, computed from these seconds (see `overhead`)

109 million parameters in bf16 with AdamW, two ranks, ZeRO 1 and 3, local disk. Ours is on the disk when it is done
(fsync); DeepSpeed leaves that to the kernel, so its seconds are given until its files are on the disk too. All ways
take turns, and the disk settles before each; a ratio is the median over the rounds of the ratio in a round. What a save
behind the training costs besides waiting (cores and memory that the writing thread shares) is not in it.

    python benchmarks/checkpoint.py --save
    python benchmarks/checkpoint.py --size toy --rounds 1
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import checkpoint_ranks
import report
import workers

STAGES = (1, 3)
DIRECTIONS = ((2, 1), (1, 2))  # ranks that save, ranks that load
BLOCKING, FASTER, HASHING, OVERHEAD = 0.10, 5.0, 0.10, 0.035  # targets
FAILURE_SECONDS = 54 * 24 * 3600 / 419  # Llama 3 405B, 16,384 GPUs: 419 unexpected interruptions in 54 days
LOST = """\
One failure in {hours:.1f} h is what Llama 3 405B had on 16,384 GPUs: 419 unexpected interruptions in 54 days (arXiv
2407.21783). At 12 bytes a parameter each of them would save 0.30 GB; here each rank saves half of the MB above. What it
takes to notice a failure and to start the processes again is not in it; that is the same for all three.
Interval T: Young 1974 and Daly 2006. Lost: wait / (T + wait) + (T / 2 + until it is there + load) / M."""
Rounds = list[dict[str, float]]


class Cost(NamedTuple):
    """Of one way to save, in seconds: training waits, until the checkpoint can be loaded, to load it."""

    wait: float
    ready: float
    load: float


def ratio(rounds: Rounds, one: str, other: str) -> tuple[float, str]:
    """Median over the rounds of one / other, and as text with its range."""
    found = [each[one] / each[other] for each in rounds]
    return statistics.median(found), f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})"


def middle(rounds: Rounds, name: str) -> float:
    return statistics.median(each[name] for each in rounds)


def verdict(met: bool, target: str) -> str:
    return f"{'met' if met else 'MISSED'} ({target})"


def blocking(by_stage: dict[int, Rounds]) -> str:
    """The table of saves."""
    lines = []
    for stage, rounds in by_stage.items():
        share, told = ratio(rounds, "blocked", "deepspeed")
        rows = [
            ("ours, behind the training: waits", "blocked", "bytes", told, verdict(share <= BLOCKING, "<= 0.10")),
            ("  of it: to compare what ranks and precisions must share", "capture", "bytes", "", ""),
            ("  of it: to copy the state within memory", "copy", "bytes", "", ""),
            ("ours, behind the training: until it is there", "behind", "bytes", "", ""),
            ("ours, waiting for it", "synchronous", "bytes", "", ""),
            ("DeepSpeed save_checkpoint", "deepspeed", "deepspeed bytes", "", ""),
            ("DeepSpeed, until it is on the disk", "deepspeed durable", "deepspeed bytes", "", ""),
        ]
        for name, key, size, against, target in rows:
            against = against or (ratio(rounds, key, "deepspeed")[1] if key != "deepspeed" else "")
            size = f"{middle(rounds, size) / 1e6:,.0f}"
            share = ratio(rounds, key, "synchronous")[1] if key == "blocked" else ""
            lines.append([str(stage), name, f"{middle(rounds, key):.3f}", size, share, against, target])
    header = ["ZeRO", "save", "seconds", "MB", "of ours, waiting", "of DeepSpeed's, median (range)", "target"]
    return report.table(header, lines)


def hashing(by_stage: dict[int, Rounds]) -> str:
    lines = []
    for stage, rounds in by_stage.items():
        shares = [1 - each["unhashed"] / each["synchronous"] for each in rounds]
        share = statistics.median(shares)
        told = f"{share:.1%} ({min(shares):.1%} to {max(shares):.1%})"
        seconds = [f"{middle(rounds, key):.3f}" for key in ("synchronous", "unhashed", "sha256")]
        lines.append([str(stage), *seconds, told, verdict(share <= HASHING, "<= 10 %")])
    header = ["ZeRO", "save, s", "without sha256, s", "sha256 alone, s", "share of the save, median (range)", "target"]
    return report.table(header, lines)


def resharding(found: dict[tuple[int, int, int], Rounds]) -> str:
    """The table of loads; `found` by (stage, ranks that saved, ranks that load)."""
    lines = []
    for (stage, saved, loaded), rounds in found.items():
        sums = [{**each, "theirs": each["convert"] + each["load"]} for each in rounds]
        times, told = ratio(sums, "theirs", "ours")
        seconds = [f"{middle(sums, key):.2f}" for key in ("ours", "convert", "load", "theirs")]
        lines.append([str(stage), f"{saved} -> {loaded}", *seconds, told, verdict(times >= FASTER, ">= 5")])
    header = [
        "ZeRO",
        "ranks",
        "ours, s",
        "ds_to_universal, s",
        "load, s",
        "sum, s",
        "sum / ours, median (range)",
        "target",
    ]
    return report.table(header, lines)


def interval(wait: float, failure_seconds: float) -> float:
    """Seconds of training between two checkpoints that cost least, each taking `wait` seconds of it.

    Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974: sqrt(2 wait M). Daly, A
    higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22(3), 2006:
    sqrt(2 wait M) (1 + sqrt(wait / 2M) / 3 + (wait / 2M) / 9) - wait, for wait < 2M.
    """
    x = wait / (2 * failure_seconds)
    return math.sqrt(2 * wait * failure_seconds) * (1 + math.sqrt(x) / 3 + x / 9) - wait


def overhead(cost: Cost, failure_seconds: float) -> tuple[float, float]:
    """(interval in seconds, share of the time that is lost): saves, at each failure the load, and what is done again.

    With T of training between saves and M between failures: wait / (T + wait) + (T / 2 + ready + load) / M. `ready`
    stands for what was trained while the newest checkpoint was still being written. A save must end before the next
    begins, so T is at least `ready`.
    """
    between = max(interval(cost.wait, failure_seconds), cost.ready)
    lost = between / 2 + cost.ready + cost.load
    return between, cost.wait / (between + cost.wait) + lost / failure_seconds


def overheads(saves: dict[int, Rounds], loads: dict[tuple[int, int, int], Rounds]) -> str:
    lines = []
    for stage, rounds in saves.items():
        by_ranks = loads[stage, 2, 1]
        load, theirs = middle(by_ranks, "ours"), middle(by_ranks, "convert") + middle(by_ranks, "load")
        synchronous, deepspeed = middle(rounds, "synchronous"), middle(rounds, "deepspeed durable")
        ways = {
            "ours, behind the training": Cost(middle(rounds, "blocked"), middle(rounds, "behind"), load),
            "ours, waiting for it": Cost(synchronous, 0.0, load),
            "DeepSpeed, until it is on the disk": Cost(deepspeed, 0.0, theirs),
        }
        for name, cost in ways.items():
            between, share = overhead(cost, FAILURE_SECONDS)
            target = verdict(share <= OVERHEAD, "<= 3.5 %") if name.startswith("ours, behind") else ""
            lines.append([str(stage), name, f"{cost.wait:.3f}", f"{between:.0f}", f"{share:.2%}", target])
    header = ["ZeRO", "save", "waits, s", "interval, s", "lost of the whole time", "target"]
    return report.table(header, lines)


def measure(plan: argparse.Namespace) -> str:
    """All tables."""
    by_stage: dict[int, Rounds] = {}
    loads: dict[tuple[int, int, int], Rounds] = {}
    for stage in plan.stage or STAGES:
        for saved, loaded in DIRECTIONS[: 1 if plan.one_way else 2]:
            with tempfile.TemporaryDirectory(prefix="millstream-checkpoint-", dir=plan.folder) as name:
                found = workers.run(checkpoint_ranks.saves, saved, plan, Path(name), stage, timeout=3600)[0]
                if saved == 2:
                    by_stage[stage] = found
                print(f"ZeRO-{stage}: saved by {saved}", flush=True)
                found = workers.run(checkpoint_ranks.loads, loaded, plan, Path(name), stage, timeout=3600)[0]
                loads[stage, saved, loaded] = found
                print(f"ZeRO-{stage}: loaded by {loaded}", flush=True)
    hours = FAILURE_SECONDS / 3600
    lost = f"Lost to checkpoints and failures, one every {hours:.1f} h"
    parts = {
        "Saving, two ranks": blocking(by_stage),
        "Loading at another number of ranks": resharding(loads),
        "Hashing": hashing(by_stage),
        lost: f"{overheads(by_stage, loads)}\n\n{LOST.format(hours=hours)}",
    }
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items())


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure checkpoints beside DeepSpeed's own")
    parser.add_argument("--size", choices=tuple(checkpoint_ranks.SIZES), default="large", help="of the network")
    parser.add_argument("--rounds", type=int, default=5, help="that count")
    parser.add_argument("--stage", type=int, choices=STAGES, action="append", help="of ZeRO, instead of both")
    parser.add_argument("--one-way", action="store_true", help="save with 2 ranks only")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; the system's temporary one without it")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/checkpoint-<date>.md")
    plan = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    load = os.getloadavg()[0]
    body = measure(plan)
    print(body)
    if plan.save:
        width, matrices = checkpoint_ranks.SIZES[plan.size]
        facts = [
            f"{width * width * matrices / 1e6:.1f} million parameters, bf16, AdamW; {plan.rounds} rounds that count"
        ]
        print(f"saved in {report.save('checkpoint', report.page('Checkpoints', facts, body, load))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
