"""A preview shows what is really in the shards."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import index
from pipeline.data.pack.arrays import Arrays
from pipeline.data.pack.pack import pack_arrays
from pipeline.data.pack.text import Text, pack_text
from pipeline.data.pack.writer import Packing
from pipeline.data.preview import preview, write_sheet
from pipeline.data.sheet import TILE, WAVE
from pipeline.errors import DataError
from tests.data.test_sound import RATE, written
from tests.small_tars import write_tar


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


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sounds of three formats, one too long to be played, and a sample that has everything."""
    folder = tmp_path_factory.mktemp("mixed")
    ramp = np.linspace(-0.25, 0.5, RATE // 2, dtype=np.float32)
    png = io.BytesIO()
    Image.fromarray(np.full((16, 8, 4), [255, 0, 0, 128], np.uint8)).save(png, "png")
    members = [
        ("0.wav", written(ramp, "wav")),
        ("1.flac", written(np.stack([ramp, -ramp], 1), "flac")),
        ("2.wav", written(np.tile(ramp, 26), "wav")),
        ("3.wav", written(ramp[:0], "wav")),
        ("4.png", png.getvalue()),
        ("4.ogg", written(ramp, "ogg")),
        ("4.txt", b"if a < b & c"),
        ("4.seg.png", png.getvalue()),
        ("4.json", b'{"box": 1}'),
        ("4.cls", b"1"),
        ("5.txt", b"long " * 9000),
    ]
    write_tar(folder / "a.tar", members)
    index.build(folder)
    (folder / "classes.json").write_text('["dog", "<cat>"]')
    return folder


def test_summary_of_sounds(mixed: Path) -> None:
    summary = preview(mixed, 6)
    assert "  wav: 0.50 s at 8,000 Hz, 1 channel, peak 0.5, 8,044 bytes" in summary
    assert "  flac: 0.50 s at 8,000 Hz, 2 channels, peak 0.5, " in summary
    assert "  wav: 0.00 s at 8,000 Hz, 1 channel, peak 0, 44 bytes" in summary
    assert "field wav, 6 samples looked at: 3 x sound at 8,000 Hz, 1 channel" in summary


class Elements(HTMLParser):
    """All elements of a page with their attributes, and the text in each kind."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.found[-1][0], []).append(data)

    def all(self, tag: str, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for found, attributes in self.found if found == tag]


def test_a_page_shows_pictures_sounds_and_text(mixed: Path, tmp_path: Path) -> None:
    write_sheet(mixed, tmp_path / "m.html")
    page = (tmp_path / "m.html").read_text()
    elements = Elements(page)
    assert elements.all("img", "alt") == 2 * ["sample 4: 1 (<cat>), 8 by 16 pixels"]
    for source in elements.all("img", "src"):
        head, _, data = source.partition(",")
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert head == "data:image/png;base64" and image.size == (TILE // 2, TILE)
            assert image.getpixel((5, 5)) == (255, 0, 0, 128)
    labels = elements.all("svg", "aria-label")
    assert len(labels) == 5 and labels[0] == "waveform of sample 0: 0.50 s at 8,000 Hz, 1 channel, peak 0.5"
    kinds = [source.partition(";")[0] for source in elements.all("audio", "src")]
    assert kinds == ["data:audio/wav", "data:audio/flac", "data:audio/wav", "data:audio/ogg"]
    assert base64.b64decode(elements.all("audio", "src")[0].partition(",")[2])[:4] == b"RIFF"
    assert "13.00 s at 8,000 Hz, 1 channel, peak 0.5; 208,044 bytes, too many to play here" in elements.texts["p"]
    assert elements.texts["pre"][0] == "if a < b & c\njson: \"{'box': 1}\""
    assert len(elements.texts["pre"][1]) == 20_000 and elements.texts["pre"][1].endswith("lo...")
    assert "4: 1 (<cat>)" in elements.texts["figcaption"]
    assert "prefers-color-scheme: dark" in page and not re.search(r"https?:|url\(|@import|<script|<link", page)


def test_a_waveform_follows_the_sound(mixed: Path, tmp_path: Path) -> None:
    """A ramp from -0.25 to 0.5, scaled to its peak: from half below the middle to the top."""
    write_sheet(mixed, tmp_path / "m.html")
    paths = Elements((tmp_path / "m.html").read_text()).all("path", "d")
    points = [np.array([point.split() for point in path[1:-1].split("L")], dtype=float) for path in paths]
    columns, height = WAVE
    upper = points[0][: len(points[0]) // 2]
    assert (np.diff(upper[:, 0]) > 0).all() and upper[0, 0] == 0 and upper[-1, 0] == columns
    middle = height / 2
    ramp = np.linspace(middle * (1 + 0.95 / 2), middle * 0.05, len(upper))
    assert np.abs(upper[:, 1] - ramp).max() < 0.5
    assert np.abs(points[1][: len(points[1]) // 2, 1] - np.minimum(ramp, height - ramp)).max() < 0.5  # both channels
    assert (points[3][:, 1] == middle).all()


def test_a_page_of_pictures_and_one_of_tokens(pictures: Path, texts: Path, tmp_path: Path) -> None:
    write_sheet(pictures, tmp_path / "p.html", 4)
    elements = Elements((tmp_path / "p.html").read_text())
    assert elements.all("img", "alt")[0] == "sample 0: 0 (4), 8 by 4 pixels"
    assert len(elements.all("img", "src")) == 4 and "pre" not in elements.texts
    assert "packed from x.npz as arrays, split train, licence CC0" in elements.texts["p"]
    write_sheet(texts, tmp_path / "t.html", 2)
    page = (tmp_path / "t.html").read_text()
    assert "if a &lt; b &amp; c: print(" in page and "src=" not in page and "starts.npy" not in page


def test_what_cannot_be_shown(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no pictures but npy, starts.npy; write a .html page"):
        write_sheet(texts, tmp_path / "t.png")
    with pytest.raises(DataError, match=r"a sheet is a .png or a .html file"):
        write_sheet(texts, tmp_path / "t.pdf")
    with pytest.raises(DataError, match=r"t.html: cannot be written \(No such file or directory\)"):
        write_sheet(texts, tmp_path / "none" / "t.html")
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError):
        preview(tmp_path)
