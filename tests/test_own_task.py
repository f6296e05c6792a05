"""The page about a task of one's own: its files and its commands, as they stand there."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.run import Run

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "configs/own-task.md").read_text()


def block(kind: str) -> str:
    [text] = re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return text


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the page's commands were run, and what they said."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "house").mkdir()
    (folder / "house/prices.py").write_text(block("python"))
    (folder / "prices.yaml").write_text(block("yaml"))
    rng = np.random.default_rng(0)
    area, rooms, age = rng.uniform(0.3, 2, 400), rng.integers(1, 7, 400), rng.uniform(0, 1, 400)
    price = 1e5 * (2 * area + 0.3 * rooms - 0.8 * age + 0.5)
    rows = ["area,rooms,age,price", *(f"{a},{r},{y},{p}" for a, r, y, p in zip(area, rooms, age, price))]
    (folder / "houses.csv").write_text("\n".join(rows))
    script = f'set -e\nmillstream() {{ "{sys.executable}" -m pipeline "$@"; }}\n{block("bash")}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "WANDB_MODE": "disabled"}
    ran = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder, ran.stdout


def test_the_example_is_short_enough_to_be_read() -> None:
    assert len(block("python").splitlines()) <= 60


def test_it_learns(done: tuple[Path, str]) -> None:
    folder, said = done
    records = list(Run(folder / "runs/prices").records())
    errors = [each["metrics"]["eval/test/mean_error"] for each in records if each["kind"] == "evaluation"]
    assert len(errors) == 3 and errors[-1] < 0.2 < errors[0] + 0.2  # prices are about 4
    assert "done: step 300 of 300" in said and "test/mean_error" in said


def test_its_file_goes_along(done: tuple[Path, str]) -> None:
    """What would be sent has the task's file, byte for byte, under the name that the configuration imports."""
    digest = hashlib.sha256(block("python").encode()).hexdigest()[:12]
    assert re.search(rf"^ *[\d,]+  {digest}  house/prices\.py$", done[1], re.MULTILINE)
