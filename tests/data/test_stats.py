"""The numbers of a data set against a count by hand; and that the page shows them."""

from __future__ import annotations

import io
import json
import wave
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import stats as counter
from pipeline.data import stats_page
from pipeline.data.index import build, open_index
from pipeline.data.stats import Spread, stats
from pipeline.errors import DataError
from tests.small_tars import Members, write_tar

COUNTS = (7, 20, 13)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def picture(width: int, height: int, kind: str, mode: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, kind)
    return file.getvalue()


def sound(frames: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(bytes(2 * frames))
    return file.getvalue()


def members() -> list[Members]:
    """Of three shards: 40 samples with all kinds of fields; every tenth from the fourth has no text."""
    shards, number = [], 0
    for count in COUNTS:
        shard: Members = []
        for _ in range(count):
            key = f"{number:03d}"
            shard.append((f"{key}.jpg", picture(10 + number, 8, "JPEG", "RGB" if number % 4 else "L")))
            shard.append((f"{key}.mask.png", picture(5, 6, "PNG", "L")))
            shard.append((f"{key}.npy", npy(np.zeros((number, 3), np.uint16))))
            shard.append((f"{key}.wav", sound(800 * (1 + number % 5))))
            shard.append((f"{key}.cls", b"%d" % (number % 7 % 5)))
            if number % 10 != 3:
                shard.append((f"{key}.txt", "zwölf µ".encode() * (number % 3)))
            number += 1
        shards.append(shard)
    return shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, shard in enumerate(members()):
        write_tar(tmp_path / f"{number}.tar", shard)
    build(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps(["ant", "bee", "cat", "dog", "eel"]))
    return tmp_path


def test_the_numbers_are_those_of_a_count_by_hand(folder: Path):
    found, index = stats(folder), open_index(folder)
    flat = [member for shard in members() for member in shard]
    assert (found.samples, found.counted, found.shards, found.identity) == (40, 40, 3, index.identity)
    assert found.shard_samples == Spread(3, 7, 13, 40 / 3, 20, 40)
    assert found.shard_bytes.total == found.bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))
    for field in found.fields:
        sizes = [len(data) for name, data in flat if name.split(".", 1)[1] == field.name]
        assert field.bytes == Spread.of(sizes) and field.missing == 40 - len(sizes)
        assert field.lacking == ("003" if field.name == "txt" else None)
    assert [field.name for field in found.fields] == ["jpg", "mask.png", "npy", "wav", "cls", "txt"]
    assert found.classes == {"cls": dict(sorted(Counter(number % 7 % 5 for number in range(40)).items()))}
    contents = {content.name: content for content in found.contents}
    assert contents["jpg"].kinds == {"JPEG RGB": 30, "JPEG L": 10}
    assert contents["jpg"].measures["width"] == Spread.of(range(10, 50))
    assert contents["mask.png"].measures["height"] == Spread.of([6] * 40)
    assert contents["npy"].kinds == {"uint16[n, 3]": 40} and contents["npy"].measures["length"] == Spread.of(range(40))
    characters = [7 * (number % 3) for number in range(40) if number % 10 != 3]
    assert contents["txt"].measures["characters"] == Spread.of(characters) and contents["txt"].looked == 36
    assert contents["wav"].measures["seconds"] == Spread.of([(1 + number % 5) / 10 for number in range(40)])
    assert contents.keys() == {"jpg", "mask.png", "npy", "txt", "wav"}
    assert json.loads(json.dumps(found.as_dict()))["shard_samples"]["median"] == 13


def test_few_samples_and_shards_stand_for_all_and_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(counter, "SEGMENTS", 2)
    found = stats(folder, looked=5)
    assert (found.counted, found.samples) == (20, 40)  # the first shard and the last
    assert {content.looked for content in found.contents} <= {4, 5}
    titles = [section.title for section in stats_page.page(found)]
    assert "fields, over 20 samples" in titles and "contents of jpg, over 5 samples" in titles
    assert "shards" in titles


def test_the_page_shows_what_was_counted(folder: Path):
    sections = {section.title: section for section in stats_page.page(stats(folder))}
    assert list(sections) == [str(folder), "shards", "fields", "classes (cls)"] + [
        f"contents of {name}" + (", over 36 samples" if name == "txt" else "")
        for name in ("jpg", "mask.png", "npy", "wav", "txt")
    ]
    assert sections["fields"].notes == ["txt is missing in 10.00% of the samples; 003 is the first of them"]
    classes = sections["classes (cls)"]
    assert [row[0].strip() for row in classes.rows] == ["0 ant", "1 bee", "2 cat", "3 dog", "4 eel"]
    assert [row[1].strip() for row in classes.rows] == ["11", "11", "6", "6", "6"]
    assert classes.rows[0][3].strip() == "█" * stats_page.BAR and classes.rows[2][3].strip() == "█" * 13 + "▏"
    for section in sections.values():
        assert len({len("".join(row)) for row in [section.columns, *section.rows] if row}) <= 1  # all padded alike


def test_many_classes_show_their_ends_and_their_gaps(tmp_path: Path):
    labels = [label for label in range(40) if label not in (5, 6) for _ in range(41 - label)]
    write_tar(tmp_path / "a.tar", [(f"{i}.cls", b"%d" % label) for i, label in enumerate(labels)])
    build(tmp_path)
    section = next(section for section in stats_page.page(stats(tmp_path)) if section.title.startswith("classes"))
    assert [row[0].strip() for row in section.rows] == [
        "0",
        "1",
        "2",
        "3",
        "4",
        "7",
        "8",
        "9",
        "...",
        *map(str, range(36, 40)),
    ]
    assert section.notes == [
        "38 classes; the largest has 20.50 times the samples of the smallest",
        "no sample has 2 of the classes below 39: 5, 6",
    ]


def test_what_cannot_be_read_is_counted_and_named(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [("0.npy", npy(np.zeros(3))), ("1.npy", b"no array"), ("2.npy", npy(np.ones(5)))])
    build(tmp_path)
    tar = bytearray((tmp_path / "a.tar").read_bytes())
    tar[tar.rindex(b"NUMPY")] ^= 1
    (tmp_path / "a.tar").write_bytes(tar)
    (content,) = stats(tmp_path).contents
    assert (content.looked, content.unreadable, content.kinds) == (3, 2, {"float64[n]": 1})
    assert content.why is not None and "not a readable npy" in content.why
    (notes,) = [section.notes for section in stats_page.page(stats(tmp_path)) if section.title == "contents of npy"]
    assert notes[0] == "1 x float64[n]" and notes[1].startswith("2 cannot be read, the first because: ")


def test_classes_that_are_words_are_no_classes(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [("0.cls", b"cat"), ("1.cls", b"1")])
    build(tmp_path)
    assert stats(tmp_path).classes == {}
    with pytest.raises(DataError, match="no such folder of shards"):
        stats(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (2.5e15, "2,500.0 TB")]
)
def test_sizes_for_people(count: float, shown: str):
    assert stats_page.size(count) == shown
