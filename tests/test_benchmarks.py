"""The benchmarks and gpu-check run, at toy size; what they measure here means nothing.

Each script is started as a person does. Failures are provoked too: a rank that raises, a run that goes on wrongly.
"""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name: str, arguments: str, scratch: Path) -> list[str]:
    """Lines that a benchmark prints; it must end well and leave nothing in its temporary folder."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *arguments.split()],
        env={**os.environ, "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in scratch.iterdir() if path.name.startswith("millstream")] == []
    return done.stdout.splitlines()


def cells(lines: list[str]) -> list[list[str]]:
    """Rows of the Markdown table that stands in `lines`."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


@pytest.mark.slow
def test_a_loop_is_tracked_and_not_in_turns(tmp_path: Path) -> None:
    arguments = "--size toy --case language --starts 1 --rounds 3 --steps 3 --pause 0.6"
    (row,) = cells(script("tracking.py", arguments, tmp_path))
    assert row[0] == "language" and float(row[1]) > 0 and float(row[2]) > 0
    assert row[3].count("%") == 3 and row[5].split()[0] in ("met", "MISSED")


@pytest.mark.slow
def test_a_network_is_trained_at_two_rates_and_the_better_told(tmp_path: Path) -> None:
    arguments = f"--size toy --only both-8 --runs {tmp_path / 'kept'}"
    (row,) = cells(script("depth.py", arguments, tmp_path))
    assert row[:2] == ["both", "8"] and float(row[3]) in (0.1, 0.01) and 0 < float(row[4]) < 10
    assert all(float(norm) > 0 for norm in row[7:]) and len(row[7:]) == 6
    journals = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept" / "runs").glob("*/journal.jsonl")}
    assert len(journals) == 3 and cells(script("depth.py", arguments, tmp_path)) == [row]
    assert {path: path.stat().st_mtime_ns for path in journals} == journals  # what is done is not done again


@pytest.mark.slow
def test_exports_stand_beside_save_pretrained(tmp_path: Path) -> None:
    rows = cells(script("export.py", "--size toy --repeats 1 --shard-mb 1", tmp_path))
    assert [row[:2] for row in rows] == [
        [what, dtype] for dtype in ("float32", "bfloat16") for what in ("millstream", "save_pretrained")
    ]
    assert all(float(row[3].replace(",", "")) > 100 and row[4].startswith("MISSED") for row in rows[::2])  # toy files


@pytest.mark.slow
def test_packing_stands_beside_webdataset(tmp_path: Path) -> None:
    rows = cells(script("packing.py", "--samples 500 --workers 1 --repeats 1", tmp_path))
    assert [row[:3] for row in rows] == [[what, "1", "500"] for what in ("millstream", "webdataset")]
    assert all(float(cell.replace(",", "")) > 0 for row in rows for cell in row[3:])


@pytest.mark.slow
def test_what_is_predicted_stands_beside_what_was_read(tmp_path: Path) -> None:
    rows = cells(script("simulate.py", "--repeats 1 --steps 6 --only 1", tmp_path))
    assert [row[1] for row in rows] == ["bytes fetched, MB", "first batch, s", "waits after it, s", "waits, s"]
    for _, _, predicted, measured, verdict, _ in rows:
        off = float(predicted) / float(measured) - 1  # of rounded numbers
        assert abs(float(verdict.split("%")[0]) / 100 - off) < 0.005 + 0.02 / float(measured)
        assert verdict.endswith("met" if abs(off) < 0.07 else "MISSED" if abs(off) > 0.13 else ("met", "MISSED"))
    # how much more than its six steps a run has fetched when it ends is a matter of time: the result file tells of it
    least, whole = 6 * 128 * 0.03, 3000 * 0.045  # MB
    assert all(least < float(cell) < whole for cell in rows[0][2:4])
    assert float(rows[1][2]) > 0 and float(rows[1][3]) > 0


@pytest.mark.root
@pytest.mark.slow
def test_a_fault_stands_beside_a_cold_start(tmp_path: Path) -> None:
    lines = script("hosts.py", "--size toy --repeats 1 --fault preempt", tmp_path)
    ((fault, *seconds, _, verdict),) = cells(lines)
    cold, detected, again, useful = map(float, seconds)
    assert fault == "host preempted" and cold > 0 and 0 <= detected < again <= useful
    assert verdict.split()[0] in ("met", "MISSED") and float(verdict.split()[-1].strip(")")) > cold


def test_three_loops_take_turns(tmp_path: Path) -> None:
    rows = cells(script("step.py", "--size toy --case language --starts 1 --rounds 2 --steps 2 --warmup 1", tmp_path))
    assert [row[:2] for row in rows] == [["language", loop] for loop in ("millstream", "bare", "trainer")]
    assert all(float(row[2]) > 0 and float(row[3]) > 0 for row in rows)
    assert all(float(row[5].split()[0]) > 0 for row in rows[1:])


def test_starts_are_timed(tmp_path: Path) -> None:
    arguments = ["--size", "toy", "--repeats", "1", "--what", "help", "--what", "workers 0"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "start.py"), *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seconds = [float(row[1]) for row in cells(done.stdout.splitlines())]
    assert len(seconds) == 2 and 0 < seconds[0] < seconds[1]


@pytest.mark.slow
def test_gpu_check_runs_on_cpu_and_says_what_that_is_worth(tmp_path: Path) -> None:
    lines = script("gpu_check.py", "--cpu --stage 2 --dtype fp32", tmp_path)
    assert "says nothing about GPUs" in lines[0] and lines[-1] == lines[0]
    steps = [line.split()[:2] for line in lines[1:-1]]
    names = ("devices", "bandwidth", "loading", "training", "resume", "memory")
    assert steps == [["ok", name] for name in names], "\n".join(lines)
    resumed = next(line for line in lines if "resume" in line)
    assert resumed.count("2xZ2 same bits") == 2 and resumed.count("1xZ2") == 2


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_check")


@pytest.mark.parametrize(
    ("loss", "samples", "why"),
    [(2.1, 7, "differs by"), (math.nan, 7, "differs by"), (2.0, 8, "other samples"), (None, 7, "went on with steps")],
)
def test_gpu_check_finds_a_run_that_went_on_wrongly(gpu_check: Any, loss: float | None, samples: int, why: str) -> None:
    checks = importlib.import_module("checks")
    first = checks.SAVED_AT
    steps = {k: checks.Step(2.0, 7, 0.1) for k in range(first + 3)}
    straight = checks.Trained(steps, 1.0, 0, len(steps))
    later = {k: step for k, step in steps.items() if k >= first}
    assert gpu_check.compare("here", straight, straight._replace(steps=later), 0.0, "fp32") == 0.0
    last = {} if loss is None else {first + 2: checks.Step(loss, samples, 0.1)}
    wrong = {k: step for k, step in later.items() if k < first + 2} | last
    with pytest.raises(gpu_check.CheckFailed, match=f"here: .*{why}"):
        gpu_check.compare("here", straight, straight._replace(steps=wrong), 1e-6, "fp32")


def raise_on_rank_1(world: Any, line: Any) -> None:
    if world.rank == 1:
        raise ArithmeticError("one rank went wrong")
    world.barrier()


def test_a_failed_rank_is_named_and_the_others_end(gpu_check: Any, capsys: pytest.CaptureFixture[str]) -> None:
    workers, details = importlib.import_module("workers"), []
    with workers.Workers(raise_on_rank_1, 2) as started:
        gpu_check.perform("bandwidth", lambda: str(started.end()), details)
        processes = list(started.processes)
    assert not any(process.is_alive() for process in processes)
    assert capsys.readouterr().out.split()[:2] == ["failed", "bandwidth"]
    assert "rank 1" in details[0] and "ArithmeticError: one rank went wrong" in details[0]


def test_a_result_says_what_it_was_measured_on(gpu_check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = importlib.import_module("report")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["benchmarks/step.py", "--rounds", "3"])
    for title in ("first", "second"):
        path = report.save("step", report.page(title, ["a fact"], "the table", 0.5))
    text = path.read_text()
    assert text.index("# first") < text.index("# second")
    assert text.count("`python benchmarks/step.py --rounds 3`") == 2
    assert all(word in text for word in ("Hardware:", "cores", "torch 2", "Load average", "- a fact", "the table"))
