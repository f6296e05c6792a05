"""Mutations and memory: what is drawn is the same again, and small measurements come to an end.

The scripts are started as a person does, with data that are made here.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import small_data

ROOT = Path(__file__).parents[1]


def script(name: str, arguments: list[str]) -> list[list[str]]:
    """Rows of the first table that a benchmark prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line[:1] == "|"
    ][2:]


def test_mutations_follow_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    draw = importlib.import_module("doctor_mutations").draw
    texts = {path.name: path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))}
    first = draw(texts, 1, 60)
    assert first == draw(texts, 1, 60) != draw(texts, 2, 60)
    assert len({(each["config"], each["what"]) for each in first}) == 60
    assert all(each["text"] != yaml.safe_dump(yaml.safe_load(texts[each["config"]]), sort_keys=False) for each in first)


def test_the_memory_of_a_small_network_is_near_what_is_predicted(tmp_path: Path) -> None:
    digits(tmp_path)
    ((name, predicted, measured, *_),) = script("memory.py", ["--only", "resnet basic as", "--data", str(tmp_path)])
    assert name.startswith("resnet") and abs(float(predicted) / float(measured) - 1) < 0.2


@pytest.mark.slow
def test_some_mutations_are_judged_as_real_runs_are(tmp_path: Path) -> None:
    digits(tmp_path)
    rows = script("doctor.py", ["--count", "12", "--seed", "3", "--data", str(tmp_path)])
    fail, found, runs, alarms = (sum(int(row[i]) for row in rows) for i in (1, 2, 3, 4))
    assert fail + runs >= 10 and fail == found > 0 == alarms


def digits(folder: Path) -> None:
    """Ten classes of small grey pictures, as the example has them."""
    small_data.images(folder / "digits" / "train", count=192, classes=4, size=28)
    small_data.images(folder / "digits" / "test", count=40, classes=4, size=28)
