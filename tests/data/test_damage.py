"""`verify` on good and damaged shards: it names shard, member and kind, and misses nothing that matters."""

from __future__ import annotations

import random
import tarfile
from pathlib import Path

import pytest

from pipeline.data import damage
from pipeline.data.damage import Damage, ShardReport
from pipeline.data.index import build, open_index
from pipeline.data.reader import open_dataset
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


def test_every_flipped_bit_is_found_or_harmless(folder: Path):
    """Bits flipped anywhere in a tar: verify names the shard, or all samples still read as they were."""
    tar, good = (folder / "a.tar").read_bytes(), contents(folder)
    draw = random.Random(0)
    caught = 0
    for _ in range(200):
        at = draw.randrange(len(tar))
        (folder / "a.tar").write_bytes(tar[:at] + bytes([tar[at] ^ 1 << draw.randrange(8)]) + tar[at + 1 :])
        damages = [found for found in damage.verify(folder) if isinstance(found, Damage)]
        if damages:
            caught += 1
            assert {damage.shard for damage in damages} == {"a.tar"}
        else:
            assert contents(folder) == good
            with tarfile.open(folder / "a.tar") as plain:
                assert len(plain.getmembers()) == 60
    assert caught > 100
