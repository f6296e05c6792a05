"""The pieces of a node: waited for only while somebody is at them, and the right ones go when it is full."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pipeline.data.reader import open_dataset
from pipeline.data.remote.cache import Cache, Place
from tests.data import small_loader
from tests.data.file_server import FileServer
from tests.data.remote.test_shards import opened, steps


def test_a_piece_that_somebody_does_not_finish_is_not_waited_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.data.remote.cache.WAIT_SECONDS", 0.1)
    one, two = Cache(Place(tmp_path)), Cache(Place(tmp_path))

    def stuck(begin: int, end: int) -> memoryview:
        held = two.get("key", begin, end, lambda begin, end: memoryview(b"12345678"))
        assert held.content == b"12345678" and held.file == -1
        return memoryview(b"12345678")

    held = one.get("key", 0, 8, stuck)
    assert os.pread(held.file, 9, 0) == b"12345678"
    os.close(held.file)
    assert two.find("key", 0, 8) is not None and two.find("key", 0, 9) is None


def test_what_is_needed_last_is_evicted_first(tmp_path: Path) -> None:
    cache, now = Cache(Place(tmp_path, 1000)), time.time()
    for number, after in enumerate((30, 500, 5, 10_000, 60)):
        held = cache.get(
            "key", 200 * number, 200 * number + 200, lambda begin, end: memoryview(bytes(200)), now + after
        )
        os.close(held.file)
    os.close(cache.get("key", 1000, 1200, lambda begin, end: memoryview(bytes(200)), now + 1).file)
    left = {int(path.name.partition("-")[0]) // 200 for path in (tmp_path / "v1/key").iterdir()}
    assert left == {0, 2, 4, 5}


def test_the_cache_stays_within_its_bytes(tmp_path: Path) -> None:
    folder, size = small_loader.write(tmp_path / "train"), 40_000
    with FileServer(folder) as server, open_dataset(folder) as local, opened(server, tmp_path, size) as dataset:
        assert steps(dataset, 60) == steps(local, 60)
    assert sum(path.stat().st_size for path in (tmp_path / "v1").rglob("*") if path.is_file()) <= size + 8
