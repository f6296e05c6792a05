"""A data set in a real S3 server: sent or indexed there, read from there, refused when it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data import send
from pipeline.data.damage import ShardReport, verify
from pipeline.data.index import open_index
from pipeline.data.reader import open_dataset
from pipeline.data.remote.cache import Place
from pipeline.data.remote.index_url import index_url
from pipeline.errors import DataError
from pipeline.object_store import open_store
from tests.checkpoint.object_store import BUCKET, ObjectStore
from tests.data import small_loader
from tests.data.file_server import FileServer
from tests.data.remote.test_shards import BLOCK_BYTES, steps


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    store = ObjectStore()
    store.start()
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pipeline.object_store.RETRY_SECONDS", (0.01, 0.02))
    yield store
    store.kill()


@pytest.mark.slow
def test_from_s3(store: ObjectStore, tmp_path: Path) -> None:
    folder = small_loader.write(tmp_path / "train")
    url = f"s3://{BUCKET}/sets/train"
    send.send(folder, url)
    cache = Place(tmp_path / "cache")
    with open_dataset(folder) as local:
        wanted = steps(local)
    for _ in range(2):
        with open_dataset(url, block_bytes=BLOCK_BYTES, cache=cache) as dataset:
            assert steps(dataset) == wanted and steps(dataset, threads=3, gather=small_loader.gathered) == wanted
            fetched = dataset.remote.remote.fetched  # type: ignore[union-attr]
    assert fetched == 0  # the second time all was in the cache
    assert all(isinstance(found, ShardReport) for found in verify(url))

    # Tars alone are indexed where they are, with the identity that they have in a folder.
    bare, there = f"s3://{BUCKET}/bare", open_store(f"s3://{BUCKET}/bare")
    for tar in sorted(folder.glob("*.tar")):
        there.put(tar, tar.name)
    with pytest.raises(DataError, match=rf"{bare}: no index of its shards; run `millstream data index {bare}`"):
        open_dataset(bare, cache=cache)
    assert index_url(bare, threads=2).identity == open_index(folder).identity
    assert (there.infos() or {}).keys() == {path.name for path in folder.iterdir() if path.suffix in (".tar", ".idx")}

    store.refuse(True)
    with pytest.raises(DataError, match=rf"s3://{BUCKET}/sets/train: .*check this store's credentials"):
        open_dataset(url, cache=cache)
    store.refuse(False)
    store.kill()
    with (
        open_dataset(folder) as local,
        pytest.raises(DataError, match=r"cannot be reached .*the same command goes on"),
    ):
        open_dataset(url, cache=cache)


def test_http_is_not_indexed(tmp_path: Path) -> None:
    with FileServer(small_loader.write(tmp_path / "train")) as server, pytest.raises(DataError, match="index a copy"):
        index_url(server.url)
