"""A preview shows what is really in the shards."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.arrays import Arrays
from pipeline.data.pack import pack_arrays
from pipeline.data.preview import TILE, preview, write_sheet
from pipeline.data.text import Text, pack_text
from pipeline.data.writer import Packing
from pipeline.errors import DataError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine pictures of one colour each, in two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    colours = np.arange(27, dtype=np.uint8).reshape(9, 1, 1, 3) * 9
    np.savez(folder / "x.npz", images=np.broadcast_to(colours, (9, 4, 8, 3)), labels=np.arange(9) % 2 + 4)
    pack_arrays(folder / "x.npz", folder / "out", Packing(shuffle=False, licence="CC0"), Arrays())
    return folder / "out" / "train"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "in").mkdir()
    for i in range(8):
        (folder / "in" / f"{i}.txt").write_text(f"if a < b & c: print({i})\n" * 20)
    pack_text(folder / "in", folder / "out", Packing(holdout=2), Text(length=64, vocab_size=270))
    return folder / "out" / "test"


def test_summary_of_pictures(pictures: Path) -> None:
    lines = preview(pictures, 3).splitlines()
    assert "9 samples in 4 shards" in lines[0]
    assert "packed from x.npz as arrays, split train, licence CC0" in lines
    assert "2 classes, samples of each: 4: 5, 5: 4" in lines
    assert "field png, 9 samples looked at: 9 x uint8[4, 8, 3]" in lines
    assert [line for line in lines if line.startswith("sample ")] == [f"sample {i}, 0000000{i}" for i in (0, 4, 8)]
    assert any(re.fullmatch(r"  png: uint8\[4, 8, 3\], 216 to 234, \d+ bytes", line) for line in lines)
    assert "  cls: 0 (4)" in lines
    assert any("numbered 4 to 5" in line for line in lines if line.startswith("warning: "))


def test_classes_are_counted_without_a_card(pictures: Path, tmp_path: Path) -> None:
    for path in pictures.iterdir():
        if path.name not in ("card.json", "classes.json"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert "2 classes, samples of each: 0: 5, 1: 4" in preview(tmp_path).splitlines()


def test_summary_of_text(texts: Path) -> None:
    summary = preview(texts, 1)
    assert "files 2, documents 2" in summary
    assert re.search(r"xz -9 of this text: \d\.\d{3} bits per byte", summary)
    assert "if a < b & c: print(" in summary


def test_a_sheet_shows_the_pictures(pictures: Path, tmp_path: Path) -> None:
    write_sheet(pictures, tmp_path / "sheet.png", 9)
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    for i in range(9):
        row, column = divmod(i, 3)
        centre = pixels[8 + row * (TILE + 24) + TILE // 2, 8 + column * (TILE + 8) + TILE // 2]
        assert centre.tolist() == [27 * i, 27 * i + 9, 27 * i + 18]


def test_a_page_needs_nothing_beside_it(pictures: Path, texts: Path, tmp_path: Path) -> None:
    write_sheet(pictures, tmp_path / "p.html", 4)
    page = (tmp_path / "p.html").read_text()
    found = re.findall(r'src="([^"]*)"', page)
    assert len(found) == 4
    for source in found:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (TILE, TILE)
    write_sheet(texts, tmp_path / "t.html", 2)
    page = (tmp_path / "t.html").read_text()
    assert "if a &lt; b &amp; c: print(" in page and "src=" not in page


def test_what_cannot_be_shown(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no pictures but npy, starts.npy; write a .html page"):
        write_sheet(texts, tmp_path / "t.png")
    with pytest.raises(DataError, match=r"a sheet is a .png or a .html file"):
        write_sheet(texts, tmp_path / "t.pdf")
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError):
        preview(tmp_path)
