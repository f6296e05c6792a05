"""A run under seeded chaos ends with the bits of the run in peace, and the bound that its goodput is held against."""

from __future__ import annotations

import importlib
import json
import math
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.test_benchmarks import BENCHMARKS

CHAOS = [sys.executable, str(BENCHMARKS / "chaos.py")]


@pytest.fixture
def goodput(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("chaos_goodput")


def folders() -> set[Path]:
    """What drivers and chaos put into the system's temporary folder."""
    place = Path(tempfile.gettempdir())
    return {*place.glob("millstream-ray-*"), *place.glob("millstream-chaos-*")}


def processes_of(pattern: str) -> list[str]:
    """Command lines of the processes whose environment has a run below such a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"MILLSTREAM_CHAOS={pattern}".encode() in path.read_bytes():
                found.append(path.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)  # the chaos takes two minutes, or until each kind has come; the runs in peace come on top
def test_two_minutes_of_chaos_change_nothing(tmp_path: Path) -> None:
    """Transient faults, then killed workers and drivers over data with planted NaN; see benchmarks/chaos.py."""
    before = folders()
    command = [*CHAOS, "--minutes", "2", "--seed", "1", "--json", str(tmp_path / "outcome.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    transient, persistent = json.loads((tmp_path / "outcome.json").read_text())
    for part in (transient, persistent):
        assert [check["equal"] for check in part["checks"]] == [True] * 5, part["checks"]
        assert part["manual_steps"] == 0 and part["left"] == [] and part["steps"] > 20
        assert set(part["exit_codes"]) <= {75, -signal.SIGKILL, -signal.SIGTERM} and part["exit_codes"][-1] == 75
        assert all(fault["useful"] is not None for fault in part["faults"])
        assert 0 < part["useful"] < 1 and sum(part["ledger"].values()) == pytest.approx(2 * part["wall"])
    kinds = {fault["kind"] for fault in transient["faults"]}
    assert kinds >= {"worker killed", "worker stopped", "driver killed", "driver told to stop", "one NaN"}
    assert ("disk full" in kinds) == ("disk full" in done.stdout) and transient["skipped"] == 0
    assert persistent["skipped"] > 0 and len(persistent["faults"]) >= 2
    assert folders() <= before


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind() -> None:
    """In the middle of a run of two workers."""
    before = folders()
    process = subprocess.Popen([*CHAOS, "--minutes", "5"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = next(line for line in process.stdout if "goes on, attempt 1" in line)
    [folder] = [path for path in folders() - before if path.name.startswith("millstream-chaos-")]
    assert line and processes_of(str(folder))
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and output.rstrip().endswith("stopped; nothing is left"), output
    assert processes_of(str(folder)) == [] and folders() <= before
    assert str(folder) not in Path("/proc/mounts").read_text()


@pytest.mark.parametrize(("save", "between_faults"), [(0.01, 60.0), (1.0, 60.0), (30.0, 60.0), (5.0, 10_000.0)])
def test_the_interval_is_the_best_and_near_young_s_and_daly_s(goodput: Any, save: float, between_faults: float) -> None:
    rate = 1 / between_faults
    best = goodput.interval(save, rate)
    at_best = goodput.share(best, save, rate)
    assert all(goodput.share(best * factor, save, rate) < at_best for factor in (0.5, 0.9, 1.1, 2.0))
    young, x = math.sqrt(2 * save / rate), save * rate / 2
    daly = young * (1 + math.sqrt(x) / 3 + x / 9) - save  # his estimate of higher order
    assert best == pytest.approx(daly, rel=0.01) and best == pytest.approx(young, abs=save * 1.01)
    if save * rate < 0.1:
        assert at_best == pytest.approx(1 - math.sqrt(2 * save * rate), abs=2 * save * rate)


def test_the_share_is_that_of_runs_with_faults_at_random(goodput: Any) -> None:
    """20,000 segments of 20 s and a save of 2 s, with a fault every 50 s: each begins again until it comes through."""
    draw, between, save, rate, wall = random.Random(4), 20.0, 2.0, 1 / 50, 0.0
    segments = 20_000
    for _ in range(segments):
        while (fault := draw.expovariate(rate)) < between + save:
            wall += fault
        wall += between + save
    assert goodput.share(between, save, rate) == pytest.approx(segments * between / wall, rel=0.02)


def test_the_bound_counts_starts_and_faults(goodput: Any) -> None:
    costs = goodput.Costs(wall=1000.0, start=10.0, ending=9, undoing=0, notice=2.0, restart=8.0, save=0.1)
    assert costs.up == 900.0 and goodput.bound(costs) == (math.inf, 0.9)
    undone = goodput.bound(costs._replace(undoing=9))
    best = goodput.interval(0.1, 9 / 900)
    assert undone == (best, pytest.approx(0.9 * goodput.share(best, 0.1, 0.01))) and undone.share < 0.9
    assert goodput.bound(costs._replace(undoing=9, save=0.0)).share == 0.9  # then it may save all the time


def record(kind: str, attempt: int, at: float, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "attempt": attempt, "time": at, **fields}


def step(number: int, attempt: int, at: float) -> dict[str, Any]:
    return record("step", attempt, at, step=number, metrics={"time/step_seconds": 1.0, "data/wait_seconds": 0.0})


def test_a_fault_is_followed_to_the_next_step_that_counts(goodput: Any) -> None:
    """A worker is killed, the next attempt's driver too while it does again what was lost; then a NaN."""
    records = [record("attempt", 1, 100.0, workers=2, relaunch=False), record("start", 1, 110.0, step=0)]
    records += [step(k, 1, 111.0 + k) for k in range(8)]
    records += [record("save", 1, 113.0, step=2), record("failure", 1, 121.0, exit_code=None)]
    records += [record("attempt", 2, 123.0, workers=2, relaunch=True), record("restore", 2, 126.0, step=2)]
    records += [step(2, 2, 127.0)]
    records += [record("attempt", 3, 135.0, workers=2, relaunch=False), record("restore", 3, 138.0, step=2)]
    records += [step(k, 3, 137.0 + k) for k in range(2, 6)] + [record("recompute", 3, 143.5, step=6)]
    records += [step(6, 3, 144.0), record("end", 3, 145.0, step=7, reason="stopped")]
    faults = [
        goodput.Fault("worker killed", 118.5, 1, 7),
        goodput.Fault("driver killed", 128.0, 2, 2),
        goodput.Fault("one NaN", 142.5, 3, 5),
    ]
    goodput.follow_up(faults, records, ends=[128.25, 145.5])
    assert [fault.seconds_to_notice for fault in faults] == [2.5, 0.25, 1.0]
    assert [fault.seconds_to_useful for fault in faults] == [20.5, 11.0, 1.5]  # what attempt 2 did does not count
    costs = goodput.costs(records, faults)
    assert (costs.wall, costs.start, costs.ending, costs.undoing) == (45.0, 10.0, 2, 2)
    assert costs.notice == 1.375 and costs.notice + costs.restart == (138.0 - 118.5) / 2  # together, counted once
    assert goodput.union([(3.0, 4.0), (0.0, 2.0), (1.0, 2.5), (3.5, 3.6)]) == 3.5
