"""Tars of every make: what is read, what is refused by name, what damage is seen in the headers."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from pipeline.data.index import build
from pipeline.data.segment import split_name
from pipeline.errors import DataError
from tests.small_tars import contents, samples, write_tar


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_format(tmp_path: Path, format: int):
    """Nested folders, long names (a prefix in USTAR, an extra header elsewhere), multi-part fields, empty members."""
    deep = "/".join(["folder" * 5] * 4) + "/" + "x" * 40
    members = [
        ("BZhang.txt", b"1"),
        (f"{deep}.seg.txt", b"2" * 513),
        (f"{deep}.txt", b""),
        ("dir.v1/a.TXT", b"3" * 512),
    ]
    if format != tarfile.USTAR_FORMAT:
        members += [("long" * 100 + ".txt", b"4"), ("grün/ß.txt", b"5")]
    write_tar(tmp_path / "a.tar", members, format)
    build(tmp_path)
    expected: dict[str, dict[str, bytes]] = {}
    for name, data in members:
        key, field = split_name(name) or ("", "")
        expected.setdefault(key, {})[field] = data
    assert contents(tmp_path) == expected
    assert "dir.v1/a" in expected and expected[deep] == {"seg.txt": b"2" * 513, "txt": b""}


def test_base_256_sizes_and_old_headers(tmp_path: Path):
    """Sizes in base 256 (GNU, very large files), V7 headers without magic, checksums of signed bytes."""
    tar = bytearray(
        write_tar(tmp_path / "a.tar", [("ä.txt", b"12345"), ("b.txt", b"6")], tarfile.GNU_FORMAT).read_bytes()
    )
    tar[124:136] = b"\x80" + (5).to_bytes(11, "big")
    tar[257:265] = bytes(8)
    signed = sum(byte - 256 if byte > 127 else byte for byte in tar[:148] + tar[156:512]) + 8 * 32
    tar[148:156] = b"%06o\0 " % signed
    (tmp_path / "a.tar").write_bytes(tar)
    build(tmp_path)
    assert contents(tmp_path) == {"ä": {"txt": b"12345"}, "b": {"txt": b"6"}}


def special(tmp_path: Path, kind: str) -> None:
    """A tar with something that is not a plain file."""
    files = tmp_path / "files"
    files.mkdir()
    (files / "a.txt").write_bytes(b"a")
    options = []
    if kind == "hard link":
        os.link(files / "a.txt", files / "b.txt")
    elif kind == "symbolic link":
        (files / "b.txt").symlink_to("a.txt")
    elif kind == "named pipe":
        os.mkfifo(files / "b.txt")
    else:
        with (files / "b.txt").open("wb") as file:
            file.truncate(1 << 20)
            file.write(b"end")
        options = ["--sparse", "--format=gnu" if kind == "sparse gnu" else "--format=pax"]
    subprocess.run(
        ["tar", *options, "-cf", tmp_path / "0.tar", "--sort=name", "-C", files, "a.txt", "b.txt"], check=True
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("hard link", r"0\.tar: .*member b\.txt is a hard link.*--hard-dereference"),
        ("symbolic link", r"0\.tar: .*member b\.txt is a symbolic link.*--dereference"),
        ("named pipe", r"0\.tar: .*member b\.txt is a named pipe"),
        ("sparse gnu", r"0\.tar: .*member b\.txt is a sparse file.*without --sparse"),
        ("sparse pax", r"0\.tar: .*member \S*b\.txt is a sparse file.*without --sparse"),
    ],
)
def test_what_is_no_plain_file_is_refused_by_name(tmp_path: Path, kind: str, message: str):
    special(tmp_path, kind)
    with pytest.raises(DataError, match=message):
        build(tmp_path)
    assert not (tmp_path / "shards.idx").exists()


def test_damaged_tars_are_not_indexed(tmp_path: Path):
    """The six damages that streaming readers pass over without a word, and one more: two archives in one file."""
    path = tmp_path / "a.tar"
    members = samples(10)
    whole = write_tar(path, members).read_bytes()
    end = len(whole.rstrip(b"\0"))
    header = whole.index(b"00005.txt")
    damages = {
        "wrong header checksum": whole[: header + 30] + b"\x01" + whole[header + 31 :],
        "not a tar header": whole[:header] + bytes(range(1, 129)) * 4 + whole[header + 512 :],
        "without its end marker": whole[:header],
        "an end marker, and more bytes after it": whole[:header] + bytes(1024) + whole[header + 1024 :],
        "joined by `cat`": whole + whole,
        "half of the end marker": whole[: (end + 511) // 512 * 512 + 512],
        "cut inside the next member": whole[: header + 512 + 10],
    }
    for message, damaged in damages.items():
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=message) as error:
            build(tmp_path)
        assert str(path) in str(error.value)
        if message != "joined by `cat`" and "half" not in message:
            assert f"at byte {header}, after member 00004.cls" in str(error.value)
