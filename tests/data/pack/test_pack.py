"""What is packed is what was given: every sample, on one side only, the same bytes each time, readable by others."""

from __future__ import annotations

import gc
import io
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import index
from pipeline.data.pack.arrays import Arrays
from pipeline.data.pack.pack import detect, pack, pack_arrays, pack_images
from pipeline.data.pack.writer import Packing, held_out, name_hash, permutation
from pipeline.data.reader import open_dataset
from pipeline.errors import DataError


def image_bytes(format: str, seed: int, size: tuple[int, int] = (12, 9)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=format)
    return buffer.getvalue()


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """30 images of three classes: names with dots, spaces and accents, twins, a wrong ending, other files."""
    source = tmp_path / "animals"
    names = {"cat": "jpg", "dög 1": "png", "fox": "webp"}
    for c, (name, ending) in enumerate(names.items()):
        (source / name).mkdir(parents=True)
        for i in range(10):
            format = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[ending]
            (source / name / f"a.{i} é.{ending}").write_bytes(image_bytes(format, 10 * c + i))
    (source / "cat" / "a.0 é.jpeg").write_bytes(image_bytes("PNG", 99))  # named JPEG, is PNG, the stem is there already
    (source / "cat" / "a.9 é.jpg").unlink()
    (source / "cat" / "._a.0.jpg").write_bytes(b"not an image")
    (source / "README.md").write_text("about\n")
    return source


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_by_webdataset(folder: Path) -> list[dict]:
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves closing its files to the garbage collector
        samples = list(webdataset.WebDataset(shards, shardshuffle=False))  # type: ignore[attr-defined]
        gc.collect()
    return samples


def nothing_else_in(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_images_keep_their_bytes_and_their_class(animals: Path, tmp_path: Path) -> None:
    packed = pack(animals, tmp_path / "out", Packing(holdout=0.2, licence="CC0", command="again"))
    assert packed.samples == {"train": 24, "test": 6}
    assert packed.warnings == ("not packed, since they are not animals/<class>/*.jpg|jpeg|png|webp: 1 x .md",)
    given = sorted(path.read_bytes() for path in animals.glob("*/[!.]*"))
    classes = ["cat", "dög 1", "fox"]
    got, keys = [], []
    for split in ("train", "test"):
        folder = tmp_path / "out" / split
        assert json.loads((folder / "classes.json").read_text()) == classes
        card = json.loads((folder / "card.json").read_text())
        assert (card["licence"], card["command"], card["source"]) == ("CC0", "again", "animals")
        assert sum(card["classes"].values()) == card["samples"] == packed.samples[split]
        with open_dataset(folder) as dataset:
            for number in range(len(dataset)):
                sample = dataset.sample(number)
                (extension,) = set(sample.fields) - {"cls"}
                got.append(bytes(sample.raw(extension)))
                keys.append(sample.key)
                (source,) = (path for path in animals.glob("*/*") if path.read_bytes() == got[-1])
                assert source.parent.name == classes[sample["cls"]]
                assert sample[extension].shape == (12, 9, 3)
    assert sorted(got) == given
    assert len(set(keys)) == 30 and all(key.isascii() and "." not in key and " " not in key for key in keys)
    assert {"cat/a_0__", "cat/a_0__-2"} <= set(keys)


def test_packing_twice_gives_the_same_bytes(animals: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "animals"
    shutil.copytree(animals, moved)  # other times, other place
    pack_images(animals, tmp_path / "a", Packing(holdout=4))
    pack_images(moved, tmp_path / "b", Packing(holdout=4, threads=3))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    pack_images(animals, tmp_path / "c", Packing(holdout=4, seed=1))
    a, c = (contents(tmp_path / name) for name in "ac")
    assert a.keys() == c.keys() and a["train/train-000000.tar"] != c["train/train-000000.tar"]
    keys = [{sample["__key__"] for sample in read_by_webdataset(tmp_path / name / "test")} for name in "ac"]
    assert keys[0] == keys[1]  # another seed shuffles, and holds out the same


def test_webdataset_reads_what_is_packed(animals: Path, tmp_path: Path) -> None:
    pack_images(animals, tmp_path / "out", Packing(holdout=0.2))
    for split in ("train", "test"):
        theirs = read_by_webdataset(tmp_path / "out" / split)
        with open_dataset(tmp_path / "out" / split) as dataset:
            assert len(theirs) == len(dataset)
            for number, other in enumerate(theirs):
                sample = dataset.sample(number)
                assert other["__key__"] == sample.key
                fields = {name: data for name, data in other.items() if not name.startswith("__")}
                assert fields == {field: bytes(sample.raw(field)) for field in sample.fields}


def test_bad_images_are_all_named_and_nothing_is_left(animals: Path, tmp_path: Path) -> None:
    whole = image_bytes("JPEG", 1, (64, 64))
    bad = {
        "cut.jpg": whole[: len(whole) // 2],
        "empty.png": b"",
        "text.webp": b"hello",
        "cut.png": image_bytes("PNG", 1)[:200],
    }
    for name, data in bad.items():
        (animals / "fox" / name).write_bytes(data)
    with pytest.raises(DataError) as raised:
        pack_images(animals, tmp_path / "out", Packing())
    assert "4 of 34 images" in str(raised.value)
    assert all(f"fox/{name}: " in str(raised.value) for name in bad)
    assert nothing_else_in(tmp_path, "animals")


def test_an_existing_folder_is_not_touched(animals: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="exists already; choose another folder"):
        pack_images(animals, tmp_path / "out", Packing())
    assert nothing_else_in(tmp_path, "animals", "out") and nothing_else_in(tmp_path / "out")


def test_what_the_system_refuses_is_said(animals: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"writing .*README.md/out failed: .*README.md"):
        pack_images(animals, animals / "README.md" / "out", Packing())


def test_progress_reaches_the_end_of_each_stage(animals: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    pack_images(animals, tmp_path / "out", Packing(holdout=6), progress=lambda *report: seen.append(report))
    assert [report for report in seen if report[1] == report[2] and not report[0].startswith("index")] == [
        ("read", 30, 30),
        ("write train", 24, 24),
        ("write test", 6, 6),
    ]
    assert {stage for stage, done, total in seen if done == total > 30} == {"index train", "index test"}  # bytes


def test_what_a_person_should_know_is_said(tmp_path: Path) -> None:
    source = tmp_path / "one"
    (source / "only").mkdir(parents=True)
    for i in range(10):
        (source / "only" / f"{i}.png").write_bytes(image_bytes("PNG", 0))  # ten times the same picture
    packed = pack_images(source, tmp_path / "out", Packing(holdout=3))
    assert packed.warnings == (
        "3 of the 3 held-out samples are also, byte for byte, among the training samples",
        "there is one class only (only): nothing can be learned from it by classification",
    )
    assert json.loads((tmp_path / "out/train/card.json").read_text())["warnings"] == list(packed.warnings)


def test_shards_follow_size_and_number(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    np.save(tmp_path / "y.npy", np.arange(60) % 2)
    arrays = Arrays(labels=tmp_path / "y.npy")
    for name, packing, shards in [
        ("few", Packing(min_shards=1), 1),
        ("many", Packing(min_shards=7), 7),
        ("small", Packing(shard_bytes=11_000), 12),
        ("more than samples", Packing(min_shards=500), 60),
    ]:
        pack_arrays(tmp_path / "x.npy", tmp_path / name, packing, arrays)
        sizes = [shard.samples for shard in index.open_index(tmp_path / name / "train").shards]
        assert abs(len(sizes) - shards) <= (1 if name == "small" else 0), sizes
        assert sum(sizes) == 60 and max(sizes) - min(sizes) <= 1


@given(st.integers(2, 300), st.floats(0.01, 0.99))
def test_the_held_out_share_is_exact_and_follows_the_keys(n: int, share: float) -> None:
    keys = [f"k{i}" for i in range(n)]
    wanted = round(share * n)
    if wanted in (0, n):
        with pytest.raises(DataError, match="hold out"):
            held_out(keys, share)
        return
    mask = held_out(keys, share)
    assert mask.sum() == wanted
    assert (mask[::-1] == held_out(keys[::-1], share)).all()
    assert (mask == held_out(keys, wanted)).all()  # a number does the same as a share
    assert (held_out(keys, wanted - 1) <= mask).all() if wanted > 1 else True  # holding out more only adds


@given(st.lists(st.integers(0, 20), min_size=2, max_size=80), st.floats(0.02, 0.9))
def test_what_is_kept_together_stands_on_one_side(groups: list[int], share: float) -> None:
    names, wanted = [f"g{group}" for group in groups], round(share * len(groups))
    if not 0 < wanted < len(names):
        return
    try:
        mask = held_out(names, share)
    except DataError as error:
        assert "leaves no samples to train on" in str(error)
        return
    held = {name for name, out in zip(names, mask) if out}
    assert not held & {name for name, out in zip(names, mask) if not out}
    last = max(held, key=name_hash)  # without it there would be too few
    assert wanted <= mask.sum() < wanted + names.count(last)


@pytest.mark.parametrize("holdout", [-0.1, 1.5, 10, 11])
def test_a_holdout_that_cannot_be(holdout: float) -> None:
    with pytest.raises(DataError, match="holdout"):
        held_out([str(i) for i in range(10)], holdout)


def test_the_shuffle_is_a_permutation_that_never_changes() -> None:
    assert sorted(permutation(1000, Packing())) == list(range(1000))
    assert permutation(8, Packing(seed=0)).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(5, Packing(shuffle=False)).tolist() == [0, 1, 2, 3, 4]


def test_detection(animals: Path, tmp_path: Path) -> None:
    assert detect(animals) == "images"  # in spite of its README.md
    for i in range(5):
        (animals / f"notes{i}.txt").write_text("text")
    with pytest.raises(DataError, match="30 images and 6 text files; say which"):
        detect(animals)
    texts = tmp_path / "texts" / "deep" / "deeper"
    texts.mkdir(parents=True)
    with pytest.raises(DataError, match="holds nothing to pack"):
        detect(tmp_path / "texts")
    (texts / "a.py").write_text("x = 1\n")
    assert detect(tmp_path / "texts") == detect(texts / "a.py") == "text"
    (tmp_path / "a.bmp").write_bytes(b"BM")
    with pytest.raises(DataError, match=r"a\.bmp is of no kind that is packed"):
        detect(tmp_path / "a.bmp")
    with pytest.raises(DataError, match="does not exist"):
        detect(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no images in"):
        pack_images(tmp_path / "texts", tmp_path / "out", Packing())
