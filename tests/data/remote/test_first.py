"""The first step's samples come by themselves, before the pieces that have them, and are what they would be."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import index
from pipeline.data.reader import Sample, open_dataset
from pipeline.data.remote.cache import Place
from pipeline.data.remote.crew import Wait
from tests.data.file_server import Answer, Asked, FileServer
from tests.data.small_loader import content, gathered, loader, npy
from tests.small_tars import write_tar

COUNT, NUMBERS, BLOCK_BYTES, STEPS = 90, 700, 200_000, 12  # samples of a shard, of 6 kB each
WHOLE = 20_000  # bytes: a request for more is one for a piece


def plain(sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    return {"x": sample["npy"], "key": sample["npy"][0].copy()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Members of a sample next to each other, as every tool writes them."""
    place, rng = tmp_path_factory.mktemp("first"), np.random.default_rng(0)
    for shard in range(3):
        numbers = range(shard * COUNT, (shard + 1) * COUNT)
        write_tar(
            place / f"{shard}.tar", [(f"{i:04d}.npy", npy(np.append(i, rng.integers(0, 99, NUMBERS)))) for i in numbers]
        )
    index.build(place)
    return place


def read(place: Path | str, cache: Path, steps: int = STEPS, **options) -> list:
    options = {"micro_batch": 4, "samples": 3 * COUNT, "prepare": plain} | options
    with (
        open_dataset(place, block_bytes=BLOCK_BYTES, cache=Place(cache)) as dataset,
        loader(dataset, **options) as loading,
    ):
        return [content(micro) for step in range(steps) for micro in loading.step(step)]


def is_piece(asked: Asked) -> bool:
    return asked.name.endswith(".tar") and asked.method == "GET" and asked.end - asked.begin > WHOLE


@pytest.mark.parametrize("gather", [None, gathered])
def test_it_does_not_wait_for_pieces(folder: Path, tmp_path: Path, gather) -> None:
    """No piece is sent before it has been taken; all that follows is what it is without that."""
    taken, late, options = threading.Event(), [], {"micro_batches": 1, "gather": gather}

    def fault(asked: Asked, count: int) -> None:
        if is_piece(asked) and not taken.wait(20.0):
            late.append(asked)

    with (
        FileServer(folder, fault=fault) as server,
        open_dataset(server.url, block_bytes=BLOCK_BYTES, cache=Place(tmp_path / "cache")) as dataset,
        loader(dataset, plain, micro_batch=4, samples=3 * COUNT, **options) as loading,
    ):
        found = [content(micro) for micro in loading.step(0)]
        alone = [each for each in server.asked if each.name.endswith(".tar") and each.method == "GET"]
        assert len([each for each in alone if not is_piece(each)]) == 4 and not late
        taken.set()
        found += [content(micro) for step in range(1, STEPS) for micro in loading.step(step)]
        assert any(map(is_piece, server.asked))
    assert found == read(folder, tmp_path, **options)


@pytest.mark.parametrize("where", ["samples", "pieces", "both"])
@pytest.mark.parametrize("gather", [None, gathered])
def test_bytes_that_changed_on_the_way_reach_nobody(folder: Path, tmp_path: Path, gather, where: str) -> None:
    """Once each: what comes by itself, what comes with a piece, and both."""
    spoilt: set[Asked] = set()

    def fault(asked: Asked, count: int) -> Answer | None:
        if not asked.name.endswith(".tar") or asked.method != "GET" or asked in spoilt:
            return None
        if where != "both" and is_piece(asked) != (where == "pieces"):
            return None
        spoilt.add(asked)
        return Answer(content=lambda data: bytes(byte ^ 1 for byte in data))

    wanted = read(folder, tmp_path)
    with FileServer(folder, fault=fault) as server:
        assert read(server.url, tmp_path / "cache", gather=gather) == wanted
    assert spoilt


@pytest.mark.parametrize("answer", [Answer(500), Answer(0), Answer(404)], ids=["errors", "no answer", "not there"])
def test_what_cannot_be_had_by_itself_comes_with_its_piece(
    folder: Path, tmp_path: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.object_store.RETRY_SECONDS", (0.01,))

    def fault(asked: Asked, count: int) -> Answer | None:
        return answer if asked.name.endswith(".tar") and asked.method == "GET" and not is_piece(asked) else None

    wanted = read(folder, tmp_path)
    with FileServer(folder, fault=fault) as server:
        assert read(server.url, tmp_path / "cache") == wanted


def test_what_is_in_the_cache_is_not_fetched_again(folder: Path, tmp_path: Path) -> None:
    with FileServer(folder) as server:
        found = read(server.url, tmp_path / "cache", steps=STEPS)
        before = len(server.asked)
        assert read(server.url, tmp_path / "cache", steps=STEPS) == found
        again = [asked for asked in server.asked[before:] if asked.name.endswith(".tar") and asked.method == "GET"]
    assert not [asked for asked in again if not is_piece(asked)]


def test_who_is_to_be_told_is_told_before_anybody_goes_on() -> None:
    """Else a reader may look for a sample of an open shard before it has been asked for by itself."""
    wait, order = Wait(), []
    wait.afterwards(lambda value: (time.sleep(0.1), order.append("told")))
    reader = threading.Thread(target=lambda: (wait.result(), order.append("went on")))
    reader.start()
    wait.do(lambda: None)
    reader.join()
    assert order == ["told", "went on"]
