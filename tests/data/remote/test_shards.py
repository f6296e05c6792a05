"""A data set at a URL gives exactly the samples of the same in a folder: by any workers, through faults and kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import index
from pipeline.data.damage import ShardReport, verify
from pipeline.data.iterable import everything
from pipeline.data.reader import Dataset, Sample, open_dataset
from pipeline.data.remote.cache import Place
from pipeline.data.remote.span import PAGE
from pipeline.errors import DataError
from pipeline.object_store import StoreError
from tests.data import small_loader
from tests.data.file_server import Answer, Asked, Fault, FileServer
from tests.data.small_loader import SAMPLES, content, gathered, loader, npy
from tests.small_tars import contents, samples, write_tar

BLOCK_BYTES, STEPS = 8400, 30  # the samples of small_loader.BLOCK
QUICK = (0.01, 0.02, 0.05)  # pauses between tries


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_loader.write(tmp_path_factory.mktemp("remote") / "train")


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr("pipeline.object_store.RETRY_SECONDS", QUICK)
    with FileServer(folder) as server:
        yield server


def opened(server: FileServer, cache: Path, size: int = 1 << 30) -> Dataset:
    return open_dataset(server.url, block_bytes=BLOCK_BYTES, cache=Place(cache, size))


def steps(dataset: Dataset, count: int = STEPS, **options) -> list:
    with loader(dataset, **options) as loading:
        return [content(micro) for step in range(count) for micro in loading.step(step)]


@pytest.mark.parametrize(
    ("gather", "workers"),
    [
        (None, {"threads": 0}),
        (None, {"threads": 3}),
        (gathered, {"threads": 3}),
        pytest.param(gathered, {"processes": 2}, marks=pytest.mark.slow),
    ],
)
def test_the_same_batches_as_from_a_folder(
    folder: Path, server: FileServer, tmp_path: Path, gather, workers: dict[str, int]
) -> None:
    with open_dataset(folder) as local:
        wanted = steps(local, gather=gather)
    with opened(server, tmp_path) as dataset:
        assert dataset.identity == local.identity
        assert steps(dataset, gather=gather, **workers) == wanted
        before = len(server.asked)
        assert steps(dataset, gather=gather, **workers) == wanted
    assert not [asked for asked in server.asked[before:] if asked.name.endswith(".tar") and asked.method == "GET"]


def test_whole_pieces_are_fetched_once(server: FileServer, tmp_path: Path) -> None:
    with opened(server, tmp_path) as dataset:
        samples = [dataset.sample(number) for number in range(SAMPLES)]
        assert [everything(sample, None)["npy"].tolist() for sample in samples] == [[i, i * i] for i in range(SAMPLES)]
        ranges = [asked for asked in server.asked if asked.name.endswith(".tar") and asked.method == "GET"]
        assert len(ranges) == len({*dataset.remote.pieces.of(np.arange(SAMPLES)).tolist()})  # type: ignore[union-attr]
        overlap = len(ranges) * 2 * PAGE
        assert server.tar_bytes() <= dataset.index.bytes + overlap


def test_a_tar_whose_fields_lie_apart_is_fetched_whole(tmp_path: Path) -> None:
    members = samples(60)
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "0.tar", members[::2] + members[1::2])
    index.build(tmp_path / "shards")
    with FileServer(tmp_path / "shards") as server, opened(server, tmp_path / "cache") as dataset:
        found = [dataset.sample(number) for number in range(60)]
        read = {sample.key: {name: bytes(sample.raw(name)) for name in sample.fields} for sample in found}
        ranges = [asked for asked in server.asked if asked.name == "0.tar" and asked.method == "GET"]
    assert read == contents(tmp_path / "shards") and len(ranges) == 1


def square(sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    return {"x": sample["npy"]}


FAULTS = {
    "errors": Answer(500),
    "unavailable": Answer(503),
    "no answer": Answer(0),
    "cut bodies": Answer(cut=100),
    "slow bodies": Answer(rate=2e5),
}


def at_first(answer: Answer) -> Fault:
    """Every request is answered so the first time, and well the second."""
    seen: set[Asked] = set()

    def fault(asked: Asked, count: int) -> Answer | None:
        first = asked not in seen and (answer.cut is None or asked.method == "GET")
        seen.add(asked)
        return answer if first else None

    return fault


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_tried_again(folder: Path, server: FileServer, tmp_path: Path, fault: str) -> None:
    with open_dataset(folder) as local:
        wanted = steps(local)
    server.fault = at_first(FAULTS[fault])
    with opened(server, tmp_path) as dataset:
        assert steps(dataset) == wanted


def test_a_server_that_does_not_answer_in_time(folder: Path, server: FileServer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.http_store.READ_SECONDS", 2.0)
    server.fault = at_first(Answer(pause=4.0))
    with open_dataset(folder) as local, opened(server, tmp_path) as dataset:
        assert steps(dataset) == steps(local)
    assert len(server.asked) > len({*server.asked})


def test_what_does_not_pass_is_named(folder: Path, server: FileServer, tmp_path: Path) -> None:
    def refuse(status: int, name: str = ".tar"):
        return lambda asked, count: Answer(status) if asked.name.endswith(name) else None

    for status, said in ((403, "access refused"), (404, "not there"), (500, "tried 4 times")):
        server.fault = refuse(status)
        with (
            opened(server, tmp_path / str(status)) as dataset,
            pytest.raises(DataError, match=rf"{server.url}/\S+\.tar: .*{said}"),
        ):
            dataset.sample(3).raw("npy")
    server.fault = refuse(404, "shards.idx")
    with pytest.raises(DataError, match=rf"{server.url}: no index of its shards; run `millstream data index"):
        opened(server, tmp_path)
    server.fault = None
    with opened(server, tmp_path) as dataset:
        server.shutdown()
        server.server_close()
        with pytest.raises(StoreError, match=r"cannot be reached .*tried 4 times; check network and endpoint"):
            dataset.sample(3).raw("npy")


def test_bytes_that_changed_on_the_way_are_fetched_once_more(folder: Path, server: FileServer, tmp_path: Path) -> None:
    def flip(data: bytes) -> bytes:
        return bytes(byte ^ 1 for byte in data)

    spoilt: set[Asked] = set()

    def fault(asked: Asked, count: int) -> Answer | None:
        if asked.name.endswith(".tar") and asked.method == "GET" and asked not in spoilt:
            spoilt.add(asked)
            return Answer(content=flip)
        return None

    server.fault = fault
    with open_dataset(folder) as local, opened(server, tmp_path) as dataset:
        assert steps(dataset, gather=gathered) == steps(local) and spoilt
    # What is wrong in the cache is not believed either, and what is wrong at its place is a bad sample.
    server.fault = None
    for piece in (tmp_path / "v1").glob("*/*-*"):
        piece.write_bytes(flip(piece.read_bytes()))
    with open_dataset(folder) as local, opened(server, tmp_path) as dataset:
        assert steps(dataset) == steps(local)
    server.fault = lambda asked, count: Answer(content=flip) if asked.name.endswith(".tar") else None
    with (
        opened(server, tmp_path / "other") as dataset,
        pytest.raises(DataError, match="are not those that were indexed"),
    ):
        dataset.sample(3).raw("npy")


def test_a_shard_that_is_replaced_while_it_is_read_is_refused(server: FileServer, tmp_path: Path) -> None:
    with opened(server, tmp_path) as dataset:
        dataset.sample(0).raw("npy")
        server.etag = lambda info: '"another"'
        with pytest.raises(DataError, match="was replaced at its place while it is read"):
            for number in range(SAMPLES):
                dataset.sample(number).raw("npy")
    with opened(server, tmp_path) as dataset:  # the other version has pieces of its own
        fetched = server.tar_bytes()
        dataset.sample(0).raw("npy")
        assert server.tar_bytes() > fetched


@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
def test_each_node_fetches_its_own_lanes(tmp_path: Path, nodes: int) -> None:
    """Eight lanes of about three blocks each, of which the first and the last may be shared with another lane."""
    folder, count, rows = tmp_path / "shards", 168, {"micro_batches": 8, "end_step": 7}
    folder.mkdir()
    for number in range(3):
        write_tar(
            folder / f"{number}.tar",
            [(f"{i:03d}.npy", npy(np.array([i, i * i]))) for i in range(56 * number, 56 * number + 56)],
        )
    index.build(folder)
    with open_dataset(folder) as local:
        block = local.index.bytes // count * small_loader.BLOCK + 2 * PAGE
    read, fetched = [], []
    for node in range(nodes):
        place = Place(tmp_path / f"{node}", 1 << 30)
        with FileServer(folder) as server, open_dataset(server.url, block_bytes=BLOCK_BYTES, cache=place) as dataset:
            assert dataset.block == small_loader.BLOCK
            read += steps(dataset, 7, rank=node, world_size=nodes, samples=count, prepare=square, **rows)
            fetched.append(server.tar_bytes())
    assert sorted(number for _, _, numbers, _ in read for number in numbers) == list(range(count))  # one epoch
    assert max(fetched) <= (24 // nodes + 2 * 8 // nodes) * block


LIMITED = """
import pathlib, resource, sys
from pipeline.data.remote.cache import Place
from pipeline.data.reader import open_dataset
from tests.data.remote.test_shards import BLOCK_BYTES, STEPS, steps
if __name__ == "__main__":
    url, local, cache, limit, workers = sys.argv[1:]
    if int(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    with open_dataset(url, block_bytes=BLOCK_BYTES, cache=Place(pathlib.Path(cache), 1 << 30)) as dataset:
        found = steps(dataset, threads=2, processes=int(workers))
        print(dataset.remote.remote.cache.take_trouble())
    with open_dataset(local) as dataset:
        assert found == steps(dataset)
    print("the same")
"""


def other(server: FileServer, folder: Path, cache: Path, limit: int = 0, workers: int = 0) -> subprocess.Popen[str]:
    script = cache.with_name("limited.py")
    script.write_text(LIMITED)
    command = [sys.executable, str(script), server.url, str(folder), str(cache), str(limit), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_is_told_and_nothing_is_lost(
    folder: Path, server: FileServer, tmp_path: Path, workers: int
) -> None:
    """No file may be longer than a page: an error of the system's as on a full disk."""
    process = other(server, folder, tmp_path / "cache", limit=PAGE, workers=workers)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert said.endswith("the same\n")
    if not workers:
        assert "takes no more (File too large)" in said and "set data.cache to another folder" in said


def test_jobs_share_a_cache_and_one_is_killed(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with FileServer(folder, pause=0.02) as server:
        first = other(server, folder, cache)
        while not list(cache.glob("v1/*/*.part")) and not list(cache.glob("v1/*/*-*")):
            assert first.poll() is None
            time.sleep(0.001)
        os.kill(first.pid, signal.SIGKILL)
        first.communicate()
        both = [other(server, folder, cache) for _ in range(2)]
        for process in both:
            said, errors = process.communicate(timeout=240)
            assert process.returncode == 0 and said.endswith("the same\n"), errors
        pieces = [asked for asked in server.asked if asked.name.endswith(".tar") and asked.method == "GET"]
        assert len(pieces) <= 2 * len({*pieces})  # those of the killed one again, but not each by each
    left = cache.glob("v1/*/*.part")  # of an index the killed one may leave some: they are evicted as pieces are
    assert all(path.parent.name == "index" for path in left)


def test_tools(folder: Path, server: FileServer, tmp_path: Path, monkeypatch) -> None:
    from pipeline.data.head import find
    from pipeline.data.preview import preview
    from pipeline.data.stats import stats

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    found, local = (stats(place).as_dict() for place in (server.url, folder))
    assert found | {"folder": None} == local | {"folder": None}
    assert preview(server.url).replace(server.url, str(folder)) == preview(folder)
    with open_dataset(server.url) as dataset:
        assert find(dataset, "s0042").number == 42
    assert all(isinstance(report, ShardReport) for report in verify(server.url))
    server.fault = lambda asked, count: Answer(content=lambda data: data[::-1]) if ".tar" in asked.name[-4:] else None
    assert {report.kind for report in verify(server.url) if not isinstance(report, ShardReport)} >= {"digest"}
