"""A shard or a link that training waits for is named, the order stays, and what is needed first comes first."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pipeline.data import slow
from pipeline.data.reader import open_dataset
from pipeline.data.remote.cache import Place
from pipeline.object_store import StoreError
from tests.data import small_loader
from tests.data.file_server import Answer, Asked, FileServer
from tests.data.small_loader import SAMPLES, content, loader

STEPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_loader.write(tmp_path_factory.mktemp("slow") / "train")


def test_a_slow_shard_is_named_with_its_server(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow, "LEAST_SECONDS", 0.3)
    monkeypatch.setattr(slow, "LEAST_READS", 1)  # all of a small shard comes in a few pieces, ahead of need
    with open_dataset(folder) as local:
        name = local.index.shards.name(local.index.locate(SAMPLES // 2)[0])
        with loader(local) as loading:
            wanted = [content(micro) for step in range(STEPS) for micro in loading.step(step)]
    named, read = [], []
    with FileServer(folder) as server:
        server.fault = lambda asked, count: Answer(rate=2e4) if asked.name == name and asked.method == "GET" else None
        with (
            open_dataset(server.url, block_bytes=8400, cache=Place(tmp_path)) as dataset,
            loader(dataset, threads=2) as loading,
        ):
            for step in range(STEPS):
                read += [content(micro) for micro in loading.step(step)]
                named += loading.slow_shards()
        assert read == wanted and [found.shard for found in named] == [f"{server.url}/{name}"]
        assert f"on {server.url} is read at" in named[0].message and named[0].rate * 10 <= named[0].others


def test_bytes_that_trickle_are_given_up_tried_again_and_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then is a sign of life: no time-out of a socket ends such an answer."""
    monkeypatch.setattr(slow, "LEAST_SECONDS", 0.3)
    monkeypatch.setattr(slow, "LEAST_READS", 1)
    monkeypatch.setattr("pipeline.http_store.READ_SECONDS", 0.5)
    monkeypatch.setattr("pipeline.object_store.RETRY_SECONDS", (0.01,))
    with open_dataset(folder) as local:
        name = local.index.shards.name(local.index.locate(SAMPLES // 2)[0])
        with loader(local) as loading:
            wanted = [content(micro) for step in range(STEPS) for micro in loading.step(step)]
    trickle, seen, named, read = Answer(rate=20), set[Asked](), [], []

    def once(asked: Asked, count: int) -> Answer | None:
        first = asked.name in (name, f"{name}.idx") and asked.method == "GET" and asked not in seen
        seen.add(asked)
        return trickle if first else None

    with FileServer(folder, fault=once) as server:
        with (
            open_dataset(server.url, block_bytes=8400, cache=Place(tmp_path / "once")) as dataset,
            loader(dataset, threads=2) as loading,
        ):
            for step in range(STEPS):
                read += [content(micro) for micro in loading.step(step)]
                named += loading.slow_shards()
        assert read == wanted and [found.shard for found in named] == [f"{server.url}/{name}"]
        for kind in (name, f"{name}.idx"):
            again = [asked for asked in server.asked if asked.name == kind and asked.method == "GET"]
            assert again and all(again.count(asked) == 2 for asked in again)

        server.fault = lambda asked, count: trickle if asked.name == name and asked.method == "GET" else None
        with (
            open_dataset(server.url, block_bytes=8400, cache=Place(tmp_path / "always")) as dataset,
            pytest.raises(StoreError, match=rf"{server.url}/{name}: only \d+ bytes came in .*, tried 2 times"),
        ):
            dataset.sample(SAMPLES // 2).raw("npy")


def test_a_slow_link_is_named_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow, "LINK_SECONDS", 0.2)
    said = []
    with (
        FileServer(folder, pause=0.2) as server,
        open_dataset(server.url, block_bytes=1000, cache=Place(tmp_path)) as dataset,
        loader(dataset, threads=1) as loading,
    ):
        for step in range(STEPS):
            loading.step(step)
            said += loading.slow_links()
        for step in range(STEPS, 2 * STEPS):  # all is in the cache now
            loading.step(step)
            assert not loading.slow_links()
    [told] = said
    assert told.startswith(f"{server.url} comes at ") and "training waits for it" in told


def test_the_first_step_comes_alone(folder: Path, tmp_path: Path) -> None:
    seen: list[Asked] = []
    come, lock = threading.Event(), threading.Lock()

    def fault(asked: Asked, count: int) -> None:
        with lock:
            if not asked.name.endswith(".tar") or asked.method != "GET" or come.is_set():
                return
            seen.append(asked)
            first = len(seen) == 1
        if first:  # all that is asked for before it has come
            come.wait(1.0)
            come.set()

    with (
        FileServer(folder) as server,
        open_dataset(server.url, block_bytes=8400, cache=Place(tmp_path)) as dataset,
    ):
        server.fault = fault
        with loader(dataset, micro_batches=1) as loading:
            loading.step(0)
            loading.step(1)
            pieces = len({asked for asked in server.asked if asked.name.endswith(".tar") and asked.method == "GET"})
    assert 1 <= len(seen) <= 3 < pieces  # a step of three samples has no more pieces
