"""A shard that comes slowly is named with its file system, and the order stays.

A disk that is slow cannot be had here. In its place every look at the bytes of one shard, which is where a page of a
mapped file would be waited for, sleeps a moment: the throttle stands before the digest that reader.py and samples.py
compute. What measures, decides and says is the real thing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from xxhash import xxh3_64_digest, xxh3_64_intdigest

from pipeline.data import reader, samples, slow
from pipeline.data.reader import open_dataset
from tests.data.small_loader import SAMPLES, content, gathered, loader, write

PAUSE = 0.03


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("slow") / "train")


@pytest.fixture
def throttled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The path of a shard whose bytes come slowly."""
    with open_dataset(folder) as dataset:
        shard = dataset.index.locate(SAMPLES // 2)[0]
        path, of_shard = dataset.index.tar_path(shard), set()
        for number in range(SAMPLES):
            if dataset.index.locate(number)[0] == shard:
                of_shard.add(bytes(dataset.sample(number).raw("npy")))

    def slowly(digest: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def looked_at(data: Any) -> Any:
            if bytes(data) in of_shard:
                time.sleep(PAUSE)
            return digest(data)

        return looked_at

    monkeypatch.setattr(reader, "xxh3_64_intdigest", slowly(xxh3_64_intdigest))
    monkeypatch.setattr(samples, "xxh3_64_digest", slowly(xxh3_64_digest))
    yield str(path)


def steps(folder: Path, count: int, **options: Any) -> tuple[list[Any], list[slow.SlowShard]]:
    """The content of so many steps, and the shards that were said to be slow."""
    found, read = [], []
    with open_dataset(folder) as dataset, loader(dataset, micro_batch=4, micro_batches=2, **options) as batches:
        for step in range(count):
            read += [content(micro) for micro in batches.step(step)]
            found += batches.slow_shards()
    return read, found


@pytest.mark.parametrize("gather", [None, gathered])
def test_a_slow_shard_is_named_once_and_the_order_stays(
    folder: Path, throttled: str, gather: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 2 * SAMPLES // 8
    read, found = steps(folder, count, gather=gather)
    monkeypatch.undo()
    assert [slow_shard.shard for slow_shard in found] == [throttled]
    assert found[0].rate * slow.SLOWER <= found[0].others
    assert f"shard {throttled} on {slow.file_system(throttled)} is read at" in found[0].message
    assert read == steps(folder, count, gather=None, threads=0)[0]


def test_no_shard_is_named_when_all_are_quick(folder: Path) -> None:
    assert steps(folder, 200)[1] == steps(folder, 200, gather=gathered)[1] == []


def test_shards_that_are_equally_slow_are_none_of_them_slow() -> None:
    draw = np.random.default_rng(2)
    speeds = slow.SlowShards()
    for _ in range(1000):
        names = [f"shard-{number}" for number in draw.choice(50, 3, replace=False)]
        speeds.note({name: [100_000, 0.01 * draw.lognormal(0, 0.5)] for name in names}, waited=0.05)
        assert speeds.found(names) == []


def test_the_file_system_of_a_path_is_that_of_the_kernel(tmp_path: Path) -> None:
    assert slow.file_system("/proc/self") == "proc at /proc (proc)"
    kind, _, point, _ = slow.file_system(tmp_path).split(" ")
    assert kind and tmp_path.resolve().is_relative_to(point)
