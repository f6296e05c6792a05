"""A run under chaos beside the same run in peace: the same bits at the end? And how much of the time was useful?

    transient    workers and drivers are killed, stopped, told to stop, the disk is full, one loss is NaN: beside a run
                 without any fault
    persistent   samples whose loss is NaN, always; workers and drivers are killed, stopped, told to stop: beside a run
                 over the same data that nobody kills

Two workers under Ray train a small Llama on the source text of some of Python's packages. Faults come from outside, at
random moments (chaos_faults.py); W&B is away all the time. Whenever the command ends by a signal or with exit code 75,
it is started again, as a scheduler does; anything else counts as a manual step. When the time is over the run is told
to stop; the other one then trains to the same step, and every tensor of the last checkpoints, every loss, learning rate
and sample is compared. How goodput is counted, and against what, is said in chaos_goodput.py.

    python benchmarks/chaos.py --minutes 30 --seed 1 --save

What it gives up: one machine, so no host is lost. Where nothing may be mounted the disk is never full.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import cases
import chaos_report
import report
import yaml
from chaos_faults import STUCK_SECONDS, Chaos, Say
from chaos_goodput import ENDS_AN_ATTEMPT, NOTICED_BY, Fault, follow_up
from chaos_scheduler import Scheduler, Stuck, Watch, small_disk

from pipeline import same_run
from pipeline.run import Run

SHARES = {"transient": 5 / 6, "persistent": 1 / 6}  # of the minutes
MEAN_GAP_SECONDS = 60.0  # between two faults; less in a short run, so that all kinds come
DISK_MEGABYTES = 160  # of the file system that holds the checkpoints
PLANTED = tuple(range(40, 100_000, 400))  # numbers of the samples whose loss is NaN, as far as there are so many
INTERRUPTED = 130
MOUNTS = "MILLSTREAM_CHAOS_MOUNTS"  # in the environment once this process may mount
# Nobody listens there. The key is only as long as one.
AWAY = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
EQUAL = {"RAY_worker_niceness": "0"}  # as all other work of the machine; Ray puts its workers behind it (15)


class Part(NamedTuple):
    """What came of one of the two. peace: seconds that the run without faults took.  left: what did not go away."""

    name: str
    steps: int
    faults: list[Fault]
    ends: list[int]
    manual_steps: int
    checks: list[same_run.Check]
    left: list[str]
    records: list[dict[str, Any]]
    seconds: float
    peace: float

    @property
    def good(self) -> bool:
        planted = any(record["kind"] == "skip" for record in self.records)
        came = planted == (self.name == "persistent")  # what was planted, and nothing else, is skipped
        return came and not self.manual_steps and not self.left and all(check.equal for check in self.checks)


def write(folder: Path, base: dict[str, Any], name: str, **changes: Any) -> Path:
    """A configuration; its run lies in `folder`/runs/`name`."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**base, "name": name, **changes}, sort_keys=False))
    return path


def base(folder: Path) -> dict[str, Any]:
    """What all runs have in common. Pack the data."""
    values = yaml.safe_load(cases.write(folder, "language", "small").read_text())
    # A rate that does not depend on when the run will end, for nobody knows yet.
    values["optim"]["schedule"] = {"name": "constant"}
    values["task"]["name"] = "benchmarks.chaos_task"
    stall = {"start": 600, "restore": 120, "data": 60, "step": 60, "save": 120, "commit": 120}
    values["guard"] = {"stall": stall}
    values["cluster"] = {"workers": 2, "restarts": 1_000_000}
    return values | {"zero": {"stage": 2}, "steps": 1_000_000}


def part(name: str, folder: Path, values: dict[str, Any], plan: argparse.Namespace, say: Say) -> Part:
    """Chaos, then peace, then the comparison. Raises Stuck."""
    seconds = plan.minutes * 60 * SHARES[name]
    gap = min(MEAN_GAP_SECONDS, seconds / 10)
    kinds = list(NOTICED_BY) if name == "transient" else list(ENDS_AN_ATTEMPT)
    kinds = [kind for kind in kinds if kind != "disk full" or plan.mounts]
    once = folder / f"{name}-once"
    task = values["task"] | ({"once": str(once)} if name == "transient" else {"poison": list(PLANTED)})
    failure_hours = gap / 3600 * len(NOTICED_BY) / len(ENDS_AN_ATTEMPT)
    checkpoint = {"every": "auto", "failure_hours": failure_hours}
    path = write(folder, values, f"{name}-chaos", task=task, checkpoint=checkpoint, track={"wandb": "online"})
    run = Run(folder / "runs" / path.stem)
    with ExitStack() as owned:
        disk = run.folder / "checkpoints"
        if plan.mounts:
            owned.enter_context(small_disk(disk, DISK_MEGABYTES))
        scheduler = Scheduler(path, EQUAL | AWAY)
        chaos = Chaos(scheduler, run.folder, kinds, once, disk, plan.seed, say)
        owned.callback(chaos.close)
        began = time.monotonic()
        chaos.run(seconds, gap, least=len(kinds) if name == "transient" else 2)
        took = time.monotonic() - began
        left, steps = scheduler.left(), run.checkpoints()[-1].step
        say(f"step {steps:>6}  stopped; now the same {steps} steps in peace")
        peace, peaceful = in_peace(folder, values | {"task": task}, name, steps, say)
        checks = same_run.compared(peace, run, 0, steps)
        records, ends = run.records(), [at for at, _ in scheduler.ends]
        follow_up(chaos.faults, records, ends)
        codes = [code for _, code in scheduler.ends]
        return Part(name, steps, chaos.faults, codes, scheduler.manual_steps, checks, left, records, took, peaceful)


def in_peace(folder: Path, values: dict[str, Any], name: str, steps: int, say: Say) -> tuple[Run, float]:
    """The run without faults, and its seconds. Raises Stuck."""
    path = write(folder, values, f"{name}-peace", steps=steps, checkpoint={"every": 1_000_000})
    run = Run(folder / "runs" / path.stem)
    scheduler, watch, began = Scheduler(path, EQUAL), Watch(run.folder), time.monotonic()
    told = began
    try:
        scheduler.start()
        while (code := scheduler.ended()) is None:
            time.sleep(0.2)
            if time.monotonic() - told > 30:
                told = time.monotonic()
                say(f"step {watch.step:>6}  of {steps}, in peace")
            if time.monotonic() - watch.heard > STUCK_SECONDS:
                raise Stuck(f"nothing in the journal for {STUCK_SECONDS:.0f} s\n{scheduler.tail()}")
        if code:
            raise Stuck(f"the run without faults ended with exit code {code}\n{scheduler.tail()}")
    finally:
        watch.close()
        scheduler.close()
    return run, time.monotonic() - began


def may_mount() -> bool:
    """Whether this process may. It starts itself anew in a mount namespace of its own, which goes when it goes."""
    if MOUNTS in os.environ:
        return True
    unshare, user = shutil.which("unshare"), [] if os.geteuid() == 0 else ["--map-root-user"]
    if unshare is None or subprocess.run([unshare, "--mount", *user, "true"], capture_output=True).returncode:
        return False
    os.execve(unshare, [unshare, "--mount", *user, sys.executable, *sys.argv], {**os.environ, MOUNTS: "1"})


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that goes with the block; SIGINT and SIGTERM leave the block once, and cannot interrupt the way out."""

    def interrupted(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupted)
    folder = Path(tempfile.mkdtemp(prefix="millstream-chaos-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train under seeded chaos, and compare with a run in peace")
    parser.add_argument("--minutes", type=float, default=30.0, help="of chaos; the run in peace comes on top")
    parser.add_argument("--seed", type=int, default=1, help="of the faults")
    parser.add_argument("--part", choices=tuple(SHARES), action="append", help="instead of both")
    parser.add_argument("--json", type=Path, help="write the outcome to this file")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/chaos-<date>.md")
    plan = parser.parse_args()
    plan.mounts = may_mount()
    load, began = os.getloadavg()[0], time.monotonic()
    parts: list[Part] = []
    code = 0
    try:
        with scratch() as folder:
            values = base(folder)
            for name in plan.part or SHARES:

                def say(text: str, name: str = name) -> None:
                    print(f"{time.monotonic() - began:7.0f} s  {name:<10}  {text}", flush=True)

                parts.append(part(name, folder, values, plan, say))
                print(chaos_report.summary(parts[-1]), flush=True)
    except Stuck as error:
        print(f"FAILED: {error}")
        code = 1
    except KeyboardInterrupt:
        print("\nstopped; nothing is left")
        code = INTERRUPTED
    if plan.json:
        plan.json.write_text(json.dumps([chaos_report.to_json(each) for each in parts], indent=2) + "\n")
    if plan.save and parts:
        facts = chaos_report.facts(parts, plan.mounts)
        text = report.page("A run under chaos", facts, chaos_report.body(parts), load)
        print(f"saved in {report.save('chaos', text)}")
    return code or (0 if all(each.good for each in parts) else 1)


if __name__ == "__main__":
    raise SystemExit(main())
