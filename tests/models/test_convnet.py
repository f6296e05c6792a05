"""The plain convnet against the layout of its paper, and against a loop over its convolutions."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from pipeline.models.convnet import ConvNet
from tests.tasks.test_image_classification import task_of

KINDS = [(residual, normalised) for residual in (False, True) for normalised in (False, True)]


def layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize("depth", [8, 20, 56])
@pytest.mark.parametrize(("residual", "normalised"), KINDS)
def test_so_many_layers_have_weights(depth: int, residual: bool, normalised: bool) -> None:
    model = ConvNet(10, depth=depth, width=4, residual=residual, normalised=normalised)
    assert len(layers(model)) == depth
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()) == (depth - 1 if normalised else 0)
    widths = [layer.out_channels for layer in layers(model)[:-1] if isinstance(layer, nn.Conv2d)]
    third = (depth - 2) // 3
    assert widths == [4, *[4] * third, *[8] * third, *[16] * third]


def test_the_published_sizes() -> None:
    """Table 6 of the paper: ResNet-20 and ResNet-56 have 0.27 and 0.85 million parameters."""
    counts = [sum(p.numel() for p in ConvNet(10, depth=depth).parameters()) for depth in (20, 56)]
    assert [round(count / 1e6, 2) for count in counts] == [0.27, 0.85]


@pytest.mark.parametrize(("residual", "normalised"), KINDS)
def test_it_is_a_chain_of_convolutions(residual: bool, normalised: bool) -> None:
    torch.manual_seed(0)
    model = ConvNet(5, channels=1, depth=14, width=3, residual=residual, normalised=normalised).train()
    pixels = torch.randn(4, 1, 13, 13)

    def one(x: torch.Tensor, name: str, norm: str, stride: int) -> torch.Tensor:
        weights = dict(model.named_parameters())
        x = functional.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), stride, 1)
        if normalised:
            x = functional.batch_norm(x, None, None, weights[f"{norm}.weight"], weights[f"{norm}.bias"], training=True)
        return x

    x = one(pixels, "stem", "norm", 1).relu()
    for block in range(6):
        stride, before = 2 if block in (2, 4) else 1, x
        y = one(x, f"blocks.{block}.conv1", f"blocks.{block}.norm1", stride).relu()
        y = one(y, f"blocks.{block}.conv2", f"blocks.{block}.norm2", 1)
        if residual:  # option A: every second pixel, and channels of zeros behind those that there are
            y[:, : before.shape[1]] += before[:, :, ::stride, ::stride]
        x = y.relu()
    assert x.shape == (4, 12, 4, 4)
    torch.testing.assert_close(model(pixel_values=pixels).logits, model.head(x.mean((2, 3))))


def test_the_task_builds_it_and_group_norm_takes_the_place_of_its_batch_norm() -> None:
    plain = {"architecture": None, "model": {}, "convnet": {"depth": 8, "width": 4}}
    model = task_of(**plain).build_model()
    assert isinstance(model, ConvNet) and len(layers(model)) == 8
    group = task_of(**plain, norm="group").build_model()
    assert sum(isinstance(layer, nn.GroupNorm) for layer in group.modules()) == 7
    flops = task_of(**plain, image_size=12).flops_per_sample()
    inputs = 2 * 12 * 12 * 9 * 4  # of the stem, whose backward pass needs no gradient for the pixels
    assert flops == 3 * 2 * 9 * (144 * 4 * 1 + 144 * 4 * 4 * 2 + 36 * (4 * 8 + 8 * 8) + 9 * (8 * 16 + 16 * 16)) + (
        3 * 2 * 16 * 4 - inputs
    )


@pytest.mark.parametrize(
    ("changes", "place", "words"),
    [
        ({"convnet": {"depth": 9}}, ("convnet", "depth"), "9 is not 6n \\+ 2.*set 8 or 14"),
        ({"convnet": {"depth": 21}}, ("convnet", "depth"), "set 20 or 26"),
        ({"convnet": {"width": 0}}, ("convnet", "width"), "greater than or equal to 1"),
        ({"convnet": {}, "architecture": "resnet"}, (), "needs one of .architecture"),
        ({"convnet": {}, "model": {"depths": [1]}}, (), "`convnet` its own"),
        ({"convnet": {}, "mix_probability": 0.5}, (), "neither is set; set one"),
        ({"convnet": {}, "center_crop": 0}, ("center_crop",), "greater than 0"),
        ({"convnet": {}, "randaugment": {"magnitude": 11}}, ("randaugment", "magnitude"), "less than or equal to 10"),
        ({"convnet": {}, "randaugment": {"among": ["sepia"]}}, ("randaugment", "among", 0), "'identity'"),
        ({"convnet": {}, "cutmix": -1}, ("cutmix",), "greater than or equal to 0"),
    ],
)
def test_options_that_cannot_be_are_refused_where_they_stand(changes: dict, place: tuple, words: str) -> None:
    with pytest.raises(ValidationError, match=words) as raised:
        task_of(**{"architecture": None, "model": {}, **changes})
    assert place in [error["loc"] for error in raised.value.errors()]
