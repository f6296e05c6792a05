"""The benchmarks of checkpoints and the matrix of resumes, at toy size; seconds that are measured here mean nothing."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest

from tests.test_benchmarks import BENCHMARKS, cells, script


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.slow
def test_saves_and_loads_are_timed_beside_deepspeed_s(tmp_path: Path) -> None:
    lines = script("checkpoint.py", "--size toy --rounds 1 --stage 3 --one-way", tmp_path)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| 3")]
    saves, [reshard], [hashing], lost = rows[:7], rows[7:8], rows[8:9], rows[9:]
    assert [float(row[2]) > 0 for row in saves if "of it" not in row[1]] == [True] * 5
    assert reshard[1] == "2 -> 1" and float(reshard[5]) == pytest.approx(
        float(reshard[3]) + float(reshard[4]), abs=0.02
    )
    assert float(hashing[1]) > 0 and [float(row[3]) > 0 for row in lost] == [True] * 3


def test_the_interval_is_that_of_young_and_daly(load: Any) -> None:
    checkpoint = load("checkpoint")
    month = 30 * 24 * 3600.0
    assert checkpoint.interval(1.0, month) == pytest.approx(math.sqrt(2 * month), rel=2e-3)
    at, least = checkpoint.overhead(checkpoint.Cost(60.0, 0.0, 0.0), 10_000.0)
    assert at == pytest.approx(math.sqrt(2 * 60 * 10_000) - 60 * 2 / 3, rel=0.01)
    for other in (at / 2, at * 2):
        assert 60 / (other + 60) + other / 2 / 10_000 > least
    assert checkpoint.overhead(checkpoint.Cost(0.01, 300.0, 0.0), 10_000.0)[0] == 300.0  # one save at a time


@pytest.mark.parametrize(
    ("families", "promised"),
    [
        (("convnet", "language"), [1e-3, 1e-2, 1e-6, 1e-2]),  # fp32, bf16 of each
        pytest.param(("audio", "diffusion"), [1e-6, 1e-2] * 2, marks=pytest.mark.slow),
    ],
)
def test_a_sampled_row_of_the_matrix(tmp_path: Path, families: tuple[str, ...], promised: list[float]) -> None:
    chosen = " ".join(f"--case {family}" for family in families)
    lines = script("resume_matrix.py", f"{chosen} --stage 3 --from 2 --to 2 --to 1", tmp_path)
    assert cells(lines[:8]) == []
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| 3")]
    assert [row[:3] for row in rows] == [["3", "2", "bitwise"]] * 4
    assert [float(row[3]) <= promise for row, promise in zip(rows, promised, strict=True)] == [True] * 4
    assert sum(line.endswith(": met.") for line in lines) == 4


@pytest.mark.parametrize(
    ("workers", "change", "why"),
    [
        (3, {"samples": 8}, "step 20 has other samples"),
        (3, {"rate": 0.2}, "another learning rate"),
        (2, {"loss": 2.0 + 1e-15}, "not bitwise: losses"),
        (2, {"tensor": "exp_avg of x"}, "not bitwise.*exp_avg of x"),
    ],
)
def test_a_cell_that_is_otherwise_fails(load: Any, workers: int, change: dict[str, Any], why: str) -> None:
    matrix, checks = load("resume_matrix"), load("checks")
    row = matrix.Row("language", "fp32", 1, 2)
    steps = {k: checks.Step(2.0, 7, 0.1) for k in range(matrix.END)}
    later = {k: step for k, step in steps.items() if k >= matrix.SAVED_AT}
    whole = checks.Trained(steps, 1.0, 0, len(steps))
    assert matrix.judge(row, workers, whole, whole._replace(steps=later), None).relative == 0.0
    tensor = change.pop("tensor", None)
    wrong = whole._replace(steps=later | {20: later[20]._replace(**change)})
    with pytest.raises(ArithmeticError, match=why):
        matrix.judge(row, workers, whole, wrong, tensor)
    with pytest.raises(ArithmeticError, match="went on with steps"):
        matrix.judge(row, workers, whole, whole, None)
    for loss, relative in ((2.1, pytest.approx(0.05)), (math.nan, math.inf)):
        beyond = whole._replace(steps=later | {20: later[20]._replace(loss=loss)})
        assert matrix.judge(row, 3, whole, beyond, None) == (relative, False)
    assert not matrix.as_promised({(row, 3): matrix.Cell(1e-5, False)})
    assert matrix.as_promised({(row, 3): matrix.Cell(1e-7, True), (row, 2): matrix.Cell(0.0, True)})
