"""Samples per second of Millstream's loader, of other loaders over the same content, and of the bare work.

    tokens       rows of 1,024 tokens, one to a member of a tar
    packed       the same rows, 512 to a member
    images64     JPEGs of 64 pixels, decoded
    images224    JPEGs of 256 to 400 pixels, decoded, a random piece resized to 224
    bytes64, bytes256    the bytes of those images, as they are
    index        members per second of building an index
    resume       seconds from opening the data to the first batch, at any step

Each loader reads its own format of the same samples, in a process of its own, and each is measured in every round, in
an order drawn for that round. What counts is the ratio of samples per second *of processor time* (workers and threads
included) inside a round, its median over the rounds: it hardly feels other programs on the machine. Wall time stands
beside it. mosaicml-streaming and litdata live in a venv of their own, which must be made once:

    python benchmarks/data.py --setup-peers
    python benchmarks/data.py --save
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import venv
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import data_case
import data_content
import report

HERE = Path(__file__).parent
OURS = "millstream"
PEERS_INTERPRETER = ("mosaicml-streaming", "mosaicml-streaming, Pillow", "litdata")
WITHOUT_DEPENDENCIES = ("mosaicml-streaming==0.13.0", "litdata==0.2.76", "torchvision==0.28.0")
PHOTOGRAPHS = ("scikit-image", "scikit-learn")  # only their files are wanted, in a folder that no import looks into
SECONDS = 300  # that one process may take, start included
BATCHES = {  # size -> group -> samples
    "full": {"tokens": 64, "packed": 1, "images64": 256, "images224": 64, "bytes64": 256, "bytes256": 64},
    "toy": {"tokens": 16, "packed": 1, "images64": 16, "images224": 4, "bytes64": 16, "bytes256": 4},
}
WITH_WORKERS = ("tokens", "images64", "images224")  # the others are measured in one process
GROUPS = (*BATCHES["full"], "index", "resume")
# (group, workers) -> loader -> least ratio. Workers are processes of the peers and threads of Millstream; 0: none.
TARGETS: dict[tuple[str, int], dict[str, float]] = {
    ("tokens", 0): {
        "webdataset": 40,
        "webdataset, equal decoder": 40,
        "litdata": 10,
        "mosaicml-streaming": 100,
        "np.memmap gather": 0.6,
    },
    ("packed", 0): {"webdataset": 5, "webdataset, equal decoder": 5, "webdataset, rows": 5},
    ("images64", 0): {"webdataset": 8, "webdataset, equal decoder": 3.5, "litdata": 1.3, "decode only": 0.9},
    ("images64", 2): {"webdataset": 7, "mosaicml-streaming": 5, "litdata": 2},
    ("images224", 0): {"webdataset": 2.8, "mosaicml-streaming": 2, "decode + crop": 0.93},
    ("images224", 2): {"webdataset": 3.5, "mosaicml-streaming": 2},
    ("bytes64", 0): {"webdataset": 50, "litdata": 4},
    ("bytes256", 0): {"webdataset": 50, "litdata": 4},
}
INDEX_TARGET, RESUME_TARGET = 100_000, 0.1  # members per second, seconds
HEADER = ["content", "workers", "loader", "samples/CPU-s", "samples/s", "millstream / it, median (range)", "target"]


class Case(NamedTuple):
    """One line of a table."""

    group: str
    workers: int
    name: str


def cases(group: str, workers: list[int], peers: bool) -> list[Case]:
    """All loaders of one group, Millstream first. Those that need the other venv only with `peers`."""
    found = []
    for number in workers if group in WITH_WORKERS else workers[:1]:
        names = [name for name, module in data_case.MODULES.items() if group in _offers(module).get(name, ())]
        if number:
            names = [name for name in names if data_case.MODULES[name] != "data_limits"]
        found += [Case(group, number, name) for name in (OURS, *names) if peers or name not in PEERS_INTERPRETER]
    return found


def _offers(module: str) -> dict[str, Any]:
    return importlib.import_module(module).CASES


def run(plan: argparse.Namespace, folder: Path, name: str, **settings: Any) -> dict[str, float]:
    """Start data_case.py, and return what it says. Raises RuntimeError with the end of its output."""
    python = plan.peers / "bin" / "python" if name in PEERS_INTERPRETER else sys.executable
    settings |= {"data": str(folder), "name": name, "warmup": plan.warmup, "seconds": plan.seconds}
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE.parent),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(folder),
        "DATA_OPTIMIZER_CACHE_FOLDER": str(folder / "cache"),
    }
    command = [str(python), str(HERE / "data_case.py"), json.dumps(settings)]
    with (folder / "said").open("w+") as said, (folder / "output").open("w+") as output:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=output, start_new_session=True)
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            output.write(f"\nno answer within {SECONDS} s")
        finally:
            _kill_group(process)  # workers that outlive it would slow the next
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{name} with {settings} failed:\n{output.read()[-3000:]}")
        said.seek(0)
        return json.loads(said.read().splitlines()[-1])


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def measure(plan: argparse.Namespace, folder: Path, group: str) -> dict[Case, list[dict[str, float]]]:
    """What each case of a group did in each round."""
    lines = cases(group, plan.workers, plan.peers_there)
    rounds: dict[Case, list[dict[str, float]]] = {case: [] for case in lines}
    for number in range(plan.rounds):
        for case in random.Random(f"{group} {number}").sample(lines, len(lines)):
            print(f"{group}: round {number + 1} of {plan.rounds}, {case.name}, {case.workers} workers", file=sys.stderr)
            batch = BATCHES[plan.size][group]
            rounds[case].append(run(plan, folder, case.name, group=group, workers=case.workers, batch=batch))
    return rounds


def rows(rounds: dict[Case, list[dict[str, float]]]) -> list[list[str]]:
    """Lines of the table."""
    table = []
    for case, measured in rounds.items():
        rates = [one["samples"] / one["processor"] for one in measured]
        walls = [one["samples"] / one["wall"] for one in measured]
        ours = [one["samples"] / one["processor"] for one in rounds[case._replace(name=OURS)]]
        ratio, verdict = "", ""
        if case.name != OURS:
            ratios = [mine / its for mine, its in zip(ours, rates)]
            ratio = f"{statistics.median(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})"
            verdict = judged(statistics.median(ratios), TARGETS.get(case[:2], {}).get(case.name))
        figures = [f"{statistics.median(values):,.0f}" for values in (rates, walls)]
        table.append([case.group, str(case.workers), case.name, *figures, ratio, verdict])
    return table


def judged(value: float, least: float | None) -> str:
    """met or MISSED, and the target; nothing without one."""
    return "" if least is None else f"{'met' if value >= least else 'MISSED'} (>= {least:g})"


def index_table(plan: argparse.Namespace, folder: Path) -> str:
    """Members per second of processor and wall time, by kind."""
    table = []
    for kind in ("tokens", "images64", "images256"):
        measured = [run(plan, folder, OURS, group="index", kind=kind) for _ in range(plan.rounds)]
        rates = [one["samples"] / one["processor"] for one in measured]
        wall = statistics.median(one["samples"] / one["wall"] for one in measured)
        middle, spread = statistics.median(rates), f"{min(rates):,.0f} to {max(rates):,.0f}"
        table.append([kind, f"{middle:,.0f}", spread, f"{wall:,.0f}", judged(middle, INDEX_TARGET)])
    return report.table(["index of", "members/CPU-s, median", "range", "members/s", "target"], table)


def resume_table(plan: argparse.Namespace, folder: Path) -> str:
    """Seconds to the first batch: at the start, in the middle and end of an epoch, after a thousand epochs."""
    table = []
    for kind in ("tokens", "images64"):
        shards, samples = data_content.SHARDS[plan.size][kind]
        batch = BATCHES[plan.size][kind]
        epoch = shards * samples // batch
        for step in (0, epoch // 2, epoch - 1, 1000 * epoch + epoch // 3):
            chosen = {"group": "resume", "kind": kind, "step": step, "batch": batch}
            seconds = [run(plan, folder, OURS, **chosen)["seconds"] for _ in range(plan.rounds)]
            most = max(seconds)
            verdict = f"{'met' if most <= RESUME_TARGET else 'MISSED'} (<= {RESUME_TARGET:g} s, all)"
            table.append([kind, f"{step:,}", f"{statistics.median(seconds):.3f}", f"{most:.3f}", verdict])
    return report.table(["content", "at step", "seconds, median", "most", "target"], table)


def setup_peers(folder: Path) -> None:
    """Make the venv of the other libraries."""
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", str(HERE / "peers.txt")], check=True)
    subprocess.run([*pip, "--no-deps", *WITHOUT_DEPENDENCIES], check=True)
    subprocess.run([*pip, "--no-deps", "--target", str(folder / "photographs"), *PHOTOGRAPHS], check=True)
    print(f"the peers are in {folder}")


def write_formats(plan: argparse.Namespace, folder: Path) -> None:
    """Have the peers write their own formats."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "DATA_OPTIMIZER_CACHE_FOLDER": str(folder / "cache")}
    python = str(plan.peers / "bin" / "python")
    subprocess.run([python, str(HERE / "data_streaming.py"), str(folder)], env=environment, check=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure loaders side by side over the same content")
    place = Path(tempfile.gettempdir())
    parser.add_argument("--data", type=Path, default=place / "millstream-data", help="where the content is kept")
    parser.add_argument("--peers", type=Path, default=place / "millstream-peers", help="venv of the other libraries")
    parser.add_argument("--setup-peers", type=Path, nargs="?", const=Path(), metavar="FOLDER", help="make it, and end")
    parser.add_argument("--no-peers", action="store_true", help="only what needs no other venv")
    parser.add_argument("--only", choices=GROUPS, action="append", help="one of them, instead of all")
    parser.add_argument("--workers", type=int, action="append", help="instead of 0 and 2")
    parser.add_argument("--size", choices=data_content.SHARDS, default="full")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=float, default=1.5, help="seconds of each case that do not count")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each case that count")
    parser.add_argument("--make", action="store_true", help="write the content, and end")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/data-<date>.md")
    plan = parser.parse_args()
    plan.workers = plan.workers or [0, 2]
    plan.peers_there = not plan.no_peers
    if plan.peers_there and plan.setup_peers is None and not (plan.peers / "photographs").is_dir():
        parser.error(f"no peers in {plan.peers}: make them with --setup-peers, or leave them out with --no-peers")
    return plan


def main() -> int:
    plan = parsed()
    if plan.setup_peers is not None:
        setup_peers(plan.peers if plan.setup_peers == Path() else plan.setup_peers)
        return 0
    load = os.getloadavg()[0]
    photographs = plan.peers / "photographs" if plan.peers_there else None
    formats = (lambda folder: write_formats(plan, folder)) if plan.peers_there else None
    folder = data_content.make(plan.data, plan.size, photographs, formats)
    if plan.make:
        return 0
    parts = []
    for group in plan.only or GROUPS:
        if group == "index":
            parts.append(index_table(plan, folder))
        elif group == "resume":
            parts.append(resume_table(plan, folder))
        else:
            parts.append(report.table(HEADER, rows(measure(plan, folder, group))))
        print(parts[-1], end="\n\n", flush=True)
    if plan.save:
        facts = [f"{plan.rounds} rounds; {plan.seconds:g} s of each case count, after {plan.warmup:g} s"]
        facts += [f"Content: {plan.size}; {sizes(folder)}", f"Loaders: {versions(plan)}"]
        path = report.save("data", report.page("Loaders", facts, "\n\n".join(parts), load))
        print(f"saved in {path}")
    return 0


def sizes(folder: Path) -> str:
    """What the content weighs."""
    import numpy as np

    kinds = ("images64", "images256")
    means = {kind: np.load(folder / kind / "members.npy")[:, 2].mean() for kind in kinds}
    return ", ".join(f"{kind} {mean:,.0f} bytes each" for kind, mean in means.items())


def versions(plan: argparse.Namespace) -> str:
    """Of the libraries that are compared."""
    found = [f"{name} {importlib.metadata.version(name)}" for name in ("webdataset", "simplejpeg", "pillow")]
    return ", ".join([*found, *(WITHOUT_DEPENDENCIES[:2] if plan.peers_there else ())]).replace("==", " ")


if __name__ == "__main__":
    raise SystemExit(main())
