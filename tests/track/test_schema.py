"""The journal's schema is complete: every kind that the package records stands in it, and a run's records fit it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pipeline
from pipeline.run import Run
from pipeline.track import journal
from pipeline.track.schema import HEAD, KINDS
from tests import small_data
from tests.test_train import RESNET

PACKAGE = Path(pipeline.__file__).parent
BY_VARIABLE = {"start"}  # learner.py chooses between it and restore


def recorded() -> Iterator[tuple[str, str]]:
    """(kind, place) of each record that is written: `record("kind", ...)` and `{"kind": "...", ...}`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            place = f"{path.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                named = node.func.attr in ("record", "_record") and node.args
                if named and isinstance(node.args[0], ast.Constant):
                    yield str(node.args[0].value), place
            elif isinstance(node, ast.Dict):
                keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
                kind = node.values[keys.index("kind")] if keys[:1] == ["kind"] else None
                if isinstance(kind, ast.Constant):
                    yield str(kind.value), place


def test_every_kind_that_is_recorded_is_described_and_none_else() -> None:
    found = dict(recorded())
    assert {kind: place for kind, place in found.items() if kind not in KINDS} == {}  # describe it in track/schema.py
    assert set(KINDS) - set(found) == BY_VARIABLE
    assert set(HEAD) == {*journal.HEAD, "kind"}


def test_the_records_of_a_run_have_the_keys_that_are_described(tmp_path: Path) -> None:
    pictures = str(small_data.images(tmp_path / "pictures"))
    data = {"train": pictures, "evaluate": {"test": str(small_data.images(tmp_path / "held_out", count=40))}}
    path = small_data.config(tmp_path / "toy.yaml", RESNET, tmp_path / "pictures", data=data, steps=7)
    command = [sys.executable, "-m", "pipeline", "train", str(path), "cluster.workers=0"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    environment.pop("DS_ACCELERATOR", None)  # which engine.py sets, so also in this process
    command.append("track.peak_flops=1e15")
    told: list[dict[str, Any]] = []
    for steps in (7, 8):  # the second time it goes on
        start = [*command, f"steps={steps}", "--json"]
        done = subprocess.run(start, check=True, cwd=tmp_path, capture_output=True, text=True, env=environment)
        told += map(json.loads, done.stdout.splitlines())
        assert done.stderr == ""  # no library speaks to the terminal
    assert [record["code"] for record in told if record["kind"] == "exit"] == [0, 0]
    told = [record for record in told if record["kind"] not in ("said", "exit")]
    assert told == Run(tmp_path / "runs" / "toy").records()
    assert any(note.startswith("MFU: ") for record in told for note in record.get("notes", ()))
    metrics = next(record["metrics"] for record in told if record["kind"] == "step")
    assert 0 < metrics["throughput/mfu"] < 1 and metrics["memory/host_gb"] > 0.1 and "memory/gpu_gb" not in metrics
    seen = set()
    for record in Run(tmp_path / "runs" / "toy").records():
        kind, keys = record["kind"], set(record) - set(HEAD)
        seen.add(kind)
        described = KINDS[kind]
        needed = {key for key in described if not key.endswith("?")}
        assert needed <= keys <= {key.rstrip("?") for key in described}, (kind, keys)
        assert record["v"] == journal.VERSION
    assert seen >= {"attempt", "start", "restore", "step", "evaluation", "samples", "save", "time", "end"}
