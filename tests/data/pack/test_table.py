"""Tables become samples: every kind of file gives the same ones, and what does not fit is said with its line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from pipeline.data.pack import source
from pipeline.data.pack.columns import Columns
from pipeline.data.pack.pack import detect, pack
from pipeline.data.pack.writer import Packing
from pipeline.data.reader import open_dataset
from pipeline.errors import DataError
from tests.data.pack.test_pack import contents, image_bytes

ROWS = 60
CLASSES = ["cat", "dog", "fox"]
MEMBERS = Columns((("cls", "label"), ("txt", "caption"), ("*", "photo")), key="id")


def row(i: int) -> dict[str, Any]:
    return {"id": f"k{i}", "label": CLASSES[i % 3], "caption": f'line {i},\n"quoted" é', "photo": f"pictures/{i}.any"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same rows as a .csv, .tsv, .jsonl, .parquet and both kinds of .arrow, and the files that they name."""
    (tmp_path / "pictures").mkdir()
    for i in range(ROWS):
        (tmp_path / "pictures" / f"{i}.any").write_bytes(image_bytes("PNG" if i % 2 else "JPEG", i))
    rows = [row(i) for i in range(ROWS)]
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        with open(tmp_path / f"a{suffix}", "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    lines = [json.dumps(each) for each in rows]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines), encoding="utf-8")  # with empty lines, without a last one
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, 11)
    with pyarrow.OSFile(str(tmp_path / "b.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as out:
        out.write_table(table, 11)
    return tmp_path


def samples(folder: Path) -> dict[str, dict[str, Any]]:
    with open_dataset(folder) as dataset:
        each = [dataset.sample(number) for number in range(len(dataset))]
        return {sample.key: {field: bytes(sample.raw(field)) for field in sample.fields} for sample in each}


def test_every_kind_of_file_gives_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "UNIT_BYTES", 500)  # many units
    expected = {
        f"k{i}": {
            "cls": b"%d" % (i % 3),
            "txt": row(i)["caption"].encode(),
            "png" if i % 2 else "jpg": (folder / f"pictures/{i}.any").read_bytes(),
        }
        for i in range(ROWS)
    }
    made = []
    for number, name in enumerate(("a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.arrow", "b.arrow")):
        out, threads = folder / f"out{number}", 1 + number % 3
        packed = pack(folder / name, out, Packing(holdout=6, threads=threads), kind="table", columns=MEMBERS)
        assert packed.samples == {"train": 54, "test": 6} and packed.warnings == ()
        assert samples(out / "train") | samples(out / "test") == expected
        assert json.loads((out / "train/classes.json").read_text()) == CLASSES
        made.append({path: data for path, data in contents(out).items() if not path.endswith("card.json")})
    assert all(each == made[0] for each in made[1:])


@pytest.mark.parametrize("members", [(), (("txt", "caption"),)])
def test_rows_of_one_value_are_held_out_together(folder: Path, members: tuple[tuple[str, str], ...]) -> None:
    columns = Columns(members, key="id", together="label")  # which is in the samples, or not
    packed = pack(folder / "a.csv", folder / "out", Packing(holdout=5), kind="table", columns=columns)
    assert packed.samples == {"train": 40, "test": 20}
    assert len({int(key[1:]) % 3 for key in samples(folder / "out/test")}) == 1


def test_without_a_word_every_column_is_taken(tmp_path: Path) -> None:
    raw = image_bytes("PNG", 3)
    rows = [
        {
            "raw": raw,
            "image": {"bytes": raw, "path": None},
            "label": i,
            "text": "hi",
            "n": 2.5,
            "none": None,
            "more": [i],
        }
        for i in range(9)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    pack(tmp_path / "t.parquet", tmp_path / "out", Packing(shuffle=False))
    with open_dataset(tmp_path / "out/train") as dataset:
        sample = dataset.sample(5)
        assert sample.key == "t/000000005"
        assert sample.fields == ("png", "image.png", "cls", "txt", "json")
        assert (sample["cls"], sample["txt"], sample["json"]) == (5, "hi", {"n": 2.5, "more": [5]})
        assert bytes(sample.raw("image.png")) == raw


def test_numbers_become_arrays(tmp_path: Path) -> None:
    lines = [json.dumps({"v": [[i, 0.5], [1, 2]], "n": i}) for i in range(5)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    columns = Columns((("npy", "v"), ("n.npy", "n")))
    pack(tmp_path / "t.jsonl", tmp_path / "out", Packing(shuffle=False), kind="table", columns=columns)
    with open_dataset(tmp_path / "out/train") as dataset:
        assert np.array_equal(dataset.sample(3)["npy"], [[3, 0.5], [1, 2]]) and dataset.sample(3)["n.npy"] == 3


def test_a_folder_saved_by_datasets(tmp_path: Path) -> None:
    """As `Dataset.save_to_disk` of datasets 5.2 leaves it; the library wants other versions than ours, so by hand."""
    saved = tmp_path / "saved"
    saved.mkdir()
    for number in range(2):
        rows = [{"image": {"bytes": image_bytes("PNG", i), "path": None}, "label": i % 2} for i in range(10)]
        table = pyarrow.Table.from_pylist(rows)
        path = str(saved / f"data-{number:05d}-of-00002.arrow")
        with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
            out.write_table(table)
    names = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    label = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    (saved / "dataset_info.json").write_text(json.dumps({"features": {"image": {"_type": "Image"}, "label": label}}))
    assert detect(saved) == "table"
    packed = pack(saved, tmp_path / "out", Packing())
    assert packed.samples == {"train": 20}
    assert json.loads((tmp_path / "out/train/card.json").read_text())["classes"] == {"cat": 10, "dog": 10}
    (saved / names[1]).unlink()
    with pytest.raises(DataError, match="tells of files that are not there"):
        pack(saved, tmp_path / "again", Packing())
    both = tmp_path / "both"
    both.mkdir()
    (both / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(DataError, match=r"pack each by itself: .*both/train, .*both/test"):
        pack(both, tmp_path / "again", Packing())


def test_rows_of_a_file_that_grows_keep_their_keys_and_sides(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"t{i}"}) for i in range(400)]
    held: list[set[str]] = []
    for count in (200, 400):
        (tmp_path / "t.jsonl").write_text("\n".join(lines[:count]))
        pack(tmp_path / "t.jsonl", tmp_path / f"out{count}", Packing(holdout=0.1), kind="table")
        held.append(set(samples(tmp_path / f"out{count}/test")))
    assert all(key.startswith("t/") for key in held[0]) and len(held[0]) == 20 and len(held[1]) == 40
    old = {f"t/{line:09d}" for line in range(1, 201)}
    both = held[0] & held[1]  # shares of random halves: about as many of the old ones are held out
    assert len(both) >= 10 and (held[1] & old <= held[0] or held[0] <= held[1])


CSV = "id,label,n\na,cat,1\nb,dog,x\n"


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        (CSV, Columns((("cls", "lable"),)), r"no column 'lable'; did you mean 'label'\?"),
        (CSV, Columns(together="speaker"), "no column 'speaker'. There are: id, label, n"),
        (CSV + "c,,3\n", Columns((("txt", "id"),), together="label"), "line 4: column label is empty; what is held"),
        (CSV, Columns(key="nothing"), "no column 'nothing'. There are: id, label, n"),
        (CSV, Columns((("cls", "n"),)), None),
        (CSV, Columns((("jpg", "id"),)), r"(?s)2 of 2 rows .* line 2: column id: .*/a cannot be read \(No such file"),
        (CSV, Columns((("npy", "label"),)), r"column label: .*/cat cannot be read"),
        (CSV + "a,b\n", Columns(), "line 4 has 2 columns, the first line has 3"),
        (CSV + '"a,b,c\n', Columns(), "line 4: unexpected end of data"),
        (CSV + "a,cat,3\n", Columns(key="id"), "1 rows have the key of another, such as a; give a column"),
        (CSV + ".x,cat,3\n", Columns(key="id"), r"holds '.x', which cannot be a key"),
        (f"id,label\n{'x' * 200},1\n", Columns(key="id"), "cannot be a member of a tar: .* give a shorter key"),
        (f"label,n\n{'9' * 20},1\n", Columns(), "holds '9{20}', neither a whole number nor one of the classes"),
        ("id,id\n1,2\n", Columns(), "two columns of one name: id"),
        ("", Columns(), "is empty"),
        ("id,label\n", Columns(), "holds no rows"),
        ("a,txt\nx,y\n", Columns((("txt", "a"), ("txt", "txt"))), "two columns make a member txt"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path: Path, content: str, columns: Columns, message: str | None) -> None:
    (tmp_path / "t.csv").write_text(content)
    if message is None:  # words where a class is wanted become classes
        packed = pack(tmp_path / "t.csv", tmp_path / "out", Packing(holdout=1), kind="table", columns=columns)
        assert len(packed.warnings) == 1 and "no sample to train on is left of" in packed.warnings[0]
        assert json.loads((tmp_path / "out/train/classes.json").read_text()) == ["1", "x"]
        return
    with pytest.raises(DataError, match=message):
        pack(tmp_path / "t.csv", tmp_path / "out", Packing(), kind="table", columns=columns)
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ("\udcff", "line 2 is not UTF-8"),
        ("[1]", "line 2 is list, not an object"),
        ('{"text": 3}', "line 2: column text holds int, not text"),
        ('{"other": 3}', "line 2: there is no column 'text'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "good"}\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(DataError, match=message):
        pack(tmp_path / "t.jsonl", tmp_path / "out", Packing(), kind="table", columns=Columns((("txt", "text"),)))


def test_a_torn_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"t\.parquet cannot be read"):
        pack(tmp_path / "t.parquet", tmp_path / "out", Packing())


def test_detection(folder: Path) -> None:
    assert [detect(folder / name) for name in ("a.csv", "a.parquet", "a.jsonl")] == ["table", "table", "text"]
    (folder / "n.csv").write_text("a,b\n1,2\n")
    assert detect(folder / "n.csv") == "arrays"
