"""Audio classification: clips cut and padded, masks by sample, wav and flac alike, losses, messages."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from pydantic import ValidationError
from torch.nn import functional

from pipeline.data import index
from pipeline.data.reader import Sample, SampleError, open_dataset
from pipeline.errors import DataError
from pipeline.models import log_mel
from pipeline.tasks import Batch
from pipeline.tasks.audio_classification import Config, Task
from tests import small_data

RATE = 8000


def task_of(**changes: Any) -> Task:
    values = {"classes": 3, "rate": RATE, "seconds": 0.5, "mels": 20, "stack": 2, "model": {"width": 8, "layers": 1}}
    return Task(Config.model_validate(values | changes))


def sample_of(folder: Path, samples: np.ndarray, extension: str = "wav", rate: int = RATE, label: str = "1") -> Sample:
    """One sample in a tar of its own, read back."""
    folder.mkdir()
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=extension.upper(), subtype="PCM_16")
    with tarfile.open(folder / "shard-000.tar", "w") as tar:
        for name, data in ((f"bell.{extension}", file.getvalue()), ("bell.cls", label.encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    index.build(folder)
    return open_dataset(folder).sample(0)


def batch_of(task: Task, folder: Path, seed: int | None = None, count: int = 8) -> Batch:
    dataset = open_dataset(folder)
    rng = None if seed is None else np.random.default_rng(seed)
    prepared = [task.prepare(dataset.sample(number), rng) for number in range(count)]
    return {name: torch.from_numpy(np.stack([one[name] for one in prepared])) for name in prepared[0]}


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.sounds(tmp_path_factory.mktemp("audio") / "tones")


@pytest.fixture
def steady() -> np.ndarray:
    """1,000 numbers that 16 bits hold exactly, each another."""
    return np.arange(1000, dtype=np.int16) * 8


def test_a_short_clip_is_padded_and_a_long_one_cut(tmp_path: Path, steady: np.ndarray) -> None:
    sample = sample_of(tmp_path / "one", steady)
    short = task_of(seconds=0.2).prepare(sample, None)
    assert short["samples"].dtype == np.float32 and short["samples"].shape == (1600,)
    assert np.array_equal(short["samples"][:1000] * 2**15, steady) and not short["samples"][1000:].any()
    assert (int(short["length"]), int(short["label"])) == (1000, 1)
    cut = task_of(seconds=0.1).prepare(sample, None)  # the middle
    assert np.array_equal(cut["samples"] * 2**15, steady[100:900]) and int(cut["length"]) == 800
    begins = set()
    for seed in range(40):
        one, again = (task_of(seconds=0.1).prepare(sample, np.random.default_rng(seed)) for _ in range(2))
        begin = int(one["samples"][0] * 2**15) // 8
        assert np.array_equal(one["samples"] * 2**15, steady[begin : begin + 800])
        assert np.array_equal(one["samples"], again["samples"])
        begins.add(begin)
    assert len(begins) > 20 and min(begins) < 20 and max(begins) > 180


def test_wav_and_flac_and_the_mean_of_channels(tmp_path: Path, steady: np.ndarray) -> None:
    of_wav, of_flac = (task_of().prepare(sample_of(tmp_path / e, steady, e), None) for e in ("wav", "flac"))
    assert np.array_equal(of_wav["samples"], of_flac["samples"])
    both = sample_of(tmp_path / "both", np.stack([steady, steady // 4], axis=1))
    mean = (steady.astype(float) + steady // 4) / 2 / 2**15
    np.testing.assert_allclose(task_of().prepare(both, None)["samples"][:1000], mean, atol=1e-7)


def test_masks_are_drawn_by_sample_within_their_bounds(tmp_path: Path, steady: np.ndarray) -> None:
    sample = sample_of(tmp_path / "one", np.resize(steady, 3000))  # 38 frames
    masks = {"bands": 2, "band_width": 5, "frames": 1, "frame_width": 30, "frame_share": 0.25}
    task = task_of(masks=masks)
    assert task.prepare(sample, None).keys() == task_of().prepare(sample, np.random.default_rng(0)).keys()
    drawn = [task.prepare(sample, np.random.default_rng(seed)) for seed in range(300)]
    bands, frames = (np.concatenate([one[name] for one in drawn]) for name in ("bands", "frames"))
    assert bands.shape == (600, 2) and frames.shape == (300, 2) and bands.dtype == np.int64
    assert set(bands[:, 1]) == set(range(6)) and set(frames[:, 1]) == set(range(10))  # a quarter of 38 is 9
    assert bands.min() == 0 and bands.sum(axis=1).max() == 20 and frames.sum(axis=1).max() == 38
    again = task.prepare(sample, np.random.default_rng(7))
    assert all(np.array_equal(again[name], drawn[7][name]) for name in again)


def test_loss_and_score_are_the_cross_entropy_of_the_features(tones: Path) -> None:
    task = task_of(masks={"bands": 1, "frames": 1})
    torch.manual_seed(0)
    model, batch = task.build_model(), batch_of(task, tones, seed=1)
    features = log_mel.LogMel(20, RATE, 200, 80)(batch["samples"], batch["length"])
    features = log_mel.masked(features, batch["bands"], batch["frames"])
    logits = model(*log_mel.stacked(features, batch["length"] // 80 + 1, 2))
    loss, sums = task.loss(model, batch)
    torch.testing.assert_close(loss, functional.cross_entropy(logits, batch["label"], reduction="sum"))
    assert loss.requires_grad and task.weight(batch) == 8 == sums["accuracy"][1]
    assert float(sums["accuracy"][0]) == (logits.argmax(1) == batch["label"]).sum()
    plain = batch_of(task, tones)
    with torch.no_grad():
        assert task.score(model, plain)["loss"][0] != sums["loss"][0]  # nothing is hidden


def test_how_long_clips_may_be_changes_nothing_for_those_that_are_shorter(tones: Path) -> None:
    small, large = task_of(), task_of(seconds=2.0)
    torch.manual_seed(0)
    model = small.build_model()
    losses = [float(task.loss(model, batch_of(task, tones))[0].detach()) for task in (small, large)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_what_is_shown_is_what_the_network_says(tones: Path) -> None:
    task = task_of()
    torch.manual_seed(0)
    model, batch = task.build_model().eval(), batch_of(task, tones)
    with torch.no_grad():
        rows = task.show(model, batch)
    assert [row["label"] for row in rows] == batch["label"].tolist()
    for row, length in zip(rows, batch["length"].tolist()):
        picture = row["picture"]
        assert isinstance(picture, np.ndarray) and picture.shape == (20, length // 80 + 1, 1)
        assert picture.dtype == np.uint8 and row["seconds"] == pytest.approx(length / RATE)
    rising = {**batch_of(task, tones, count=1), "samples": sweep(), "length": torch.tensor([4000])}
    picture = task.show(model, rising)[0]["picture"]
    assert isinstance(picture, np.ndarray)
    brightest = picture[:, 5:-5, 0].argmax(axis=0)
    assert brightest[0] > 10 > brightest[-1]  # low notes below


def sweep() -> torch.Tensor:
    """[1, 4000]: half a second from 200 to 3,400 Hz."""
    time = torch.arange(4000) / RATE
    return torch.sin(2 * torch.pi * (200 * time + 3200 * time.square())).unsqueeze(0)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_tones_are_learnt(tones: Path, cell: str) -> None:
    task = task_of(model={"cell": cell, "width": 16, "layers": 1})
    torch.manual_seed(0)
    model, batch = task.build_model(), batch_of(task, tones, count=24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = 0.0
    for step in range(60):
        loss, sums = task.loss(model, batch)
        first = first if step else float(loss.detach())
        optimizer.zero_grad()
        (loss / task.weight(batch)).backward()
        optimizer.step()
    assert float(sums["accuracy"][0]) == 24 and float(sums["loss"][0]) < 0.1 * first


def test_flops_are_those_of_the_weights(tones: Path) -> None:
    task = task_of(model={"cell": "gru", "width": 8, "layers": 2, "bidirectional": False})
    weights = 3 * 8 * (40 + 8) + 3 * 8 * (8 + 8)
    assert task.flops_per_sample() == 6 * weights * 26  # 51 frames, two a step


def test_samples_that_do_not_fit_are_named(tmp_path: Path, steady: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"sample bell has 16000 samples a second, and task\.rate is 8000"):
        task_of().prepare(sample_of(tmp_path / "fast", steady, rate=16000), None)
    with pytest.raises(DataError, match=r"sample bell has label 3; .* 0 to 2"):
        task_of().prepare(sample_of(tmp_path / "label", steady, label="3"), None)
    with pytest.raises(SampleError, match="sample bell is a sound without samples"):
        task_of().prepare(sample_of(tmp_path / "empty", steady[:0]), None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hop_ms": 30}, "hop_ms.* is 240 samples"),
        ({"hop_ms": 0.01}, "hop_ms.* is 0 samples"),
        ({"masks": {"bands": 1, "band_width": 21}}, "band_width"),
        ({"masks": {"freqs": 1}}, "freqs"),
        ({"model": {"cell": "rnn"}}, "cell"),
        ({"model": {"width": 0}}, "width"),
        ({"classes": 1}, "classes"),
    ],
)
def test_a_section_that_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        task_of(**changes)
