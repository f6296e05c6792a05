"""Image classification against plain PyTorch: losses, mixup, channels, norms, pretrained folders, messages."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from pipeline import initial
from pipeline.data import augment, index
from pipeline.data.reader import Sample, open_dataset
from pipeline.errors import ConfigError, DataError
from pipeline.session import World
from pipeline.tasks import Batch
from pipeline.tasks.image_classification import Config, Task
from tests import small_data

TINY = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def task_of(**changes: Any) -> Task:
    values = {"classes": 4, "channels": 1, "image_size": 12, "architecture": "resnet", "model": TINY}
    return Task(Config.model_validate(values | changes))


def built(task: Task, seed: int = 0) -> nn.Module:
    """With its first weights, as one rank has them."""
    torch.manual_seed(seed)
    model = task.build_model()
    initial.fill(model, World(0, 1, 0, torch.device("cpu"), None), task.weights, None, torch.float32)  # type: ignore[arg-type]
    return model


def made_up(m: int = 8, size: int = 12, channels: int = 1, classes: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (m, size, size, channels), dtype=torch.uint8, generator=generator)
    return {"image": image, "label": torch.randint(0, classes, (m,), generator=generator)}


def sample_of(folder: Path, image: np.ndarray | None, label: str, mode: str | None = None) -> Sample:
    """One sample in a tar of its own, read back."""
    folder.mkdir()
    png = io.BytesIO()
    Image.fromarray(image, mode).save(png, "png") if image is not None else png.write(b"not a picture")
    with tarfile.open(folder / "shard-000.tar", "w") as tar:
        for name, data in (("flower.png", png.getvalue()), ("flower.cls", label.encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    index.build(folder)
    return open_dataset(folder).sample(0)


def test_loss_and_score_equal_plain_pytorch() -> None:
    task = task_of(label_smoothing=0.1, mean=[0.2], std=[0.3])
    model, batch = built(task), made_up()
    pixels = (batch["image"].permute(0, 3, 1, 2).double() / 255 - 0.2) / 0.3
    logits = model(pixel_values=pixels.float()).logits
    loss, sums = task.loss(model, batch)
    expected = functional.cross_entropy(logits, batch["label"], label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert loss.dtype == torch.float32 and loss.requires_grad and task.weight(batch) == 8
    assert float(sums["accuracy"][0]) == (logits.argmax(1) == batch["label"]).sum() and sums["accuracy"][1] == 8

    model.eval()
    with torch.no_grad():
        expected = functional.cross_entropy(model(pixel_values=pixels.float()).logits, batch["label"], reduction="sum")
        torch.testing.assert_close(task.score(model, batch)["loss"][0], expected)


def test_what_is_shown_is_what_the_network_says() -> None:
    task, batch = task_of(), made_up()
    model = built(task).eval()
    with torch.no_grad():
        rows = task.show(model, batch)
        shares = model(pixel_values=task._normalised(model, batch)).logits.softmax(dim=1)
    assert [row["prediction"] for row in rows] == shares.argmax(dim=1).tolist()
    assert [row["probability"] for row in rows] == pytest.approx(shares.amax(dim=1).tolist())
    assert [row["label"] for row in rows] == batch["label"].tolist()
    assert all(np.array_equal(row["picture"], image) for row, image in zip(rows, batch["image"].numpy()))


def test_mixup_follows_from_torchs_seed_and_is_the_published_formula() -> None:
    task = task_of(mixup=0.4)
    model, batch = built(task), made_up()

    def loss(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return task.loss(model, batch)[0]

    assert torch.equal(loss(5), loss(5)) and not torch.equal(loss(5), loss(6))
    torch.manual_seed(5)
    share = float(torch.distributions.Beta(0.4, 0.4).sample())
    partner = torch.randperm(8)
    pixels = (batch["image"].permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    logits = model(pixel_values=share * pixels + (1 - share) * pixels[partner]).logits
    soft = functional.one_hot(batch["label"], 4) * share + functional.one_hot(batch["label"][partner], 4) * (1 - share)
    torch.testing.assert_close(loss(5), functional.cross_entropy(logits, soft, reduction="sum"))
    state = torch.get_rng_state()
    torch.testing.assert_close(task.score(model, batch)["loss"], task_of().score(model, batch)["loss"])
    assert torch.equal(state, torch.get_rng_state())  # evaluation neither mixes nor draws


@pytest.mark.parametrize(
    ("architecture", "options", "changes"),
    [
        ("resnet", TINY, {"norm": "group"}),
        ("convnextv2", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}, {"channels": 3}),
        ("vit", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4,
                 "intermediate_size": 32}, {}),
    ],
)  # fmt: skip
def test_one_batch_is_learnt_by_heart(architecture: str, options: dict[str, Any], changes: dict[str, Any]) -> None:
    task = task_of(architecture=architecture, model=options, **changes)
    model, batch = built(task), made_up(channels=task.config.channels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss, sums = task.loss(model, batch)
        optimizer.zero_grad()
        (loss / task.weight(batch)).backward()
        optimizer.step()
    assert float(sums["accuracy"][0]) == 8 and float(sums["loss"][0]) / 8 < 0.1


def test_a_share_of_the_square_is_cut_out_here_and_by_the_exported_settings(tmp_path: Path) -> None:
    """Where none is cut out at random: 12 of 16 pixels. There the filter sees across the edge of the cut."""
    pixels = np.random.default_rng(3).integers(0, 256, (32, 32), dtype=np.uint8)
    sample = sample_of(tmp_path / "one", pixels, "1")
    task = task_of(center_crop=0.75, mean=[0.4], std=[0.3])
    ours = task.prepare(sample, None)["image"]
    assert np.array_equal(ours, augment.fit(pixels[4:28, 4:28, None], 12))
    moved = task_of(center_crop=0.75, random_resized_crop=0.5).prepare(sample, np.random.default_rng(1))["image"]
    assert moved.shape == ours.shape and not np.array_equal(moved, ours)
    task.write_settings(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    theirs = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0, 0]
    assert np.abs(theirs - (ours[:, :, 0] / 255 - 0.4) / 0.3)[1:-1, 1:-1].max() < 1.01 / 255 / 0.3


def test_bf16_weights_get_bf16_pixels_and_give_an_fp32_loss() -> None:
    task = task_of()
    loss, _ = task.loss(built(task).bfloat16(), made_up())
    assert loss.dtype == torch.float32 and torch.isfinite(loss)


@pytest.mark.parametrize("drawn", [{"random_resized_crop": 0.5, "crop": 2, "flip": True}, {"randaugment": {}}])
def test_prepare_augments_only_with_a_generator(tmp_path: Path, drawn: dict[str, Any]) -> None:
    dataset = open_dataset(small_data.images(tmp_path / "squares"))
    task = task_of(image_size=10, **drawn)
    plain, again = (task.prepare(dataset.sample(3), None) for _ in range(2))
    assert plain["image"].shape == (10, 10, 1) and plain["image"].dtype == np.uint8
    assert plain["label"].shape == () and plain["label"].dtype == np.int64
    assert np.array_equal(plain["image"], again["image"])
    one, same, other = (task.prepare(dataset.sample(3), np.random.default_rng(seed))["image"] for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other) and one.shape == (10, 10, 1)
    assert task.augments and not task_of(mixup=1.0, cutmix=1.0).augments  # mixup is drawn on the device, not by sample


def test_colours_and_boxes_are_drawn_by_sample_and_applied_on_the_device(tmp_path: Path) -> None:
    noise = np.random.default_rng(5).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    sample = sample_of(tmp_path / "one", noise, "1")
    task = task_of(channels=3, colour={"brightness": 0.5, "saturation": 0.2}, erase=0.5, mean=[0.4, 0.5, 0.6])
    prepared = [task.prepare(sample, np.random.default_rng(seed)) for seed in range(8)]
    assert task.augments and task.prepare(sample, None).keys() == {"image", "label"}
    assert all(np.array_equal(one["image"], noise) for one in prepared)
    batch = {name: torch.from_numpy(np.stack([one[name] for one in prepared])) for name in prepared[0]}
    assert batch["colour"].dtype == torch.float32 and len(batch["colour"].unique(dim=0)) == 8
    assert batch["erase"].dtype == torch.int64 and 0 < (batch["erase"][:, 2] > 0).sum() < 8

    class Seen(nn.Linear):
        """Keeps the pixels that it is given."""

        def forward(self, pixel_values: torch.Tensor) -> Any:
            self.pixels = pixel_values
            return SimpleNamespace(logits=super().forward(pixel_values.mean((2, 3))))

    model = Seen(3, 4)
    task.loss(model, batch)
    recoloured = augment.recolour(batch["image"], batch["colour"]) / 255
    expected = ((recoloured - torch.tensor([0.4, 0.5, 0.6])) / 0.5).permute(0, 3, 1, 2)
    for row, (top, left, height, width) in enumerate(batch["erase"].tolist()):
        expected[row, :, top : top + height, left : left + width] = 0
    torch.testing.assert_close(model.pixels, expected)
    whole = model.pixels
    task.loss(model, {name: tensor[5:] for name, tensor in batch.items()})
    assert torch.equal(model.pixels, whole[5:])  # whichever images share a micro batch

    assert not task_of(colour={"contrast": 0.0}, erase=0.0).augments


def test_channels_are_turned_into_what_the_network_takes(tmp_path: Path) -> None:
    grey = np.arange(144, dtype=np.uint8).reshape(12, 12)
    colour = np.stack([grey, np.full_like(grey, 10), np.full_like(grey, 200)], axis=2)
    of_grey, of_colour = sample_of(tmp_path / "grey", grey, "1"), sample_of(tmp_path / "colour", colour, "1")
    assert np.array_equal(task_of(channels=3).prepare(of_grey, None)["image"], np.repeat(grey[:, :, None], 3, axis=2))
    assert np.array_equal(task_of(channels=3).prepare(of_colour, None)["image"], colour)
    luma = task_of(channels=1).prepare(of_colour, None)["image"].astype(int)
    assert np.abs(luma[:, :, 0] - np.asarray(Image.fromarray(colour).convert("L")).astype(int)).max() <= 1
    clear = sample_of(tmp_path / "clear", np.zeros((12, 12, 4), dtype=np.uint8), "1")
    with pytest.raises(DataError, match=r"flower has 4 channels.*flatten"):
        task_of(channels=3).prepare(clear, None)


@pytest.mark.parametrize("label", ["4", "-1"])
def test_a_label_out_of_range_names_the_sample(tmp_path: Path, label: str) -> None:
    sample = sample_of(tmp_path / "one", np.zeros((12, 12), dtype=np.uint8), label)
    with pytest.raises(DataError, match=rf"sample flower has label {label}; .* 0 to 3"):
        task_of().prepare(sample, None)


def test_group_norm_takes_the_place_of_batch_norm() -> None:
    model, batch = built(task_of(norm="group")), made_up()
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    assert sum(isinstance(layer, nn.GroupNorm) for layer in model.modules()) == 6
    pixels = batch["image"].permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(model(pixel_values=pixels).logits[:1], model(pixel_values=pixels[:1]).logits)
    stages = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
    with pytest.raises(ConfigError, match="no batch norm to replace"):
        task_of(architecture="convnextv2", model=stages, norm="group").build_model()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": {"hiden_sizes": [8], "num_labels": 9}},
            r"num_labels: follows(.|\n)*hiden_sizes.*did you mean hidden_sizes",
        ),
        ({"architecture": "resnett"}, "did you mean resnet"),
        ({"model": {"layer_type": "thick"}}, "layer_type=thick is not one of basic,bottleneck"),
        ({"model": {"embedding_size": "wide"}}, "embedding_size.*expected int"),
    ],
)
def test_options_that_transformers_does_not_know_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        task_of(**changes).build_model()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": None}, "architecture"),
        ({"mean": [0.1, 0.2]}, "mean"),
        ({"channels": 2}, "channels"),
        ({"colour": {"saturation": 0.1}}, "colour.saturation"),
        ({"colour": {"hue": 0.1}}, "hue"),
        ({"erase": 2}, "erase"),
        ({"padding": 2}, "padding"),
        ({"architecture": None, "pretrained": "folder"}, "model"),
    ],
)
def test_a_section_that_cannot_be_is_refused_without_torch(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        task_of(**changes)


def test_flops_are_those_of_the_layers() -> None:
    task = task_of(image_size=32)
    state = torch.get_rng_state()
    flops = task.flops_per_sample()
    assert torch.equal(state, torch.get_rng_state())  # counting draws nothing
    model, products = built(task), []

    def record(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        products.append(2 * output[0].numel() * layer.weight[0].numel())  # type: ignore[index, operator]

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(record)
    model(pixel_values=torch.zeros(2, 1, 32, 32))
    # the backward pass costs twice the forward, but no gradient is needed for the pixels
    assert flops == 3 * sum(products) - products[0]
