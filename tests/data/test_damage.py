"""`verify` on good and damaged shards: it names shard, member and kind, and misses nothing that matters."""

from __future__ import annotations

import random
import tarfile
from pathlib import Path

import pytest

from pipeline.data import damage
from pipeline.data.damage import Damage, ShardReport
from pipeline.data.index import Index, build, open_index
from pipeline.data.parallel import processes
from pipeline.data.reader import Dataset, open_dataset
from pipeline.data.storage import Folder
from pipeline.errors import DataError
from tests.small_tars import contents, samples, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of uneven length, indexed."""
    write_tar(tmp_path / "a.tar", samples(30))
    write_tar(tmp_path / "b.tar", samples(1, 30))
    write_tar(tmp_path / "c.tar", samples(16, 31))
    build(tmp_path)
    return tmp_path


def test_verify_reports_nothing_on_good_shards(folder: Path):
    assert list(damage.verify(folder)) == [
        ShardReport(shard.name, shard.samples, shard.bytes, 0) for shard in open_index(folder).shards
    ]


def test_verify_names_shard_member_and_kind(folder: Path):
    tar = (folder / "a.tar").read_bytes()
    with open_dataset(folder) as dataset:
        offset = dataset.index.segment(0).sample(5)["cls"].offset

    def damaged(data: bytes) -> list[tuple[str, str | None, str]]:
        (folder / "a.tar").write_bytes(data)
        found = list(damage.verify(folder))
        assert [type(report) for report in found[-2:]] == [ShardReport, ShardReport]  # the others are still read
        damages = [damage for damage in found if isinstance(damage, Damage)]
        assert found[len(damages)] == ShardReport("a.tar", 30, len(tar), len(damages))
        return [(damage.shard, damage.member, damage.kind) for damage in damages]

    assert damaged(tar[:offset] + b"9" + tar[offset + 1 :]) == [("a.tar", "00005.cls", "digest")]
    assert damaged(tar[: offset - 500] + b"9" + tar[offset - 499 :]) == [("a.tar", "00005.cls", "header")]
    assert damaged(tar[:offset]) == [("a.tar", "00005.cls", "size")]
    assert damaged(tar + bytes(512)) == [("a.tar", None, "size")]
    assert damaged(tar[:-1] + b"x") == [("a.tar", None, "header")]
    renamed = write_tar(
        folder / "x", [(name.replace("00007", "0000x"), data) for name, data in samples(30)]
    ).read_bytes()
    (folder / "x").unlink()
    assert damaged(renamed) == [("a.tar", "00007.txt", "header"), ("a.tar", "00007.cls", "header")]
    (folder / "a.tar").unlink()
    (folder / "b.tar.idx").write_bytes(b"")
    write_tar(folder / "new.tar", samples(1))
    kinds = [(found.shard, found.kind) for found in damage.verify(folder) if isinstance(found, Damage)]
    assert kinds == [("a.tar", "missing"), ("b.tar", "index"), ("new.tar", "new")]


KINDS = {"payload", "header", "padding", "end", "a.tar.idx", "shards.idx"}


def region(name: str, at: int, tar: bytes, index: Index) -> str:
    """What a byte of a file is."""
    if name != "a.tar":
        return name
    places = [place for row in range(index.samples) for place in index.segment(0).sample(row).values()]
    ends = [(place.offset + place.length + 511) // 512 * 512 for place in places]
    if at >= max(ends):
        return "end"
    if any(place.offset <= at < place.offset + place.length for place in places):
        return "payload"
    return "padding" if any(place.offset <= at < end for place, end in zip(places, ends)) else "header"


def reads(folder: Path, good: dict[str, dict[str, bytes]]) -> bool:
    """Whether all samples can be read; each field that comes out must be as it was, whatever else is damaged."""
    whole = True
    try:
        dataset = open_dataset(folder)
    except DataError:
        return False
    with dataset:
        for number, (key, fields) in enumerate(good.items()):
            try:
                sample = dataset.sample(number)
                assert (sample.key, list(sample.fields)) == (key, list(fields))
            except DataError:
                whole = False
                continue
            for name, expected in fields.items():
                try:
                    assert bytes(sample.raw(name)) == expected, f"altered bytes of {key}.{name} came out"
                except DataError:
                    whole = False
    return whole


def caught(folder: Path) -> bool:
    """Whether verify finds something, and names the shard when it is the shard."""
    try:
        damages = [found for found in damage.verify(folder) if isinstance(found, Damage)]
    except DataError as error:
        assert "shards.idx" in str(error)
        return True
    assert all(found.shard == "a.tar" and "a.tar" in found.message for found in damages)
    return bool(damages)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """One shard of 10,240 bytes with a long name, empty members, two fields."""
    members = [*samples(3), ("long" * 60 + ".txt", b"a name with a header of its own"), ("empty.txt", b"")]
    write_tar(tmp_path / "a.tar", members)
    build(tmp_path)
    return tmp_path


def test_every_flipped_bit_is_found_or_harmless(small: Path):
    """Bits of every kind of byte, of the tar and of both files of the index: verify names what is damaged, or a reader
    of samples and a reader of tars find everything as it was; no altered sample comes out in either case."""
    good, draw = contents(small), random.Random(0)
    tar, index = (small / "a.tar").read_bytes(), open_index(small)
    files = {name: (small / name).read_bytes() for name in ("a.tar", "a.tar.idx", "shards.idx")}
    flips: dict[str, list[bool]] = {}
    chosen = [("a.tar", draw.randrange(len(tar))) for _ in range(140)]
    chosen += [(name, draw.randrange(len(files[name]))) for name in files for _ in range(20)]
    for name, at in chosen:
        content, kind = files[name], region(name, at, tar, index)
        (small / name).write_bytes(content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :])
        found, whole = caught(small), reads(small, good)
        flips.setdefault(kind, []).append(found)
        if not found:
            assert kind in ("padding", "header") and whole  # a header: what PAX says of owners and times
            with tarfile.open(small / "a.tar") as plain:
                assert len([member for member in plain if member.isfile()]) == sum(map(len, good.values()))
        (small / name).write_bytes(content)
    assert sum(map(len, flips.values())) == 200 and flips.keys() == KINDS
    assert all(all(flips[kind]) for kind in KINDS - {"padding", "header"})
    assert not any(flips["padding"]) and not caught(small) and reads(small, good)


def test_every_cut_is_found(small: Path):
    """The tar at every shorter length, and both files of the index: verify finds it, and nothing altered is read."""
    good = contents(small)
    for name in ("a.tar", "a.tar.idx", "shards.idx"):
        content = (small / name).read_bytes()
        with (small / name).open("r+b") as file:
            for length in range(len(content) - 1, -1, -1):
                file.truncate(length)
                assert caught(small), f"{name} cut to {length} bytes"
                assert not reads(small, good)
        (small / name).write_bytes(content)
    assert not caught(small) and reads(small, good)


def test_a_cut_tar_whose_size_nobody_compares_gives_nothing_altered(small: Path):
    """Where tars cannot be listed, the size is compared when a shard is mapped."""

    class Unlisted(Folder):
        def sizes(self, expected: int = 0) -> None:  # type: ignore[override]
            return None

    tar = small / "a.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    dataset = Dataset(open_index(Unlisted(small)))
    with pytest.raises(DataError, match=r"a\.tar: had \d+ bytes when it was indexed"):
        dataset.sample(0)


def test_a_member_that_became_a_folder_is_missed(small: Path):
    """A header with a right checksum, rewritten: the index has a file there, the tar does not."""
    tar = bytearray((small / "a.tar").read_bytes())
    tar[156:157] = b"5"
    tar[148:156] = b" " * 8
    tar[148:156] = b"%06o\0 " % sum(tar[:512])
    (small / "a.tar").write_bytes(tar)
    found = next(damage.verify(small))
    assert isinstance(found, Damage) and found[:3] == ("a.tar", "00000.txt", "header")
    assert "the tar has no such file" in found.message


def test_verify_over_processes_finds_the_same(folder: Path):
    tar = bytearray((folder / "b.tar").read_bytes())
    tar[512] ^= 1
    (folder / "b.tar").write_bytes(tar)
    (folder / "c.tar").unlink()
    assert list(damage.verify(folder, processes(2))) == list(damage.verify(folder))
