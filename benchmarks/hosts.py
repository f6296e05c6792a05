"""Seconds from a fault of a host to the next useful step, beside a cold start of the same run.

    worker     SIGKILL of one worker
    host       SIGKILL of all that runs on a host: the others see their connections reset
    cut        its cable is pulled: the others see nothing
    preempt    SIGTERM to its `ray start --block`
    head       the head's host is killed, with the driver; then a new cluster and the same command, from which the
               seconds count

Hosts are namespaces of this machine (tests/cluster/lab.py; needs root): a head that offers no slot and three of one
slot each, of which two train and one is the spare. Ray runs when the command is given, so a cold start is the command
alone, to the end of its first step. A useful step is one that had not been done before the fault; those between
the last checkpoint and the fault are done again first. Detected is a fault when the driver has recorded what follows,
and after the death of a driver when its lease is taken over. A record may stand in the journal 0.5 s late.

    python benchmarks/hosts.py --repeats 3 --save
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import cases
import report

from pipeline.cluster.lease import SILENCE_SECONDS
from pipeline.run import Run

sys.path.append(str(Path(__file__).parents[1]))
from tests.cluster.lab import Lab

TARGET = 1.3  # times a cold start, and what the detection takes
WARM_STEPS = 30  # before the fault: the usual length of a step is known then
SAVE_EVERY = 10
TIMEOUT_SECONDS = 300
FAULTS = {
    "worker": "worker killed",
    "host": "host killed",
    "cut": "host cut off",
    "preempt": "host preempted",
    "head": "head killed",
}


class Seconds(NamedTuple):
    """cold: of the command to its first step.  From the fault: detected, a step again, a step that was new."""

    cold: float
    detected: float
    again: float
    useful: float


def strike(lab: Lab, folder: Path, fault: str) -> str:
    """Let it happen to the worker of rank 1, or its host; that host's name."""
    host, pid = lab.workers(folder, 1)[1]
    match fault:
        case "worker":
            os.kill(pid, signal.SIGKILL)
        case "host":
            lab.kill(host)
        case "cut":
            lab.cut(host)
        case "preempt":
            lab.preempt(host)
        case "head":  # and all else: an operator or a batch system brings up a new cluster
            for name in list(lab.hosts):
                lab.kill(name)
            lab.mend()
    return host


def train(lab: Lab, name: str) -> subprocess.Popen[str]:
    command = ["python", "-m", "pipeline", "train", "convnet.yaml", f"name={name}", "--address", lab.ray_address]
    return lab.start("h0", command)


def wait_for(
    lab: Lab, folder: Path, process: subprocess.Popen[str], wanted: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """The first record of a run that is wanted. Raises RuntimeError when the run ends, or the time, before it comes."""
    give_up = time.monotonic() + TIMEOUT_SECONDS
    while process.poll() is None and time.monotonic() < give_up:
        records = Run(folder).records() if folder.exists() else []
        if found := next(filter(wanted, records), None):
            return found
        time.sleep(0.1)
    lab.send(process, signal.SIGKILL)
    raise RuntimeError(f"what was waited for did not come:\n{process.communicate()[0]}")


def measure(lab: Lab, fault: str, name: str) -> Seconds:
    """One run, one fault; then it is stopped."""
    folder = lab.shared / "runs" / name

    def step(attempt: int, least: int = 0) -> float:
        """When the first step from `least` on of this attempt had been done."""

        def wanted(record: dict[str, Any]) -> bool:
            return record["kind"] == "step" and record["attempt"] == attempt and record["step"] >= least

        return wait_for(lab, folder, process, wanted)["time"]

    lab.mend()
    began = time.time()
    process = train(lab, name)
    cold = step(1) - began
    step(1, WARM_STEPS)
    began = time.time()
    host = strike(lab, folder, fault)
    if process.poll() is not None:  # the driver too
        process.communicate()
        began = time.time()
        process = train(lab, name)
        detected = SILENCE_SECONDS
    else:
        told = wait_for(lab, folder, process, lambda record: record["kind"] in ("failure", "resize"))
        detected = told["time"] - began
    again = step(2) - began
    done = max(r["step"] for r in Run(folder).records() if r["kind"] == "step" and r["attempt"] == 1)
    useful = step(2, done + 1) - began
    lab.send(process, signal.SIGINT)
    process.communicate(timeout=TIMEOUT_SECONDS)
    if fault in ("cut", "preempt"):
        lab.kill(host)
    return Seconds(cold, detected, again, useful)


def row(name: str, measured: list[Seconds]) -> list[str]:
    """Medians, and whether the target is met."""
    cold, detected, again, useful = (median(column) for column in zip(*measured))
    bound = TARGET * cold + detected
    spread = f"{min(s.useful for s in measured):.1f} to {max(s.useful for s in measured):.1f}"
    verdict = "met" if useful <= bound else "MISSED"
    return [name, *(f"{value:.1f}" for value in (cold, detected, again, useful)), spread, f"{verdict} (<= {bound:.1f})"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure how soon a run goes on after a host is lost")
    parser.add_argument("--fault", choices=FAULTS, action="append", help="one of them, instead of all")
    parser.add_argument("--repeats", type=int, default=3, help="of each, in turn")
    parser.add_argument("--size", choices=cases.SIZES, default="small")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/hosts-<date>.md")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    seconds: dict[str, list[Seconds]] = {fault: [] for fault in options.fault or FAULTS}
    with tempfile.TemporaryDirectory(prefix="millstream-hosts-") as folder:
        keys = {"steps": 100_000, "checkpoint": {"every": SAVE_EVERY}, "cluster": {"workers": 2}}
        cases.write(Path(folder), "convnet", options.size, **keys)
        with Lab(Path(folder), 4, dashboard=False) as lab:
            for repeat in range(options.repeats):
                for fault, measured in seconds.items():
                    measured.append(measure(lab, fault, f"{fault}-{repeat}"))
                    print(FAULTS[fault], *(f"{value:.1f}" for value in measured[-1]), flush=True)
    header = ["fault", "cold start", "detected", "next step", "next useful step", "range", "target"]
    body = report.table(header, [row(FAULTS[fault], measured) for fault, measured in seconds.items()])
    print(body)
    if options.save:
        facts = [
            f"{options.repeats} of each, medians in seconds; {options.size} convnet, saved every {SAVE_EVERY} steps",
            "Ray's health check on the head: period 0.5 s, timeout 1 s, 3 misses (tests/cluster/lab.py)",
        ]
        print(f"saved in {report.save('hosts', report.page('Seconds to go on after a fault', facts, body, load))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
