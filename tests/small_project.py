"""A working directory to check configurations in: two data folders, a task of its own, and good.yaml."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import load
from pipeline.problems import InvalidConfig, Problem
from tests import small_data

TASK = """
from pathlib import Path
from pydantic import Field
from pipeline.sections import Strict
class Config(Strict):
    name: str
    width: int = Field(default=8, ge=1, description="channels")
    vocabulary: Path | None = None
class Task:
    augments = False

    def __init__(self, config):
        self.config = config
"""
GOOD: dict[str, Any] = {
    "name": "small",
    "steps": 100,
    "global_batch_size": 64,
    "micro_batch_size": 16,
    "data": {"train": "data/train", "evaluate": {"test": "data/test"}},
    "task": {"name": "house.blobs", "width": 4},
    "optim": {"name": "adamw", "lr": "3e-4"},
}


@pytest.fixture(autouse=True)
def project(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A working directory with two packed data sets, a task of its own, and good.yaml."""
    packed = tmp_path_factory.getbasetemp() / "packed"
    if not packed.is_dir():
        small_data.images(packed / "train")
        small_data.images(packed / "test", count=40)
    shutil.copytree(packed, tmp_path / "data")
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "blobs.py").write_text(TASK)
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(GOOD, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "house"]:
        del sys.modules[name]


def problems(*overrides: str, path: str = "good.yaml") -> list[Problem]:
    with pytest.raises(InvalidConfig) as caught:
        load(path, overrides)
    return caught.value.problems


def written(text: str) -> str:
    Path("other.yaml").write_text(text)
    return "other.yaml"
