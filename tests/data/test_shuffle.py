"""The shuffle benchmark: its figures are what they say, and a row of it comes out again."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tests.test_benchmarks import BENCHMARKS, cells


@pytest.fixture
def shuffle(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("shuffle")


def run(*arguments: str) -> list[str]:
    command = [sys.executable, str(BENCHMARKS / "shuffle.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_figures_of_known_orders(shuffle: Any):
    samples = 25_600
    rng = np.random.default_rng(0)
    random = shuffle.quality(np.concatenate([rng.permutation(samples) for _ in range(2)]), samples)
    assert 0.85 < random.spread < 1.15 and random.neighbours < 0.03 and random.repeats < 10
    assert random.class_run < 1.03 and 91 < random.classes < 94
    straight = shuffle.quality(np.tile(np.arange(samples), 2), samples)
    assert straight.spread == pytest.approx(16, rel=0.01)  # batch means spread as single samples do
    assert straight.neighbours > 0.99 and straight.class_run == pytest.approx(256, rel=0.01) and straight.classes == 1
    again = shuffle.quality(np.repeat(np.arange(samples), 2), samples)
    assert again.repeats == samples / 2  # every second sample came just before


def test_the_default_mixes_as_promised():
    (row,) = cells(run("--seeds", "15", "--only", "default, 8 lanes, 96 blocks of 255"))
    assert float(row[1].split()[0]) <= 2.2 and row[-1] == "met (<= 2.2)"


def test_peers_mix_less_and_those_that_are_not_there_are_named():
    options = ("--seeds", "1", "--shards", "8", "--size", "500")
    lines = run(*options, "--only", "webdataset", "--peers-python", sys.executable)
    rows = cells(lines)
    assert [row[0].split(", ")[1] for row in rows[:2]] == ["shuffle() as it is: 1000", "shuffle(5000)"]
    assert float(rows[0][1].split()[0]) > 2.2
    for package in ("mosaicml-streaming", "litdata"):
        left_out = any(line.startswith(f"{package} is left out: ModuleNotFoundError") for line in lines)
        assert left_out != any(row[0].startswith(package) for row in rows)
    assert any("--peers-python names" in line for line in run(*options, "--only", "permutation"))
