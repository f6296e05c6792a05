"""Rows of the table of memory again: what the doctor predicts, beside what a real DeepSpeed step takes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import small_data

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PROMISED = 0.1


@pytest.mark.parametrize(
    "case",
    [
        "vit 384, bf16, ZeRO 3",
        pytest.param("audio lstm as shipped", marks=pytest.mark.slow),
        pytest.param("resnet basic, 4 x 64, ZeRO 1", marks=pytest.mark.slow),
    ],
)
def test_a_step_takes_what_was_predicted(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    table = importlib.import_module("memory")
    for name in ("digits", "mnist"):
        small_data.images(tmp_path / "data" / name / "train", count=160, classes=10, size=28)
        small_data.images(tmp_path / "data" / name / "test", count=20, classes=10, size=28)
    for part in ("train", "test"):
        small_data.sounds(tmp_path / "data" / "speech" / part, count=96)
    path = tmp_path / "case" / "run.yaml"
    path.parent.mkdir()
    table.write(case, path)
    command = [sys.executable, str(BENCHMARKS / "memory.py"), "--child", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().rpartition("\n")[2])
    assert found["predicted"] == pytest.approx(found["measured"], rel=PROMISED), found
