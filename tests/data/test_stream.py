"""The data of a run as a configuration opens them and a checkpoint keeps them: the same, or refused, or on purpose."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import config as configs
from pipeline.data import index
from pipeline.data.stream import Stream
from pipeline.errors import DataError
from tests import small_data
from tests.test_train import RESNET

BATCH = 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two data sets of pictures, 96 and 40, and a configuration that mixes them 2 : 1."""
    small_data.images(tmp_path / "many")
    small_data.images(tmp_path / "few", count=40, size=13)
    return tmp_path


def stream(folder: Path, *overrides: str) -> Stream:
    sources = {"many": {"folder": str(folder / "many"), "weight": 2}, "few": {"folder": str(folder / "few")}}
    path = small_data.config(folder / "toy.yaml", RESNET, Path("unused"), data={"train": sources, "block_bytes": 4096})
    return Stream(configs.load(path, overrides))


def kept(data: Stream) -> Any:
    """What a checkpoint gives back."""
    return json.loads(json.dumps(data.state))


def read(data: Stream, first: int, last: int) -> Counter[tuple[int, int, int]]:
    """(source, epoch, number) of all samples of steps [first, last)."""
    rows = [zip(*data.mixture.rows(step, j, 4)) for step in range(first, last) for j in range(BATCH // 4)]
    return Counter((int(s), int(e), int(n)) for columns in rows for s, e, n in columns)


def test_a_state_is_small_and_brings_the_same_order_back(folder: Path) -> None:
    data = stream(folder)
    again = stream(folder)
    assert again.resume(7, kept(data), new_order=False) == []
    assert read(again, 7, 20) == read(data, 7, 20)
    assert len(json.dumps(data.state)) < 2000
    assert "many 96 samples" in str(data) and "0.6667 of the batches" in str(data)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=3", "seed: 0 -> 3"),
        ("data.lanes=8", "lanes: 4 -> 8"),
        ("data.shuffle_blocks=8", "shuffle_blocks: 96 -> 8"),
        ("data.block_bytes=9000", "block"),
        ("data.train.few.weight=2", "weight of few"),
        ("global_batch_size=32", "global batch: 16 -> 32"),
        ("micro_batch_size=2", "micro batch: 4 -> 2"),
    ],
)
def test_another_order_is_refused_with_the_difference(folder: Path, override: str, said: str) -> None:
    before = kept(stream(folder))
    with pytest.raises(DataError, match=r"another order: .*--fresh.*--new-order") as refused:
        stream(folder, override).resume(5, before, new_order=False)
    assert said in str(refused.value)
    [first, *_] = stream(folder, override).resume(5, before, new_order=True)
    assert first.startswith("new order from step 5: ") and said in first


def test_other_data_are_refused_by_name(folder: Path) -> None:
    before = kept(stream(folder))
    shutil.rmtree(folder / "few")
    small_data.images(folder / "few", count=44, size=13)
    with pytest.raises(DataError, match="data of few"):
        stream(folder).resume(5, before, new_order=False)


def test_new_weights_leave_every_epoch_whole(folder: Path) -> None:
    """Resumed again later without being told, as a restart is."""
    data, changed, later = stream(folder), stream(folder, "data.train.few.weight=6"), stream(folder)
    changed.resume(5, kept(data), new_order=True)
    later = stream(folder, "data.train.few.weight=6")
    assert later.resume(9, kept(changed), new_order=False) == []
    seen = read(data, 0, 5) + read(changed, 5, 9) + read(later, 9, 60)
    assert max(seen.values()) == 1
    whole = Counter((source, epoch) for source, epoch, _ in seen)
    assert whole[0, 0] == whole[0, 1] == 96 and whole[1, 0] == whole[1, 1] == whole[1, 2] == 40
    few = sum(count for (source, _, _), count in read(later, 9, 60).items() if source == 1)
    assert few / (51 * BATCH) == pytest.approx(6 / 8, abs=0.02)


def test_a_data_set_that_has_grown_is_joined_at_an_epoch_edge(folder: Path) -> None:
    data = stream(folder)
    before = kept(data)
    small_data.images(folder / "new", count=20, size=13)
    for path in folder.joinpath("new").glob("*.tar"):
        path.rename(folder / "few" / f"later-{path.name}".replace("later", "zz"))
    index.build(folder / "few")
    grown = stream(folder)
    with pytest.raises(DataError, match="few"):
        stream(folder).resume(5, before, new_order=False)
    notes = grown.resume(5, before, new_order=True)
    assert any("few" in note and "40" in note and "60" in note for note in notes), notes
    seen = read(data, 0, 5) + read(grown, 5, 60)
    assert max(seen.values()) == 1
    sizes = Counter((source, epoch) for source, epoch, _ in seen)
    assert sizes[1, 0] == 40 and sizes[1, 2] == 60 and sizes[0, 0] == 96


def test_decisions_on_bad_samples_are_kept_and_follow_their_source(folder: Path) -> None:
    data = stream(folder)
    data.substitutes.update({(0, 9): 10, (1, 3): 4})
    again = stream(folder)
    again.resume(5, kept(data), new_order=False)
    assert again.substitutes == data.substitutes
    swapped = {"few": str(folder / "few"), "many": str(folder / "many")}
    path = small_data.config(folder / "swapped.yaml", RESNET, Path("unused"), data={"train": swapped})
    other = Stream(configs.load(path))
    other.resume(5, kept(data), new_order=True)
    assert other.substitutes == {(1, 9): 10, (0, 3): 4}


def test_a_user_s_decoder_is_found_by_its_import_path(folder: Path, tmp_path: Path) -> None:
    path = small_data.config(folder / "toy.yaml", RESNET, folder / "many", data={"train": str(folder / "many")})
    decoders = "data.decoders={ppm: 'tests.data.test_stream:portable_pixmap'}"
    with_decoder = Stream(configs.load(path, [decoders]))
    assert with_decoder.datasets[0].decoders["ppm"] is portable_pixmap


def portable_pixmap(data: memoryview) -> np.ndarray:
    import io

    return np.asarray(Image.open(io.BytesIO(data)))
