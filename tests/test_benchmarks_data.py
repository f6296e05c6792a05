"""The benchmark of loaders runs at toy size, and all of its loaders read the same content; its figures mean nothing."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset, left before its end
WITHOUT_PEERS = ("millstream", "webdataset", "webdataset, equal decoder", "DataLoader", "np.memmap gather")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy content."""
    folder = tmp_path_factory.mktemp("content")
    run(f"--data {folder} --size toy --no-peers --make")
    return folder


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def run(arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "data.py"), *arguments.split()],
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_loaders_take_turns(data: Path) -> None:
    settings = "--size toy --no-peers --only tokens --workers 0 --rounds 2 --warmup 0 --seconds 0.01"
    lines = run(f"--data {data} {settings}")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    assert [row[:3] for row in rows] == [["tokens", "0", name] for name in WITHOUT_PEERS]
    assert all(float(cell.replace(",", "")) > 0 for row in rows for cell in row[3:5])
    assert rows[0][5:] == ["", ""]
    for row in rows[1:]:
        middle, _, low, _, high = row[5].replace("(", "( ").rstrip(")").split()
        assert 0 < float(low) <= float(middle) <= float(high)
    judged = {row[2]: row[6] for row in rows if row[6]}
    assert judged.keys() == {name for name in WITHOUT_PEERS[1:] if name != "DataLoader"}
    assert all(verdict.startswith(("met (>= ", "MISSED (>= ")) for verdict in judged.values())


@pytest.mark.parametrize("name", WITHOUT_PEERS)
def test_an_epoch_of_each_loader_holds_the_same_rows(name: str, data: Path, load: Any) -> None:
    flat = np.fromfile(data / "toy" / "tokens.bin", np.uint16).reshape(-1, 1024)
    batches = load("data_case").batches("tokens", name, data / "toy" / "tokens", 16, 0)
    # copied at once: a batch of Millstream's is good until the next one is asked for
    epoch = torch.cat([torch.as_tensor(batch).clone() for batch in islice(batches, len(flat) // 16)]).numpy()
    batches.close()
    gc.collect()  # here, where the warning is expected
    assert not np.array_equal(epoch, flat)
    assert sorted(map(bytes, epoch)) == sorted(map(bytes, flat))


@pytest.mark.parametrize("group", ["images64", "images224", "packed", "bytes64", "bytes256"])
def test_each_group_gets_what_it_promises(group: str, data: Path, load: Any) -> None:
    case, counts = load("data_case"), []
    for name in ("millstream", "webdataset", "DataLoader"):
        if name == "millstream" or group in importlib.import_module(case.MODULES[name]).CASES[name]:
            batches = case.batches(group, name, data / "toy" / case.FOLDERS[group], 2, 0)
            counts.append(case.samples(group, next(batches)))
            batches.close()
    gc.collect()
    assert counts == [2 * (512 if group == "packed" else 1)] * len(counts) and len(counts) >= 2


def test_a_batch_of_something_else_is_refused(load: Any) -> None:
    case = load("data_case")
    for group, batch in (
        ("tokens", np.zeros((4, 1025), np.uint16)),
        ("tokens", np.zeros((4, 1024), np.int64)),
        ("images64", np.zeros((4, 3, 64, 64), np.uint8)),
        ("images224", [np.zeros((224, 224, 3), np.float32)]),
        ("packed", np.zeros((4, 512, 1023), np.uint16)),
        ("bytes64", [np.zeros(3, np.uint8)]),
    ):
        with pytest.raises(ValueError, match=group):
            case.samples(group, batch)


def test_every_target_is_of_a_case_that_is_measured(load: Any) -> None:
    driver = load("data")
    for (group, workers), targets in driver.TARGETS.items():
        measured = {case.name for case in driver.cases(group, [workers], peers=True)}
        assert targets.keys() <= measured - {driver.OURS}
