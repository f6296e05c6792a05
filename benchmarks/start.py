"""Seconds from the command to the end of the first training step, and of `millstream --help`.

    help               millstream --help
    workers 0          millstream train, one plain process
    workers 2          millstream train, 2 workers under a Ray that is started for them
    torchrun           torchrun --nproc-per-node 2 and transformers' Trainer (trainer.py), its data made in memory

The last three train the same small Llama with the same DeepSpeed settings. They take turns; the median counts. The
first step of `millstream train` is timed by its record in the journal, which may stand there up to 0.2 s late.

    python benchmarks/start.py --repeats 3 --save
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cases
import report

from pipeline import config as configs
from pipeline.track import journal

WHAT = ("help", "workers 0", "workers 2", "torchrun")
TARGET_SECONDS = {"help": 0.4}
TIMEOUT_SECONDS = 300
MILLSTREAM = [sys.executable, "-m", "pipeline"]


def run(command: list[str], folder: Path) -> float:
    """Run to the end; returns when it began. Raises RuntimeError with the end of its output when it fails."""
    output = folder / "output"
    with output.open("w") as file:
        began = time.time()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(TIMEOUT_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        raise RuntimeError(f"{' '.join(command)}: exit {code}\n{output.read_text()[-3000:]}")
    return began


def help_seconds(folder: Path, path: Path) -> float:
    """Of the whole command."""
    return -run([*MILLSTREAM, "--help"], folder) + time.time()


def train_seconds(folder: Path, path: Path, workers: int) -> float:
    """To the end of step 0, in a run folder of its own."""
    runs = folder / "runs"
    began = run([*MILLSTREAM, "train", str(path), f"runs={runs}", f"cluster.workers={workers}"], folder)
    records = journal.read(runs / "language" / "journal.jsonl").records
    return next(record["time"] for record in records if record["kind"] == "step") - began


def trainer_seconds(folder: Path, path: Path) -> float:
    """To the end of the first step of the Trainer on 2 processes."""
    from pipeline.engine import deepspeed_config

    config = configs.load(path)
    task = config.task.model_dump()
    vocabulary = json.loads((Path(task["tokenizer"]).parent / "text.json").read_text())["vocab_size"]
    settings = {
        "model": {**task["model"], "vocab_size": vocabulary, "use_cache": False},
        "rows": 64,
        "length": task["length"],
        "micro_batch_size": config.micro_batch_size,
        "micro_steps": config.micro_steps(2),
        "deepspeed": {**deepspeed_config(config, 2), "gradient_allreduce_op": "mean"},
        "output": str(folder),
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    script = str(Path(__file__).with_name("trainer.py"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    local = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    began = run([*torchrun, *local, script, str(folder / "settings.json")], folder)
    return float((folder / "first-step").read_text()) - began


MEASURES: dict[str, Callable[[Path, Path], float]] = {
    "help": help_seconds,
    "workers 0": lambda folder, path: train_seconds(folder, path, 0),
    "workers 2": lambda folder, path: train_seconds(folder, path, 2),
    "torchrun": trainer_seconds,
}
NAMES = {
    "help": "`millstream --help`, whole command",
    "workers 0": "`millstream train`, one plain process, to the first step",
    "workers 2": "`millstream train`, 2 workers under Ray, to the first step",
    "torchrun": "`torchrun --nproc-per-node 2` + Trainer, to the first step",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure how long a start takes")
    parser.add_argument("--what", choices=WHAT, action="append", help="one of them, instead of all")
    parser.add_argument("--repeats", type=int, default=3, help="of each, in turn")
    parser.add_argument("--size", choices=cases.SIZES, default="small")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/start-<date>.md")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name may not resolve
    load = os.getloadavg()[0]
    seconds: dict[str, list[float]] = {what: [] for what in options.what or WHAT}
    with tempfile.TemporaryDirectory(prefix="millstream-start-") as folder:
        path = cases.write(Path(folder), "language", options.size, steps=2, zero={"stage": 2})
        for repeat in range(options.repeats):
            for what, measured in seconds.items():
                own = Path(folder) / f"{what.replace(' ', '-')}-{repeat}"
                own.mkdir()
                measured.append(MEASURES[what](own, path))
    rows = []
    for what, measured in seconds.items():
        middle, target = statistics.median(measured), TARGET_SECONDS.get(what)
        verdict = "" if target is None else f"{'met' if middle < target else 'MISSED'} (< {target} s)"
        spread = f"{min(measured):.2f} to {max(measured):.2f}"
        rows.append([NAMES[what], f"{middle:.2f}", spread, verdict])
    body = report.table(["command", "seconds, median", "range", "target"], rows)
    print(body)
    if options.save:
        print(f"saved in {report.save('start', report.page('Seconds to start', [], body, load))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
