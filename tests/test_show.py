"""Samples to look at: which they are, what is written of them, and what a disk that is full costs. On plain torch; with
DeepSpeed and several workers they are tried in test_train.py.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import config as configs
from pipeline.config import Config
from pipeline.engine import Engine
from pipeline.session import Session, World
from pipeline.show import keep, show
from pipeline.tasks import Row
from pipeline.track import pictures
from tests import small_data
from tests.test_train import RESNET

CPU = torch.device("cpu")


class Noting:
    """A task that shows the places of its samples, and notes how it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, bool, bool]] = []

    def prepare(self, sample: Any, rng: Any) -> dict[str, np.ndarray]:
        return {"place": np.array(int(sample.key))}

    def show(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[Row]:
        self.asked.append((len(batch["place"]), model.training, torch.is_grad_enabled()))
        return [{"place": place, "pixels": np.full((2, 2, 3), place, np.uint8)} for place in batch["place"].tolist()]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("show")
    images = small_data.images(folder / "pictures")
    data = {"train": str(images), "evaluate": {"first": str(images), "second": str(images)}}
    track = {"wandb": "off", "samples": 6}
    return configs.load(small_data.config(folder / "toy.yaml", RESNET, images, data=data, track=track))


def asked_of(config: Config, task: Any) -> dict[str, list[Row]]:
    model = torch.nn.Linear(1, 1)
    shown = show(config, task, cast(Engine, SimpleNamespace(model=model, device=CPU)))
    assert model.training
    return shown


def kept(run: Path, shown: dict[str, list[Row]]) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    session = Session(World(0, 1, 0, CPU, cast(Any, None)), run, 1, lambda rank, new, where: bool(records.extend(new)))
    try:
        keep(session, 20, shown)
    finally:
        session.close()
    return records


def test_the_first_samples_of_each_set_in_micro_batches(config: Config) -> None:
    task = Noting()
    shown = asked_of(config, task)
    assert {name: [row["place"] for row in rows] for name, rows in shown.items()} == {
        "first": list(range(6)),
        "second": list(range(6)),
    }
    assert task.asked == [(4, False, False), (2, False, False)] * 2  # micro batches of 4, the last one cut
    assert asked_of(config.model_copy(update={"track": config.track.model_copy(update={"samples": 0})}), task) == {}
    assert asked_of(config, object()) == {}


def test_pictures_are_files_that_the_journal_names(config: Config, tmp_path: Path) -> None:
    grey, large = np.arange(144, dtype=np.uint8).reshape(12, 12, 1), np.full((200, 400, 3), 77, np.uint8)
    [record] = kept(tmp_path, {"test": [{"small": grey, "large": large, "label": 3}]})
    assert (record["kind"], record["step"]) == ("samples", 20)
    [row] = record["sets"]["test"]
    assert row["label"] == 3
    small = pictures.find(tmp_path, row["small"]["picture"])
    assert small and np.array_equal(np.asarray(Image.open(small)), grey[:, :, 0]), "not a pixel is lost"
    thumbnail = pictures.find(tmp_path, row["large"]["picture"])
    assert thumbnail and thumbnail.suffix == ".jpg"
    with Image.open(thumbnail) as image:
        assert image.size == (128, 64)


def test_a_disk_that_takes_no_pictures_is_one_warning(config: Config, tmp_path: Path) -> None:
    (tmp_path / "samples").write_text("a file where the folder should be")
    warning, record = kept(tmp_path, asked_of(config, Noting()))
    assert warning["kind"] == "warning" and "pictures of samples were not written" in warning["message"]
    assert [row["pixels"] for row in record["sets"]["first"]] == [None] * 6
