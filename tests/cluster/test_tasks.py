"""Shards scanned and packed by the tasks of a real Ray cluster: the same bytes, and errors as they were raised."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import pipeline
from pipeline.cluster import ray, tasks
from pipeline.data import damage
from pipeline.data import index as indexer
from pipeline.data.damage import ShardReport
from pipeline.data.index import open_index
from pipeline.data.pack.pack import pack
from pipeline.data.pack.writer import Packing
from pipeline.errors import DataError, RunError
from tests import small_data
from tests.small_tars import samples, write_tar
from tests.test_train import RESNET


def test_shards_are_scanned_by_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another cluster's")
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(5):
        write_tar(folder / f"{number}.tar", samples(6, 6 * number))
    identity = indexer.build(folder).identity
    pack(folder, tmp_path / "here", Packing())
    pictures = small_data.images(tmp_path / "pictures")
    config = pipeline.load(small_data.config(tmp_path / "toy.yaml", RESNET, pictures))
    with ray.cluster(config, None):
        made = indexer.commit(folder, indexer.scan(folder, tasks.over_ray))
        assert made.identity == identity
        assert all(isinstance(found, ShardReport) for found in damage.verify(folder, tasks.over_ray))
        pids = set(tasks.over_ray(process_of, range(4)))
        assert os.getpid() not in pids
        pack(folder, tmp_path / "by ray", Packing(), mapping=tasks.over_ray)
        assert open_index(tmp_path / "by ray/train").identity == open_index(tmp_path / "here/train").identity
        (folder / "3.tar").write_bytes(b"\x1f\x8b compressed")
        with pytest.raises(DataError, match=r"^\S*3\.tar: compressed \(gzip\).*[^\n]*$"):
            list(indexer.scan(folder, tasks.over_ray))
    assert os.environ["RAY_AUTH_TOKEN"] == "another cluster's" and "RAY_AUTH_MODE" not in os.environ


def process_of(_: int) -> int:
    return os.getpid()


def test_no_cluster_is_an_error_that_can_be_mended():
    with pytest.raises(RunError, match=r"no Ray cluster at 127\.0\.0\.1:1: "), tasks.connected("127.0.0.1:1"):
        pass
