"""Data sets made of others: packed again, repaired, merged, one sample taken out. No good sample is lost or altered."""

from __future__ import annotations

import json
import os
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipeline.data import index
from pipeline.data.damage import Damage, verify
from pipeline.data.head import find, write
from pipeline.data.pack.merge import merge
from pipeline.data.pack.pack import detect, pack
from pipeline.data.pack.repair import LEFT_OUT, repair
from pipeline.data.pack.tars import Chosen
from pipeline.data.pack.writer import Packing
from pipeline.data.reader import open_dataset
from pipeline.errors import DataError
from tests.data.pack.test_pack import read_by_webdataset
from tests.small_tars import contents, samples, write_tar


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(4):
        write_tar(folder / f"{number}.tar", samples(20, 20 * number))
    index.build(folder)
    (folder / "card.json").write_text(json.dumps({"licence": "CC0-1.0"}))
    (folder / "classes.json").write_text(json.dumps([f"class {i}" for i in range(10)]))
    return folder


@pytest.mark.parametrize("indexed", [True, False])
def test_tars_are_packed_again(shards: Path, tmp_path: Path, indexed: bool) -> None:
    before = contents(shards)
    if not indexed:
        for path in shards.glob("*.idx"):
            path.unlink()
    assert detect(shards) == "tars"
    packed = pack(shards, tmp_path / "out", Packing(holdout=10, min_shards=7, seed=3))
    assert packed.samples == {"train": 70, "test": 10}
    train, test = contents(tmp_path / "out/train"), contents(tmp_path / "out/test")
    assert train | test == before and list(train) != sorted(train)
    assert len(index.open_index(tmp_path / "out/train").shards) == 7
    card = json.loads((tmp_path / "out/train/card.json").read_text())
    assert sum(card["classes"].values()) == 70 and card["licence"] == "CC0-1.0"
    assert len(read_by_webdataset(tmp_path / "out/train")) == 70


def test_tars_are_filtered_by_a_list(shards: Path, tmp_path: Path) -> None:
    keys = [f"{i:05d}" for i in range(0, 80, 3)]
    (tmp_path / "keys").write_text("\n".join(keys) + "\n\n")
    for without in (False, True):
        out = tmp_path / f"out{without}"
        pack(shards, out, Packing(shuffle=False), kind="tars", chosen=Chosen(tmp_path / "keys", without))
        assert list(contents(out / "train")) == [key for key in contents(shards) if (key in keys) is not without]
    (tmp_path / "keys").write_text("")
    with pytest.raises(DataError, match="holds no keys"):
        pack(shards, tmp_path / "none", Packing(), kind="tars", chosen=Chosen(tmp_path / "keys"))
    (tmp_path / "keys").write_text("other")
    with pytest.raises(DataError, match="nothing is left to pack"):
        pack(shards, tmp_path / "none", Packing(), kind="tars", chosen=Chosen(tmp_path / "keys"))


def test_tars_that_use_the_same_keys(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "in").mkdir(exist_ok=True)
        write_tar(tmp_path / "in" / f"{name}.tar", [("0.txt", name.encode()), ("1.txt", b"x")])
    with pytest.raises(DataError, match=r"2 samples have the key of another, such as 0; put the names of the tars"):
        pack(tmp_path / "in", tmp_path / "out", Packing())
    pack(tmp_path / "in", tmp_path / "out", Packing(), chosen=Chosen(prefix=True))
    found = contents(tmp_path / "out/train")
    assert found.keys() == {"a/0", "a/1", "b/0", "b/1"} and found["b/0"] == {"txt": b"b"}


def test_tars_that_are_damaged_are_not_packed(shards: Path, tmp_path: Path) -> None:
    flip(shards / "1.tar", b"sample 23")
    with pytest.raises(DataError, match=r"(?s)1 of 80 samples.*1\.tar, member 00023\.txt: .*data repair"):
        pack(shards, tmp_path / "out", Packing())


def test_sounds_are_packed_by_class(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in ("no", "yes"):
        (tmp_path / "in" / label).mkdir(parents=True)
        for i in range(6):
            path = tmp_path / "in" / label / f"{i}.{'flac' if i % 2 else 'wav'}"
            soundfile.write(path, rng.uniform(-0.5, 0.5, 800).astype(np.float32), 8000, subtype="PCM_16")
    assert detect(tmp_path / "in") == "audio"
    pack(tmp_path / "in", tmp_path / "out", Packing())
    given = {path.read_bytes() for path in (tmp_path / "in").glob("*/*")}
    with open_dataset(tmp_path / "out/train") as dataset:
        each = [dataset.sample(number) for number in range(12)]
        assert {bytes(sample.raw(sample.fields[0])) for sample in each} == given
        assert all(sample.first("wav", "flac").rate == 8000 and sample["cls"] in (0, 1) for sample in each)
    (tmp_path / "in/no/0.wav").write_bytes(b"RIFF and no more")
    (tmp_path / "in/no/1.flac").write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)2 of 12 sounds .*no/0\.wav: not a RIFF.*no/1\.flac: is empty"):
        pack(tmp_path / "in", tmp_path / "again", Packing())


def flip(tar: Path, what: bytes) -> None:
    content = bytearray(tar.read_bytes())
    content[content.index(what)] ^= 1
    os.unlink(tar)  # other names of the file keep its bytes
    tar.write_bytes(content)


def test_repair_leaves_out_what_is_bad_and_nothing_else(shards: Path, tmp_path: Path) -> None:
    before = contents(shards)
    write_tar(shards / "4.tar", [("a.cls", b"1"), ("b.cls", b"one"), ("c.txt", b"\xff")])  # two do not decode
    index.build(shards)
    old = index.read_root(shards).identity
    flip(shards / "1.tar", b"sample 23")
    cut = (shards / "2.tar").read_bytes()
    (shards / "2.tar").write_bytes(cut[: len(cut) // 2])
    (shards / "3.tar").unlink()
    (tmp_path / "drop").write_text("00002\n")
    repaired = repair(shards, tmp_path / "out", tmp_path / "drop")
    found = contents(tmp_path / "out")
    assert found.items() <= (before | {"a": {"cls": b"1"}}).items() and "a" in found
    whole = [f"{i:05d}" for i in range(40) if i not in (2, 23)]
    assert set(whole) <= set(found) and len(whole) < len(found) - 1 < 58  # and those of 2.tar before the cut
    assert repaired.samples == len(found) and repaired.rewritten == 5
    listed = json.loads((tmp_path / "out" / LEFT_OUT).read_text())
    assert sum(each["samples"] for each in listed) == 83 - len(found) == sum(each.samples for each in repaired.left_out)
    reasons = {each["key"]: each["why"] for each in listed}
    assert reasons["00002"] == "its key is on the list" and "not those indexed" in reasons["00023"]
    assert reasons["b"].startswith("cls: ") and reasons["c"].startswith("txt: ") and None in reasons
    assert not [each for each in verify(tmp_path / "out") if isinstance(each, Damage)]
    assert repaired.identity == index.open_index(tmp_path / "out").identity != old
    assert json.loads((tmp_path / "out/card.json").read_text())["repaired"]["from"] == old
    with pytest.raises(DataError, match="exists already"):
        repair(shards, tmp_path / "out")


def test_repair_links_good_shards_and_mends_what_no_sample_lacks(shards: Path, tmp_path: Path) -> None:
    same = repair(shards, tmp_path / "same")
    assert (same.rewritten, same.left_out, same.identity) == (0, (), index.open_index(shards).identity)
    assert (tmp_path / "same/0.tar").samefile(shards / "0.tar")
    tar = bytearray((shards / "0.tar").read_bytes())
    tar[150] ^= 1  # a header's checksum: no sample is altered, other readers stop there
    (shards / "0.tar").unlink()
    (shards / "0.tar").write_bytes(tar)
    (shards / "1.tar.idx").write_bytes(b"torn")
    mended = repair(shards, tmp_path / "mended")
    assert (mended.rewritten, mended.left_out, mended.samples) == (1, (), 80)
    assert contents(tmp_path / "mended") == contents(tmp_path / "same")
    shutil.rmtree(shards)
    assert len(contents(tmp_path / "same")) == 80


def test_repair_goes_on_where_it_stopped(shards: Path, tmp_path: Path) -> None:
    flip(shards / "1.tar", b"sample 23")
    flip(shards / "3.tar", b"sample 64")

    def stopped(function, items):
        yield from map(function, islice(items, 2))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair(shards, tmp_path / "out", mapping=stopped)
    kept = (tmp_path / ".out.packing/out/1.tar").stat().st_mtime_ns
    repaired = repair(shards, tmp_path / "out")
    assert [left.key for left in repaired.left_out] == ["00023", "00064"]
    assert (tmp_path / "out/1.tar").stat().st_mtime_ns == kept and repaired.rewritten == 2


def test_merge_is_one_root_over_all(shards: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    more.mkdir()
    write_tar(more / "9.tar", samples(20, 80))
    index.build(more)
    with pytest.raises(DataError, match=r"different classes\.json"):
        merge([shards, more], tmp_path / "out")
    shutil.copy(shards / "classes.json", more)
    merged = merge([shards, more], tmp_path / "out")
    assert (merged.samples, merged.shards, merged.renamed, merged.warnings) == (100, 5, False, ())
    assert contents(tmp_path / "out") == contents(shards) | contents(more)
    both = index.open_index(tmp_path / "out")
    assert both.prefix_identity(80) == index.open_index(shards).identity  # a run knows what it has begun with
    assert (tmp_path / "out/9.tar").samefile(more / "9.tar")
    assert not [each for each in verify(tmp_path / "out") if isinstance(each, Damage)]
    turned = merge([more, shards, shards], tmp_path / "turned", copy=True)
    assert turned.renamed and turned.samples == 180 and "4 shards hold the same as another one" in turned.warnings[0]
    names = [*index.open_index(tmp_path / "turned").shards.all_names()]
    assert names[:2] == ["000-9.tar", "001-0.tar"] and not (tmp_path / "turned/000-9.tar").samefile(more / "9.tar")
    (more / "9.tar.idx").unlink()
    with pytest.raises(DataError, match="this part of the index is missing"):
        merge([shards, more], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_one_sample_is_found_and_written(shards: Path, tmp_path: Path) -> None:
    with open_dataset(shards) as dataset:
        sample = find(dataset, "00047")
        assert (sample.number, sample["cls"]) == (47, 7)
        paths = write(sample, tmp_path / "to")
        assert [path.name for path in paths] == ["00047.txt", "00047.cls"]
        assert all(path.read_bytes() == sample.raw(path.suffix[1:]) for path in paths)
        with pytest.raises(DataError, match="exists already"):
            write(sample, tmp_path / "to")
        with pytest.raises(DataError, match="no sample has the key 0047; there is 0"):
            find(dataset, "0047")
