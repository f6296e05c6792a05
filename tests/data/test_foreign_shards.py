"""Shards that others wrote train here once they are indexed; ours are ordinary WebDataset shards."""

from __future__ import annotations

import gc
import subprocess
import warnings
from pathlib import Path

from webdataset.compat import WebDataset
from webdataset.writer import ShardWriter

from pipeline import config as configs
from pipeline.data import index
from pipeline.data.pack.writer import Packing, silent, write_split
from pipeline.data.reader import open_dataset
from pipeline.session import World
from tests import gloo, small_data
from tests.small_session import of_kind, records_of
from tests.test_train import RESNET


def losses(world: World, folders: dict[str, Path], work: Path) -> dict[str, list[float]]:
    """The losses of five steps on each data set."""
    found = {}
    for name, folder in folders.items():
        path = small_data.config(work / f"{name}.yaml", RESNET, folder, name=name, steps=5)
        records = records_of(world, configs.load(path), work / "runs" / name)
        found[name] = [record["metrics"]["train/loss"] for record in of_kind(records, "step")]
    return found


def test_shards_of_shard_writer_and_of_tar_train_like_our_own(tmp_path: Path) -> None:
    """The same samples in the same order give the same losses, whoever wrote the tars."""
    small = open_dataset(small_data.images(tmp_path / "small"))
    samples = [(s.key, s.raw("png"), s.raw("cls")) for s in map(small.sample, range(96))]
    ours = tmp_path / "ours"
    pieces = ((key, {"png": bytes(png), "cls": bytes(cls)}) for key, png, cls in samples)
    write_split(ours, pieces, 96, 2000, Packing(min_shards=3), silent)
    folders = {"ours": ours, "writer": tmp_path / "writer", "tar": tmp_path / "tar"}
    edges = [shard.samples for shard in index.open_index(ours).shards]
    for name in ("writer", "tar"):
        folders[name].mkdir()
    begin = 0
    for number, count in enumerate(edges):
        part, begin = samples[begin : begin + count], begin + count
        with ShardWriter(str(folders["writer"] / f"shard-{number:03d}-%d.tar"), verbose=0) as writer:
            for key, png, cls in part:
                writer.write({"__key__": key, "png": bytes(png), "cls": bytes(cls)})
        loose = tmp_path / f"loose-{number}"
        loose.mkdir()
        for key, png, cls in part:
            (loose / f"{key}.png").write_bytes(png)
            (loose / f"{key}.cls").write_bytes(cls)
        target = folders["tar"] / f"shard-{number:03d}.tar"
        subprocess.run(["tar", "--sort=name", "-cf", target, "-C", loose, "."], check=True)
    for name in ("writer", "tar"):
        index.build(folders[name])
    [found] = gloo.run(losses, 1, folders, tmp_path)
    assert found["ours"] == found["writer"] == found["tar"] and len(found["ours"]) == 5


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    ours = small_data.images(tmp_path / "ours")
    urls = [str(path) for path in sorted(ours.glob("*.tar"))]
    dataset = open_dataset(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its last tar to the garbage collector
        read = list(WebDataset(urls, shardshuffle=False))
        gc.collect()
    assert [sample["__key__"] for sample in read] == [dataset.sample(number).key for number in range(96)]
    assert all(sample["png"] == bytes(dataset.sample(number).raw("png")) for number, sample in enumerate(read))
