"""What tracking costs a training step, and what looking at every layer does: with and without it, in turns.

    tracking   with: every step's record through the session's thread, journal synced to disk, console, W&B offline
               without: the loop has its metrics, and nobody is told
    health     with: one look at every layer (health.py) in half a round; it is set against the default interval
               without: none; records are told in both

`pipeline.train.train` runs once, in one process with everything that a driver does (as with `workers: 0`), so that all
of the cost falls on the training's own interpreter: under Ray most of it is in other processes. A round is a number of
steps with records, then as many without, or the other way round. Wall time is compared within a round; the median over
the rounds counts, so that a machine that is busy for a while slows both alike. Processor time is that of the process
with all of its threads, and of W&B's own processes.

It gives up: Ray's gauges, which are set every two seconds whatever a step takes, are not in it.

    python benchmarks/tracking.py --save
    python benchmarks/tracking.py --what health --save
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cases
import report
import workers

from pipeline.sections import Track

if TYPE_CHECKING:
    from pipeline.session import World

TARGETS = {"tracking": 0.01, "health": 0.02}


def tracked(world: World, line: Connection, plan: argparse.Namespace, path: Path) -> list[tuple[bool, float, float]]:
    """Train through all rounds: (with records?, seconds, processor seconds) per step of each half round."""
    from pipeline import config as configs
    from pipeline.cluster.board import Board
    from pipeline.health import Health
    from pipeline.session import Session
    from pipeline.track import journal
    from pipeline.track.console import Console
    from pipeline.track.wandb import Wandb
    from pipeline.train import train

    config = configs.load(path, [f"steps={(2 * plan.rounds + 1) * plan.steps + 1}"])
    folder, looks = Path(config.runs) / "run", plan.what == "health"
    (folder / "attempts").mkdir(parents=True)
    board, console = Board(folder / "journal.jsonl", 1), Console(config, folder, io.StringIO())
    wandb = Wandb(config.track, folder, config.name, config.model_dump(mode="json"))
    halves: list[tuple[bool, float, float]] = []

    class Halves(Session):
        telling, began, steps = True, (0.0, 0.0), 0

        def phase(self, name: str, step: int) -> None:
            super().phase(name, step)
            if name == "data":
                self.boundary()

        def boundary(self) -> None:
            """Before a step: at the end of half a round, note it and turn. The first half warms up."""
            if self.steps % plan.steps == 0:
                time.sleep(plan.pause)  # what was told is written by now, and counts
                now = time.perf_counter() - plan.pause * (self.steps > 0), time.process_time() + children_seconds()
                number = self.steps // plan.steps
                if number > 1:
                    halves.append((self.telling, *((a - b) / plan.steps for a, b in zip(now, self.began))))
                self.telling = number % 4 in (1, 0)  # with, without; without, with; ...
                self.began = time.perf_counter(), time.process_time() + children_seconds()
            self.steps += 1

        def record(self, kind: str, **fields: Any) -> None:
            if self.telling or looks or kind != "step":
                super().record(kind, **fields)

    ended = threading.Event()

    def feed() -> None:
        for record in journal.follow(folder / "journal.jsonl", ended):
            console.show(record)
            wandb.write(record)

    (feeder := threading.Thread(target=feed)).start()
    board.record({"kind": "attempt", "workers": 1, "restarts": 0, "relaunch": False})
    session = Halves(world, folder, 1, board.deliver)
    Health.due = lambda self, step: looks and session.telling and session.steps % plan.steps == plan.steps // 2
    train(config, session)
    session.close()
    ended.set()
    feeder.join()
    wandb.close()
    board.close()
    return halves


def children_seconds() -> float:
    """Processor seconds of the processes below this one: W&B's."""
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def lines(case: str, halves: list[tuple[bool, float, float]], target: float, part: float) -> list[str]:
    """A row of the table.  part: of the cost that is seen here, what a run has by default."""
    pairs = [sorted(pair, key=lambda half: half[0]) for pair in zip(halves[::2], halves[1::2])]  # without, with
    wall = [part * (with_[1] / without[1] - 1) for without, with_ in pairs]
    processor = [part * (with_[2] - without[2]) / without[1] for without, with_ in pairs]
    without, with_ = (statistics.median(half[1] * 1000 for half in column) for column in zip(*pairs))
    middle, spent = statistics.median(wall), statistics.median(processor)
    spread = f"{middle:+.2%} ({min(wall):+.2%} to {max(wall):+.2%})"
    verdict = f"{'met' if middle <= target else 'MISSED'} (<= {target:.0%})"
    return [case, f"{without:.2f}", f"{with_:.2f}", spread, f"{spent:+.2%}", verdict]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what tracking costs a step")
    parser.add_argument("--what", choices=TARGETS, default="tracking")
    parser.add_argument("--case", choices=cases.CASES, action="append", help="one of them, instead of both")
    parser.add_argument("--size", choices=cases.SIZES, default="small", help="large: for a GPU")
    parser.add_argument("--starts", type=int, default=2, help="of fresh processes")
    parser.add_argument("--rounds", type=int, default=8, help="of each start")
    parser.add_argument("--steps", type=int, default=20, help="of half a round")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two halves, not counted as wall time")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/tracking-<date>.md")
    plan = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    part = plan.steps / (Track().health_every or plan.steps) if plan.what == "health" else 1.0
    load, rows = os.getloadavg()[0], []
    for case in plan.case or cases.CASES:
        halves: list[tuple[bool, float, float]] = []
        for _ in range(plan.starts):
            with tempfile.TemporaryDirectory(prefix="millstream-tracking-") as folder:
                path = cases.write(Path(folder), case, plan.size, track={"wandb": "offline"})
                halves += workers.run(tracked, 1, plan, path)[0]
        rows.append(lines(case, halves, TARGETS[plan.what], part))
    header = ["case", "ms/step without", "ms/step with", "cost, median (range)", "processor time, of a step", "target"]
    body = report.table(header, rows)
    print(body)
    if plan.save:
        facts = ["One process of one thread, ZeRO-1, fp32; journal, console and W&B offline against nothing"]
        facts += [f"{plan.starts} starts of {plan.rounds} rounds of {plan.steps} steps with and {plan.steps} without"]
        facts += [f"one look in {plan.steps} steps is measured, one in {Track().health_every} is told"] * (part != 1.0)
        title = {"tracking": "What tracking costs a step", "health": "What a look at every layer costs"}[plan.what]
        print(f"saved in {report.save('tracking', report.page(title, facts, body, load))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
