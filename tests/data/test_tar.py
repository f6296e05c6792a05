"""Tars of every make: what is read, what is refused by name, what damage is seen in the headers."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
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


@pytest.mark.parametrize("format", ["gnu", "oldgnu", "pax", "posix", "ustar", "v7"])
def test_tars_of_gnu_tar(tmp_path: Path, format: str):
    """Written by `tar` from files: nested folders, multi-part fields, empty files, names of any length."""
    longest = {"v7": 99, "ustar": 240}.get(format, 1200)
    files, expected = tmp_path / "files", {}
    names = ["a.txt", "deep/er/b.seg.png", "deep/er/b.png", "empty.cls", "dir.v1/c.TXT", "grün/ß.txt"]
    names += [long_name(length) for length in (99, 101, 160, 256, 1001, 1200) if length <= longest]
    for number, name in enumerate(names):
        data = b"" if name.startswith("empty") else b"%d " % number * (number * 300)
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        (files / name).write_bytes(data)
        key, field = split_name(name) or ("", "")
        expected.setdefault(f"./{key}", {})[field] = data
    run = ["tar", f"--format={format}", "-cf", tmp_path / "a.tar", "-C", files, "."]
    if longest > 240:
        subprocess.run(run, check=True)
    else:  # folders of long names do not fit with the slash at their end
        listed = "\0".join(f"./{name}" for name in names if len(name) < longest - 2)
        subprocess.run([*run[:-1], "--null", "-T", "-"], input=listed.encode(), check=True)
        expected = {key: fields for key, fields in expected.items() if len(key) + 4 < longest}
    build(tmp_path)
    assert contents(tmp_path) == expected
    assert expected["./deep/er/b"].keys() == {"seg.png", "png"} and len(expected) >= 5


def long_name(length: int) -> str:
    """A path of so many characters, none of its parts too long for a file system or for USTAR's prefix."""
    parts = "/".join(["folder" * 8] * (length // 49 + 1))
    return parts[: length - 10].rstrip("/") + "/" + "x" * 5 + ".txt"


def test_tars_of_bsdtar(tmp_path: Path):
    """Not on every machine; Python's own tarfile stands in for it then, with the records that bsdtar writes."""
    files, name = tmp_path / "files", long_name(400)
    (files / name).parent.mkdir(parents=True)
    (files / name).write_bytes(b"long")
    if bsdtar := shutil.which("bsdtar"):
        subprocess.run([bsdtar, "-cf", tmp_path / "a.tar", "-C", files, name], check=True)
    else:
        with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 4, 1.5
            info.pax_headers = {"LIBARCHIVE.creationtime": "1.25", "SCHILY.dev": "9", "ctime": "1.5"}
            tar.addfile(info, io.BytesIO(b"long"))
    build(tmp_path)
    assert contents(tmp_path) == {name.removesuffix(".txt"): {"txt": b"long"}}


def test_pax_sizes_win_over_the_header(tmp_path: Path):
    """PAX says how large a member is when the header's field cannot; a header's own size is passed over then."""
    tar = bytearray(write_tar(tmp_path / "a.tar", [("x.txt", b"12345"), ("b.txt", b"6")]).read_bytes())
    record = b"12 size=005\n"
    extra = tarfile.TarInfo("PaxHeader/x")
    extra.size, extra.type = len(record), tarfile.XHDTYPE
    before = extra.tobuf(tarfile.USTAR_FORMAT) + record + bytes(512 - len(record))
    tar[124:136] = b"%011o\0" % 0
    tar[148:156] = b" " * 8
    tar[148:156] = b"%06o\0 " % sum(tar[:512])
    (tmp_path / "a.tar").write_bytes(before + tar)
    build(tmp_path)
    assert contents(tmp_path) == {"x": {"txt": b"12345"}, "b": {"txt": b"6"}}


def test_what_a_header_says_of_all_members_is_passed_over(tmp_path: Path):
    """`git archive` writes a PAX header for all members (g) first."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "a commit"}) as tar:
        info = tarfile.TarInfo("a.txt")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"1"))
    build(tmp_path)
    assert contents(tmp_path) == {"a": {"txt": b"1"}}


SPARSE = {f"sparse pax {version}": ["--format=pax", f"--sparse-version={version}"] for version in ("0.0", "0.1", "1.0")}
SPARSE["sparse gnu"] = ["--format=gnu"]


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
    elif kind.endswith("device"):
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            info = tarfile.TarInfo("b.txt")
            info.type = tarfile.CHRTYPE if kind.startswith("character") else tarfile.BLKTYPE
            tar.addfile(info)
        return
    elif kind == "multi-volume":
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            info = tarfile.TarInfo("b.txt")
            info.type = b"M"
            tar.addfile(info)
        return
    else:
        with (files / "b.txt").open("wb") as file:
            file.truncate(1 << 20)
            file.write(b"end")
        options = ["--sparse", *SPARSE[kind]]
    subprocess.run(
        ["tar", *options, "-cf", tmp_path / "0.tar", "--sort=name", "-C", files, "a.txt", "b.txt"], check=True
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("hard link", r"is a hard link.*--hard-dereference"),
        ("symbolic link", r"is a symbolic link.*--dereference"),
        ("named pipe", "is a named pipe"),
        ("character device", "is a character device"),
        ("block device", "is a block device"),
        ("multi-volume", r"is a part of a multi-volume archive.*without --multi-volume"),
        *((kind, r"is a sparse file.*without --sparse") for kind in SPARSE),
    ],
)
def test_what_is_no_plain_file_is_refused_by_name(tmp_path: Path, kind: str, message: str):
    special(tmp_path, kind)
    with pytest.raises(DataError, match=rf"0\.tar: .*member \S*b\.txt {message}"):
        build(tmp_path)
    assert not (tmp_path / "shards.idx").exists()


def command_of(error: pytest.ExceptionInfo[DataError], number: int = 0) -> str:
    """The command that a message gives."""
    return re.findall("`(.*?)`", str(error.value))[number]


@pytest.mark.parametrize("program", ["gzip", "bzip2", "xz", "zstd", "lz4"])
def test_compressed_tars_are_refused_with_the_command_that_unpacks_them(tmp_path: Path, program: str):
    """The command is run as it stands; by the end of the name, and by the first bytes of a file that is called .tar."""
    if shutil.which(program) is None:
        return  # the messages of the others are made by the same lines
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    ending = {"gzip": "gz", "bzip2": "bz2", "zstd": "zst"}.get(program, program)
    packed = folder / f"a.tar.{ending}"
    plain = write_tar(tmp_path / "plain", samples(3)).read_bytes()
    packed.write_bytes(subprocess.run([program, "-c"], input=plain, stdout=subprocess.PIPE, check=True).stdout)
    shutil.copy(packed, tmp_path / "packed")
    with pytest.raises(DataError, match=rf"a\.tar\.{ending}: compressed shards are not read \(1 here\)") as error:
        build(folder)
    subprocess.run(command_of(error), shell=True, check=True, stderr=subprocess.DEVNULL)
    assert build(folder).samples == 3 and not packed.exists()
    shutil.copy(tmp_path / "packed", folder / "a.tar")
    with pytest.raises(DataError, match=r"a\.tar: compressed \(.*so unpack it: ") as error:
        build(folder)
    subprocess.run(command_of(error), shell=True, check=True)
    assert build(folder).samples == 3
    shutil.copy(tmp_path / "packed", packed)
    with pytest.raises(DataError, match=f"a file, and folders are what is indexed; `{program} -d") as error:
        build(packed)


def test_a_name_that_looks_compressed_is_a_name(tmp_path: Path):
    """The first bytes of a tar are a member's name, in old tars with nothing else to tell."""
    (tmp_path / "BZhang.txt").write_bytes(b"1")
    subprocess.run(["tar", "--format=v7", "-cf", "a.tar", "BZhang.txt"], cwd=tmp_path, check=True)
    build(tmp_path)
    assert contents(tmp_path) == {"BZhang": {"txt": b"1"}}


def test_a_zip_is_no_tar(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.tar", "w") as file:
        file.writestr("a.txt", b"1")
    with pytest.raises(DataError, match=r"zip, so no tar.*`unzip` it"):
        build(tmp_path)


def test_pipes_are_refused_with_the_command_that_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = write_tar(tmp_path / "plain", samples(3))
    folder = tmp_path / "shards"
    folder.mkdir()
    os.mkfifo(folder / "a.tar")
    with pytest.raises(DataError, match=r"a\.tar: a pipe, and samples are read at their places") as error:
        build(folder)
    keeping = subprocess.Popen(command_of(error), shell=True)
    (folder / "a.tar").write_bytes(plain.read_bytes())
    assert keeping.wait() == 0 and build(folder).samples == 3

    monkeypatch.chdir(tmp_path)
    shutil.rmtree(folder)
    for place, source in (("-", "cat"), ("pipe:cat plain", "cat plain")):
        with pytest.raises(DataError, match="a pipe cannot be indexed") as error:
            build(place)
        command = command_of(error)
        assert f"&& {source} >" in command
        with plain.open("rb") as file:
            subprocess.run(command, shell=True, check=True, stdin=file)
        assert build("shards").samples == 3
        shutil.rmtree("shards")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: a pipe, and samples"):
        build(tmp_path / "pipe")
    with pytest.raises(DataError, match=rf"plain: a file, and folders.*`millstream data index {tmp_path}`"):
        build(plain)


def test_a_size_below_zero_ends_the_walk(tmp_path: Path):
    """It would lead back to a member that was read before, for ever."""
    tar = bytearray(write_tar(tmp_path / "a.tar", [("a.txt", b"1"), ("b.txt", b"2")]).read_bytes())
    tar[1024 + 124 : 1024 + 136] = b"-0000002000\0"
    tar[1024 + 148 : 1024 + 156] = b" " * 8
    tar[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(tar[1024:1536])
    (tmp_path / "a.tar").write_bytes(tar)
    with pytest.raises(DataError, match=r"at byte 1024, after member a\.txt: a member of -1024 bytes"):
        build(tmp_path)


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
