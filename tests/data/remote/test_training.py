"""A run whose shards lie at a URL is bitwise the run that has them in a folder; what cannot work is said beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configs
from pipeline.data.stream import Stream
from pipeline.errors import ConfigError
from pipeline.session import World
from tests import gloo, small_data
from tests.data.file_server import Answer, FileServer
from tests.small_session import of_kind, records_of
from tests.test_train import RESNET


def written(folder: Path, name: str, place: str | Path, **data: Any) -> Path:
    both = {"train": str(place), "evaluate": {"test": str(place)}, "block_bytes": 4096, **data}
    return small_data.config(
        folder / f"{name}.yaml", RESNET, Path("unused"), name=name, steps=12, data=both, checkpoint={"every": 100}
    )


def trained(world: World, paths: dict[str, Path], work: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: records_of(world, configs.load(path), work / name) for name, path in paths.items()}


def test_a_run_from_a_url_is_bitwise_the_local_one(tmp_path: Path) -> None:
    images = small_data.images(tmp_path / "images")

    def fault(asked: Any, count: int) -> Answer | None:
        return Answer(503) if count % 7 == 6 else None

    with FileServer(images, fault=fault) as server:
        paths = {"local": written(tmp_path, "local", images)}
        for name, changes in (("url", {}), ("small cache", {"cache_bytes": 300_000, "threads": 2})):
            cache = str(tmp_path / "caches" / name)
            paths[name] = written(tmp_path, name.replace(" ", "-"), server.url, cache=cache, **changes)
        [found] = gloo.run(trained, 1, paths, tmp_path / "runs")
    for name in ("url", "small cache"):
        for kind in ("step", "evaluation"):
            here, there = (
                [{**record["metrics"], "samples": record.get("samples")} for record in of_kind(found[which], kind)]
                for which in ("local", name)
            )
            for record in (*here, *there):
                for timed in [key for key in record if key.startswith(("time/", "data/", "throughput/", "memory/"))]:
                    del record[timed]
            assert here == there and here


def test_what_is_not_at_a_url_is_said_before_the_run(tmp_path: Path) -> None:
    images = small_data.images(tmp_path / "images")
    with FileServer(images) as server:
        configs.load(written(tmp_path, "good", server.url))
        (images / "shards.idx").rename(images / "elsewhere")
        with pytest.raises(ConfigError, match=r"holds no shards\.idx") as raised:
            configs.load(written(tmp_path, "unindexed", server.url))
        assert f"millstream data index {server.url}" in str(raised.value)
        server.fault = lambda asked, count: Answer(403)
        (images / "elsewhere").rename(images / "shards.idx")
        with pytest.raises(ConfigError, match="access refused"):
            configs.load(written(tmp_path, "refused", server.url))
        url = server.url
    with pytest.raises(ConfigError, match=r"data\.train .*cannot be reached"):
        configs.load(written(tmp_path, "away", url))
    with pytest.raises(ConfigError, match=r"s4:// is no kind of store"):
        configs.load(written(tmp_path, "unknown", "s4://bucket/photos"))


def test_a_cache_that_cannot_hold_the_windows_is_refused(tmp_path: Path) -> None:
    images = small_data.images(tmp_path / "images", count=400)
    with FileServer(images) as server:
        with pytest.raises(ConfigError, match=r"data\.cache_bytes") as raised:
            configs.load(written(tmp_path, "one", server.url, cache_bytes=100_000))
        assert "one worker's windows over the shards are 0.2 MB" in str(raised.value)
        path = written(tmp_path, "all", server.url, cache_bytes=300_000, cache=str(tmp_path / "cache"))
        data = Stream(configs.load(path))

        class Task:
            augments = False

            def prepare(self, sample: Any, rng: Any) -> dict[str, Any]:
                return {}

        with pytest.raises(ConfigError, match=r"the 2 workers of this node read from 0\.\d MB at a time") as raised:
            data.loader(Task(), 0, 2, 0, here=[0, 1])
        assert "set data.cache_bytes to at least" in str(raised.value)
        data.close()
