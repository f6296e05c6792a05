"""Ten thousand shards and 10^8 samples: a real root, segments made when they are asked for, and a plan that is right.

benchmarks/scale.py measures the same with a million shards; how long it takes is not asked here.
"""

from __future__ import annotations

import argparse
import bisect
import importlib
import json
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data import segment
from pipeline.data.index import open_index
from pipeline.errors import DataError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ARGUMENTS = ["--shards", "10000", "--samples", str(10**8), "--steps", "4"]


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scale")


def test_a_plan_finds_its_samples(scale: Any, tmp_path: Path):
    plan = argparse.Namespace(shards=10**4, samples=10**8, steps=2, last_step=10**9, seed=3)
    touched = scale.prepare(plan, tmp_path)
    storage = scale.Generated(tmp_path, plan.seed)
    index = open_index(storage)
    counts = [shard.samples for shard in index.shards]
    assert index.samples == sum(counts) == 10**8 and len(set(counts)) > 1000 and min(counts) > 0
    assert index.bytes == sum(shard.bytes for shard in index.shards)
    storage.counts = np.array(counts)
    starts = list(accumulate(counts, initial=0))
    assert index.starts.tolist() == starts
    order, seen = scale.order_of(index, plan.seed), set()
    for step in scale.steps_of(plan):
        numbers = scale.numbers_of(order, step)
        shards, rows = index.places(numbers)
        for number, shard, row in zip(numbers.tolist(), shards.tolist(), rows.tolist()):
            assert shard == bisect.bisect_right(starts, number) - 1 and row == number - starts[shard]
            found = index.segment(shard)
            assert found.samples == counts[shard] and found.tar_bytes == index.shards[shard].bytes
            sample = found.sample(row)
            offset, length, _ = sample["jpg"]
            assert sample["cls"].offset == offset + (length + 511) // 512 * 512 + 512
            assert found.table[found.column("jpg")[row]]["offset"] == offset
            seen.add(shard)
    assert len(seen) == touched
    other = next(shard for shard in range(10**4) if shard not in seen)
    with pytest.raises(DataError, match=r"\.tar\.idx: damaged"):  # its digest was never made
        index.segment(other)


def test_generated_segments_are_like_scanned_ones(scale: Any, tmp_path: Path):
    """The generator's places are those of a tar that has samples of these lengths."""
    from tests.small_tars import write_tar

    storage = scale.Generated(tmp_path, 0)
    made = storage.made(7, 5)
    view = segment.open_segment(memoryview(made), segment.digest(made), "made", "")
    members = []
    for row in range(5):
        members += [(f"{view.key(row)}.jpg", bytes(view.sample(row)["jpg"].length))]
        members += [(f"{view.key(row)}.cls", b"%d" % ((row + 7) % 10))]
    scanned, samples, size = segment.scan_tar(write_tar(tmp_path / "0000007.tar", members))
    real = segment.open_segment(memoryview(scanned), segment.digest(scanned), "real", "")
    assert (samples, size) == (5, view.tar_bytes) and real.names == view.names
    for part in ("offset", "length", "name"):
        assert real.table[part].tolist() == view.table[part].tolist()
    labels, made_labels = real.values("cls"), view.values("cls")
    assert labels is not None and made_labels is not None and labels.tolist() == made_labels.tolist()


def test_the_benchmark_runs():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "scale.py"), *ARGUMENTS], capture_output=True, text=True, check=True
    )
    assert "10,000 shards, 100,000,000 samples; 4 steps" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 8 and all("ms" in row or "MB" in row or "GB" in row or " s" in row for row in rows), done.stdout


def test_the_measuring_process_reports_what_it_opened(scale: Any, tmp_path: Path):
    plan = argparse.Namespace(shards=100, samples=5000, steps=3, last_step=10**6, seed=0)
    scale.prepare(plan, tmp_path)
    found = json.loads(json.dumps(scale.measure(plan, tmp_path)))
    assert (found["shards"], found["samples"], len(found["plans"])) == (100, 5000, 3)
    assert found["identity"] == open_index(scale.Generated(tmp_path, 0)).identity
