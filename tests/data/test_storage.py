"""A data set in a place that is no folder: whatever has a name, bytes and perhaps a list can hold one."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data import damage
from pipeline.data.damage import Damage, ShardReport
from pipeline.data.index import build, open_index
from pipeline.data.reader import Dataset
from pipeline.data.storage import Folder, find_shards
from pipeline.errors import DataError
from tests.small_tars import contents, samples, write_tar


class InMemory:
    """A Storage over bytes."""

    block_bytes = 1 << 20

    def __init__(self, files: dict[str, bytes], listed: bool) -> None:
        self.place, self.files, self.listed = "memory", files, listed

    def map(self, name: str) -> memoryview:
        if name not in self.files:
            raise FileNotFoundError(2, "No such file", name)
        return memoryview(self.files[name])

    def segment(self, name: str, digest: str) -> memoryview:
        return self.map(f"{name}.idx")

    def close(self) -> None:
        pass

    def sizes(self, expected: int = 0) -> dict[str, int] | None:
        tars = {name: len(data) for name, data in self.files.items() if name.endswith(".tar")}
        return tars if self.listed else None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", samples(4, 4 * number))
    build(tmp_path)
    return tmp_path


@pytest.mark.parametrize("listed", [True, False])
def test_any_storage_holds_a_data_set(folder: Path, listed: bool):
    storage = InMemory({path.name: path.read_bytes() for path in folder.iterdir()}, listed)
    index = open_index(storage)
    assert index.identity == open_index(folder).identity and index.storage is storage
    assert index.tar_path(1) == "memory/1.tar"
    with Dataset(index) as dataset:
        found = [dataset.sample(number) for number in range(12)]
        assert {sample.key: {name: bytes(sample.raw(name)) for name in sample.fields} for sample in found} == contents(
            folder
        )
    assert all(isinstance(found, ShardReport) for found in damage.verify(storage))
    del storage.files["1.tar"]
    assert [found.kind for found in damage.verify(storage) if isinstance(found, Damage)] == ["missing"]
    if listed:
        with pytest.raises(DataError, match=r"memory: .*1\.tar is gone"):
            open_index(storage)
    else:
        assert open_index(storage).samples == 12
    del storage.files["shards.idx"]
    with pytest.raises(DataError, match="memory: no index of its shards"):
        open_index(storage)


def test_a_folder_lists_its_tars_and_nothing_else(folder: Path):
    (folder / ".hidden.tar").write_bytes(b"")
    (folder / "notes.txt").write_bytes(b"")
    sizes = {f"{number}.tar": (folder / f"{number}.tar").stat().st_size for number in range(3)}
    assert Folder(folder).sizes() == find_shards(folder) == sizes and list(sizes) == sorted(sizes)
    assert Folder(folder).map("notes.txt") == b""
    with pytest.raises(FileNotFoundError):
        Folder(folder).map("3.tar")
    view = Folder(folder).map("0.tar")
    assert view.readonly and view == (folder / "0.tar").read_bytes()
    (folder / "3.tar").mkdir()
    with pytest.raises(DataError, match=r"3\.tar: not a plain file"):
        find_shards(folder)
