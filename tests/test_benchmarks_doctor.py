"""The mutations that the doctor is measured on: what is drawn is the same again."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def test_mutations_follow_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    draw = importlib.import_module("doctor_mutations").draw
    texts = {path.name: path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))}
    first = draw(texts, 1, 60)
    assert first == draw(texts, 1, 60) != draw(texts, 2, 60)
    assert len({(each["config"], each["what"]) for each in first}) == 60
    assert all(each["text"] != yaml.safe_dump(yaml.safe_load(texts[each["config"]]), sort_keys=False) for each in first)
