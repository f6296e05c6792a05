"""Reading samples by number: values, laziness, threads, and bytes that changed after they were indexed."""

from __future__ import annotations

import io
import random
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import reader
from pipeline.data.index import build
from pipeline.data.reader import Sample, open_dataset
from pipeline.errors import DataError

SHARDS, ROWS = 5, 8


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard in range(SHARDS):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(shard * ROWS, (shard + 1) * ROWS):
                text = {"cls": b"%d" % number, "note.txt": "grey µ".encode(), "pkl": b"x"}
                fields = {"npy": npy(np.arange(number)), **text}
                for field, data in fields.items():
                    member = tarfile.TarInfo(f"{number:03d}.{field}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    build(tmp_path)
    return tmp_path


def test_samples_by_number(folder: Path):
    with open_dataset(folder) as dataset:
        assert len(dataset) == SHARDS * ROWS
        assert dataset.identity == dataset.index.identity
        sample = dataset.sample(13)
        assert (sample.key, sample.number, sample.fields) == ("013", 13, ("npy", "cls", "note.txt", "pkl"))
        assert "cls" in sample and "jpg" not in sample
        assert sample["cls"] == 13 and sample["note.txt"] == "grey µ"
        assert sample["npy"].tolist() == list(range(13))
        assert sample.first("png", "cls", "npy") == 13
        assert sample.raw("pkl") == b"x" and sample.raw("pkl").readonly
        with pytest.raises(IndexError, match="no sample 40"):
            dataset.sample(SHARDS * ROWS)


def test_what_cannot_be_had_is_named(folder: Path):
    with open_dataset(folder) as dataset:
        sample = dataset.sample(13)
        with pytest.raises(DataError, match=r"1\.tar: sample 013 \(number 13\) has no field jpg, it has npy, cls"):
            sample["jpg"]
        with pytest.raises(DataError, match="has no field jpg or png"):
            sample.first("jpg", "png")
        with pytest.raises(DataError, match=r"1\.tar: member 013\.pkl \(sample 13\): extension 'pkl' is not decoded"):
            sample["pkl"]


def test_changed_bytes_never_come_out(folder: Path):
    """A flipped bit in any field of any sample: that field raises, all others are as they were."""
    draw = random.Random(1)
    for _ in range(20):
        number, field = draw.randrange(SHARDS * ROWS), draw.choice(("npy", "cls", "note.txt"))
        with open_dataset(folder) as dataset:
            shard, row = dataset.index.locate(number)
            place = dataset.index.segment(shard).sample(row)[field]
        path = folder / f"{shard}.tar"
        good = path.read_bytes()
        at = place.offset + draw.randrange(place.length)
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << draw.randrange(8)]) + good[at + 1 :])
        with open_dataset(folder) as dataset:
            sample = dataset.sample(number)
            message = (
                rf"{shard}\.tar: member {number:03d}\.{field} \(sample {number}\): its {place.length} bytes at byte"
            )
            for _ in range(2):
                with pytest.raises(DataError, match=message):
                    sample[field]
            others = [dataset.sample(other)["cls"] for other in range(SHARDS * ROWS) if other != number]
            assert others == [other for other in range(SHARDS * ROWS) if other != number]
        with open_dataset(folder, check_digests=False) as dataset:
            assert bytes(dataset.sample(number).raw(field)) != good[place.offset : place.offset + place.length]
        path.write_bytes(good)


def test_a_shard_that_changes_after_opening_is_named(folder: Path):
    with open_dataset(folder) as dataset:
        path = folder / "2.tar"
        good = path.read_bytes()
        path.write_bytes(good[:-512])
        with pytest.raises(
            DataError, match=rf"2\.tar: had {len(good)} bytes when it was indexed, has {len(good) - 512}"
        ):
            dataset.sample(2 * ROWS)
        path.unlink()
        with pytest.raises(DataError, match=r"2\.tar: the shard is gone"):
            dataset.sample(2 * ROWS)
        (folder / "3.tar.idx").unlink()
        with pytest.raises(DataError, match=r"3\.tar\.idx: this part of the index is missing"):
            dataset.sample(3 * ROWS)
        assert dataset.sample(0)["cls"] == 0


def test_threads_share_a_data_set_and_few_shards_stay_mapped(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reader, "MAX_MAPPED", 2)
    numbers = random.Random(2).choices(range(SHARDS * ROWS), k=2000)
    with open_dataset(folder) as dataset, ThreadPoolExecutor(8) as pool:
        kept: list[Sample] = list(pool.map(dataset.sample, numbers))
        assert len(dataset._mapped) == 2
        dataset.close()
        assert [sample["cls"] for sample in kept] == numbers  # samples keep their shards alive
        assert dataset.sample(7)["cls"] == 7
