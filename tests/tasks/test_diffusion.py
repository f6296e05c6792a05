"""Diffusion: what is drawn and from which generator, scores, new pictures, and diffusers' own pipeline beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.data.reader import open_dataset
from pipeline.errors import ConfigError, DataError
from pipeline.models import denoisers
from pipeline.tasks import Batch
from pipeline.tasks.diffusion import Config, Task
from tests import small_data
from tests.models.test_denoisers import DIT, UNET

ARCHITECTURES = [("unet", UNET), ("dit", DIT)]


def task_of(**changes: Any) -> Task:
    values = {"image_size": 8, "channels": 1, "classes": 4, "model": UNET, "sampling_steps": 3}
    return Task(Config.model_validate(values | changes))


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.images(tmp_path_factory.mktemp("diffusion") / "squares", count=24, size=8)


def batch_of(task: Task, folder: Path, count: int = 6) -> Batch:
    dataset = open_dataset(folder)
    prepared = [task.prepare(dataset.sample(number), None) for number in range(count)]
    return {name: torch.from_numpy(np.stack([one[name] for one in prepared])) for name in prepared[0]}


def built(task: Task, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return task.build_model()


def test_loss_is_that_of_noise_and_time_from_torchs_generator(squares: Path) -> None:
    task = task_of(min_snr=5, label_dropout=0.5)
    model, batch = built(task), batch_of(task, squares)
    assert batch["number"].tolist() == list(range(6)) and batch["image"].dtype == torch.uint8
    torch.manual_seed(3)
    loss, sums = task.loss(model, batch)
    torch.manual_seed(3)
    noise, time, share = torch.randn(6, 1, 8, 8), torch.randint(1000, (6,)), torch.rand(6)
    label = torch.where(share < 0.5, 4, batch["label"])
    assert 0 < (label == 4).sum() < 6
    pixels = batch["image"].permute(0, 3, 1, 2) / 127.5 - 1
    process = denoisers.Process("cosine", "v_prediction", 1000, 5.0)
    torch.testing.assert_close(loss, process.errors(model, pixels, noise, time, label).sum())
    assert sums["loss"][1] == 6 == task.weight(batch) and loss.requires_grad
    assert not torch.equal(loss, task.loss(model, batch)[0])  # another draw


@pytest.mark.parametrize(("architecture", "options"), ARCHITECTURES)
@pytest.mark.parametrize("classes", [None, 4])
def test_one_batch_is_learnt_by_heart(
    squares: Path, architecture: str, options: dict[str, Any], classes: int | None
) -> None:
    """With noise and times held."""
    task = task_of(architecture=architecture, model=options, classes=classes)
    model, batch = built(task), batch_of(task, squares)
    assert ("label" in batch) == (classes is not None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        torch.manual_seed(0)
        loss = task.loss(model, batch)[0]
        optimizer.zero_grad()
        (loss / 6).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_a_score_follows_from_the_sample_alone(squares: Path) -> None:
    """Not from torch's generator, nor from the others of the batch; the average is over even levels of noise."""
    task = task_of()
    model, batch = built(task).eval(), batch_of(task, squares)
    state = torch.get_rng_state()
    with torch.no_grad():
        whole = task.score(model, batch)["loss"]
        parts = [task.score(model, {name: t[i : i + 1] for name, t in batch.items()})["loss"] for i in range(6)]
        assert whole[1] == 24 == sum(part[1] for part in parts)
        torch.testing.assert_close(whole[0], sum(torch.as_tensor(part[0]) for part in parts))
        assert torch.equal(state, torch.get_rng_state())
        shown, again = task.show(model, batch), task.show(model, {name: t[2:4] for name, t in batch.items()})
    assert shown[2].keys() == {"picture", "noisy", "denoised", "new", "label"}
    for name in ("picture", "noisy", "new"):
        one, other = (np.asarray(row[name]).astype(int) for row in (shown[2], again[0]))
        assert one.shape == (8, 8, 1) and np.abs(one - other).max() <= 1


def test_new_pictures_follow_from_the_generator(squares: Path) -> None:
    task = task_of(names=["a", "b", "c", "d"], guidance=2.0)
    model = built(task).eval()

    def drawn(seed: int, *prompts: str, **options: str) -> list[Any]:
        with torch.no_grad():
            return task.sample(model, list(prompts), 2, torch.Generator().manual_seed(seed), options)

    rows = drawn(0, "b", "3")
    assert [row["label"] for row in rows] == [1, 1, 3, 3]
    assert all(row["picture"].shape == (8, 8, 1) and row["picture"].dtype == np.uint8 for row in rows)
    same, other, none = drawn(0, "1", "d"), drawn(1, "b", "3"), drawn(0)
    assert all(np.array_equal(a["picture"], b["picture"]) for a, b in zip(rows, same))
    assert not np.array_equal(rows[0]["picture"], other[0]["picture"])
    assert len(none) == 2 and none[0].keys() == {"picture"}
    assert not np.array_equal(drawn(0, "b", guidance="9")[0]["picture"], rows[0]["picture"])


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        (["4"], {}, r"prompt '4' is no class; give a number from 0 to 3, or a name: a, b, c, d"),
        (["-1"], {}, "is no class"),
        ([], {"step": "3"}, "step: no such option; there are: steps, guidance"),
        ([], {"steps": "many"}, "give numbers"),
        ([], {"steps": "1001"}, "from 1 to 1000"),
    ],
)
def test_what_cannot_be_drawn_is_refused(prompts: list[str], options: dict[str, str], words: str) -> None:
    task = task_of(names=["a", "b", "c", "d"])
    with pytest.raises(ConfigError, match=words):
        task.sample(built(task), prompts, 1, torch.Generator(), options)
    with pytest.raises(ConfigError, match="trained without classes"):
        task_of(classes=None).sample(built(task), ["1"], 1, torch.Generator(), {})


def test_diffusers_pipeline_draws_the_same_pictures(tmp_path: Path) -> None:
    task = task_of(classes=None)
    model: Any = built(task).eval()
    model.save_pretrained(tmp_path / "unet")
    task.write_settings(tmp_path)
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        rows: list[Any] = task.sample(model, [], 3, torch.Generator().manual_seed(5), {"steps": "4"})
    theirs = pipeline(3, torch.Generator().manual_seed(5), num_inference_steps=4, output_type="pil").images  # type: ignore[union-attr]
    for row, image in zip(rows, theirs, strict=True):
        assert np.array_equal(row["picture"][:, :, 0], np.asarray(image))


@pytest.mark.parametrize(("architecture", "options"), ARCHITECTURES)
def test_a_folder_with_classes_opens_as_a_pipeline(tmp_path: Path, architecture: str, options: dict[str, Any]) -> None:
    """Its network wants a class, which DDIMPipeline does not give; network and scheduler draw by a loop."""
    task = task_of(architecture=architecture, model=options)
    model: Any = built(task).eval()
    model.save_pretrained(tmp_path / "unet")
    task.write_settings(tmp_path)
    pipeline: Any = diffusers.DDIMPipeline.from_pretrained(tmp_path, local_files_only=True)
    x, scheduler = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5)), pipeline.scheduler
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for step in scheduler.timesteps:
            said = pipeline.unet(x, step.expand(2), class_labels=torch.tensor([1, 1])).sample
            x = scheduler.step(said, step, x).prev_sample
        rows: list[Any] = task.sample(model, ["1"], 2, torch.Generator().manual_seed(5), {"steps": "4"})
    theirs = ((x / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack([row["picture"] for row in rows]), theirs)


def test_a_label_out_of_range_names_the_sample(squares: Path) -> None:
    dataset, task = open_dataset(squares), task_of(classes=1)
    bad = next(number for number in range(24) if dataset.sample(number)["cls"])
    with pytest.raises(DataError, match=rf"sample {bad:05d} has label \d; with task.classes 1"):
        task.prepare(dataset.sample(bad), None)


def test_images_are_mirrored_only_with_a_generator(squares: Path) -> None:
    task, sample = task_of(flip=True), open_dataset(squares).sample(0)
    plain = task.prepare(sample, None)["image"]
    found = [task.prepare(sample, np.random.default_rng(seed))["image"] for seed in range(8)]
    mirrored = [np.array_equal(one, plain[:, ::-1]) for one in found]
    assert task.augments and not task_of().augments and 0 < sum(mirrored) < 8
    assert all(np.array_equal(one, plain) or turned for one, turned in zip(found, mirrored))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"names": ["a"]}, "1 names, and `classes` is 4"),
        ({"classes": None, "names": ["a"]}, "`classes` is None"),
        ({"timesteps": 10, "sampling_steps": 50}, "more than the 10"),
        ({"prediction": "noise"}, "prediction"),
        ({"min_snr": 0}, "min_snr"),
        ({"label_dropout": 1}, "label_dropout"),
    ],
)
def test_a_section_that_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        task_of(**changes)
