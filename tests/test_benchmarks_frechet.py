"""The Frechet distance against its closed form; all of the benchmark on a toy run."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline import config as configs
from tests import gloo, small_data
from tests.models.test_denoisers import UNET
from tests.small_session import records_of
from tests.test_benchmarks import BENCHMARKS, cells, script


@pytest.fixture
def frechet(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("frechet")


def test_the_distance_is_that_of_gaussians(frechet: Any) -> None:
    """Where covariances commute: |m1 - m2|^2 + the sum of (s1 - s2)^2. Equal sets: none, also turned ones."""
    torch.manual_seed(0)
    one = torch.randn(4000, 5)
    other = one * torch.tensor([1.0, 2.0, 1.0, 0.5, 1.0]) + torch.tensor([3.0, 0.0, 0.0, 0.0, -1.0])
    scale = one.std(dim=0)
    mean = (one.mean(0) - other.mean(0)).square().sum()
    diagonal = frechet.frechet(one, other)
    assert diagonal == pytest.approx(float(mean + (scale - other.std(0)).square().sum()), rel=2e-2)
    turn = torch.linalg.qr(torch.randn(5, 5))[0]
    assert frechet.frechet(one @ turn, other @ turn) == pytest.approx(diagonal, rel=1e-4)
    assert frechet.frechet(one, one) == pytest.approx(0, abs=1e-6)


def trained(world: Any, path: Path, run: Path) -> None:
    records_of(world, configs.load(path), run)


@pytest.mark.slow
def test_a_toy_run_stands_beside_its_anchors(tmp_path: Path) -> None:
    squares = small_data.images(tmp_path / "squares", size=8)
    task = {"name": "diffusion", "image_size": 8, "channels": 1, "classes": 4, "model": UNET, "guidance": 1.5}
    data = {"train": str(squares), "evaluate": {"test": str(squares)}}
    path = small_data.config(tmp_path / "toy.yaml", task, squares, data=data, steps=5, ema={"decay": 0.5})
    gloo.run(trained, 1, path, tmp_path / "run")
    (tmp_path / "scratch").mkdir()
    grid = tmp_path / "grid.png"
    arguments = f"{tmp_path / 'run'} --samples 80 --steps 2 --guidance 2 --guidance 1 --grid {grid}"
    rows = cells(script("frechet.py", arguments, tmp_path / "scratch"))
    assert [row[0] for row in rows] == [
        "held-out real pictures", "new, guidance 2", "new, guidance 1", "new, before training",
        "a Gaussian for each pixel",
    ]  # fmt: skip
    distances = [float(row[2]) for row in rows]
    assert distances[0] < 0.1 * min(distances[1:]) and all(row[1] == "80" for row in rows)
    with Image.open(grid) as image:
        assert image.size == (12 * 9 + 1, 4 * 9)
