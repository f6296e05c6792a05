"""Indexing folders of real tars, made by WebDataset, by GNU tar and by tarfile; indexes that do not fit."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
from webdataset.compat import WebDataset
from webdataset.writer import ShardWriter
from xxhash import xxh3_64_intdigest

from pipeline import rules
from pipeline.data import index as indexer
from pipeline.data.index import build, open_index
from pipeline.errors import DataError
from pipeline.sections import Source
from tests.small_tars import Members, contents, grouped, samples, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of uneven length, indexed."""
    write_tar(tmp_path / "a.tar", samples(30))
    write_tar(tmp_path / "b.tar", samples(1, 30))
    write_tar(tmp_path / "c.tar", samples(16, 31))
    build(tmp_path)
    return tmp_path


def test_index_counts_locates_and_has_every_digest(folder: Path):
    index = open_index(folder)
    assert [(shard.name, shard.samples) for shard in index.shards] == [("a.tar", 30), ("b.tar", 1), ("c.tar", 16)]
    assert index.samples == 47
    assert index.bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert [index.locate(number) for number in (0, 29, 30, 31, 46)] == [(0, 0), (0, 29), (1, 0), (2, 0), (2, 15)]
    for wrong in (-1, 47):
        with pytest.raises(IndexError, match=f"no sample {wrong}, there are 47"):
            index.locate(wrong)
    segment = index.segment(2)
    tar = (folder / "c.tar").read_bytes()
    assert segment.samples == 16 and segment.first_fields.tolist() == list(range(0, 33, 2))
    for offset, length, digest, _ in segment.table.tolist():
        assert xxh3_64_intdigest(tar[offset : offset + length]) == digest
    assert contents(folder) == grouped(samples(47))


def test_identity_follows_contents_and_names_only(folder: Path, tmp_path: Path):
    identity = open_index(folder).identity
    copied = tmp_path / "elsewhere"
    shutil.copytree(folder, copied, ignore=shutil.ignore_patterns("elsewhere"))
    for path in copied.iterdir():
        os.utime(path, (1, 1))
    assert open_index(copied).identity == identity == build(copied, workers=2).identity
    tar = copied / "b.tar"
    tar.write_bytes(tar.read_bytes().replace(b"sample 30", b"sample 3x"))
    assert build(copied).identity != identity
    shutil.copy(folder / "b.tar", tar)
    assert build(copied).identity == identity
    tar.rename(copied / "d.tar")
    assert build(copied).identity != identity


def test_a_folder_without_index_names_those_below_that_have_one(folder: Path):
    shutil.copytree(folder, folder / "packed" / "train")
    (folder / "raw" / "a class").mkdir(parents=True)
    (folder / "small").mkdir()
    (folder / "small" / "0.tar.gz").touch()
    shutil.copytree(folder / "packed" / "train", folder / "tars", ignore=shutil.ignore_patterns("*.idx"))
    for name, says in (
        ("packed", rf"packed: no index .*: {folder}/packed/train$"),
        ("raw", rf"raw: no .tar shards .*`millstream data pack {folder}/raw OUT`$"),
        ("raw/a class", rf"`millstream data pack '{folder}/raw/a class' OUT`$"),
        ("small", rf"compressed shards are not read .*unpack each: `gzip -d {folder}/small/0.tar.gz`$"),
        ("tars", rf"tars: no index .*`millstream data index {folder}/tars`$"),
        ("nowhere", "nowhere: no such folder of shards"),
    ):
        with pytest.raises(DataError, match=says):
            open_index(folder / name)


def test_scan_gives_shards_one_by_one_and_writes_no_root(folder: Path):
    (folder / "shards.idx").unlink()
    shards = indexer.scan(folder)
    assert next(shards).name == "a.tar"
    assert not (folder / "shards.idx").exists()
    with pytest.raises(DataError, match=r"no index .*millstream data index"):
        open_index(folder)
    shards.close()
    assert indexer.commit(folder, indexer.scan(folder)).samples == 47
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["shards.idx", *(f"{name}.tar{end}" for name in "abc" for end in ("", ".idx"))]
    )


def test_members_of_one_key_need_not_be_neighbours(tmp_path: Path):
    members = [
        ("b.txt", b"b"),
        ("a.txt", b"a"),
        ("c.cls", b"1"),
        ("a.cls", b"2"),
        ("b.cls", b"3"),
        ("README", b"no sample"),
    ]
    members += [("__meta__/a.json", b"{}"), (".hidden", b"x"), ("a/._b.txt", b"x")]
    write_tar(tmp_path / "a.tar", members)
    build(tmp_path)
    found = contents(tmp_path)
    assert list(found) == ["b", "a", "c"]
    assert found == {"b": {"txt": b"b", "cls": b"3"}, "a": {"txt": b"a", "cls": b"2"}, "c": {"cls": b"1"}}


def test_tars_of_webdataset_and_of_tar_hold_the_same_samples(tmp_path: Path):
    """ShardWriter's shards and GNU tar's of the same files are read alike; WebDataset is not disturbed by our index."""
    ours, plain, files = (tmp_path / name for name in ("wds", "plain", "files"))
    for path in (ours, plain, files):
        path.mkdir()
    expected = grouped(samples(20))
    with ShardWriter(f"{ours}/%04d.tar", maxcount=8, verbose=0) as writer:
        for key, fields in expected.items():
            writer.write({"__key__": key, **fields})
    for name, data in samples(20):
        (files / name).write_bytes(data)
    subprocess.run(["tar", "--sort=name", "-cf", plain / "0.tar", "-C", files, "."], check=True)
    assert build(ours).samples == build(plain).samples == 20
    assert contents(ours) == expected
    assert {key.removeprefix("./"): fields for key, fields in contents(plain).items()} == expected
    shards = [str(path) for path in sorted(ours.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # WebDataset leaves closing its files to the garbage collector
        read = list(WebDataset(shards, shardshuffle=False))
        gc.collect()
    assert {sample["__key__"]: {"txt": sample["txt"], "cls": sample["cls"]} for sample in read} == expected


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../a.txt", b"1")], r"member \.\./a\.txt points outside .*tar -C FOLDER"),
        ([("/etc/a.txt", b"1")], "member /etc/a.txt points outside"),
        ([("a.txt", b"1"), ("b.txt", b"1"), ("a.TXT", b"2")], r"member a\.txt is there 2 times"),
        ([("README", b"1")], "no member is named KEY.EXTENSION.*README"),
        ([], "hold no samples"),
    ],
)
def test_names_that_make_no_samples_are_refused(tmp_path: Path, members: Members, message: str):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message):
        build(tmp_path)


def test_absent_shards_are_refused_with_the_way_out(tmp_path: Path):
    with pytest.raises(DataError, match="no such folder"):
        build(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no \.tar shards"):
        build(tmp_path)
    (tmp_path / "train").mkdir()
    write_tar(tmp_path / "train" / "a.tar", samples(3))
    with pytest.raises(DataError, match="its folder train has some"):
        build(tmp_path)


def test_other_programs_files_are_left_alone(tmp_path: Path):
    write_tar(tmp_path / "a.tar", samples(3))
    (tmp_path / "index.json").write_bytes(b"somebody's")
    for name in ("a.tar.idx", "shards.idx"):
        (tmp_path / name).write_bytes(b"somebody's")
        with pytest.raises(DataError, match=rf"{name}: another program's index"):
            build(tmp_path)
        assert (tmp_path / name).read_bytes() == b"somebody's"
        (tmp_path / name).unlink()
    build(tmp_path)
    assert (tmp_path / "index.json").read_bytes() == b"somebody's"


def test_an_index_of_the_first_format_is_named_and_replaced(folder: Path):
    (folder / "shards.idx").unlink()
    (folder / "index.json").write_text('{"format": "millstream index", "version": 1, "identity": "0"}')
    with pytest.raises(DataError, match=rf"older Millstream \(index\.json\); run `millstream data index {folder}`"):
        open_index(folder)
    (problem,) = rules.folders(rules.Known({"data": {"train": {"train": Source(folder=folder)}}}))
    assert "only one of an older Millstream (index.json)" in problem.message
    assert f"millstream data index {folder}" in (problem.suggestion or "")
    assert build(folder).samples == 47
    assert not (folder / "index.json").exists()
    assert rules.folders(rules.Known({"data": {"train": {"train": Source(folder=folder)}}})) == []


def test_an_index_that_does_not_fit_is_named(folder: Path):
    tar, segment = (folder / "c.tar").read_bytes(), (folder / "c.tar.idx").read_bytes()
    (folder / "c.tar").write_bytes(tar + bytes(512))
    with pytest.raises(DataError, match=rf"c\.tar had {len(tar)} bytes, has {len(tar) + 512}.*millstream data index"):
        open_index(folder)
    (folder / "c.tar").rename(folder / "d.tar")
    with pytest.raises(DataError, match=r"c\.tar is gone; d\.tar is new"):
        open_index(folder)
    (folder / "d.tar").unlink()
    (folder / "c.tar").write_bytes(tar)
    (folder / "c.tar.idx").write_bytes(segment[:-1] + bytes([segment[-1] ^ 1]))
    with pytest.raises(DataError, match=r"c\.tar\.idx: damaged, or older or newer"):
        open_index(folder).segment(2)
    (folder / "c.tar.idx").write_bytes(segment[:8] + b"\1" + segment[9:])
    with pytest.raises(DataError, match=r"c\.tar\.idx: format 1, this Millstream reads format 2"):
        open_index(folder).segment(2)
    (folder / "c.tar.idx").unlink()
    with pytest.raises(DataError, match=r"c\.tar\.idx: .*missing"):
        open_index(folder).segment(2)


def test_every_bit_of_the_root_counts(folder: Path):
    """Any flipped bit and any cut of the root is an error, and scanning again brings the same root back."""
    root = folder / "shards.idx"
    good = root.read_bytes()
    for at in range(len(good)):
        for bit in range(8):
            root.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
            with pytest.raises(DataError, match=r"shards\.idx: (damaged|format \d)"):
                open_index(folder)
    for end in range(len(good)):
        root.write_bytes(good[:end])
        with pytest.raises(DataError, match=r"shards\.idx: damaged"):
            open_index(folder)
    build(folder)
    assert root.read_bytes() == good


def test_places_are_those_of_locate(folder: Path):
    index = open_index(folder)
    numbers = np.random.default_rng(0).permutation(47)
    shards, rows = index.places(numbers)
    assert [(int(shard), int(row)) for shard, row in zip(shards, rows)] == list(map(index.locate, numbers.tolist()))
    assert shards.dtype == rows.dtype == index.starts.dtype == np.int64
    assert [part.size for part in index.places(numbers[:0])] == [0, 0]
    for wrong in (-1, 47):
        with pytest.raises(IndexError, match=f"no sample {wrong}, there are 47"):
            index.places(np.array([3, wrong]))


def test_a_grown_data_set_knows_the_one_it_was(folder: Path):
    """The identity of the first shards is that of a data set with only those."""
    index = open_index(folder)
    assert [index.prefix_identity(samples) for samples in (-1, 0, 29, 32, 48)] == [None] * 5
    assert index.prefix_identity(47) == index.identity
    for samples_, last in ((31, "c"), (30, "b")):
        (folder / f"{last}.tar").unlink()
        assert index.prefix_identity(samples_) == build(folder).identity


def test_shards_without_samples_have_no_numbers(tmp_path: Path):
    for name, count in (("a", 0), ("b", 2), ("c", 0), ("d", 1)):
        write_tar(tmp_path / f"{name}.tar", samples(count, ord(name)))
    index = build(tmp_path)
    assert [index.locate(number) for number in range(3)] == [(1, 0), (1, 1), (3, 0)]
    assert index.places(np.arange(3))[0].tolist() == [1, 1, 3]


def test_the_table_is_a_lazy_sequence(folder: Path):
    shards = open_index(folder).shards
    assert [shard.name for shard in shards] == list(shards.all_names()) == ["a.tar", "b.tar", "c.tar"]
    assert shards[-1] == shards[2] == shards[1:][-1] and len(shards) == 3
    with pytest.raises(IndexError):
        shards[3]
