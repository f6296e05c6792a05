"""Networks that take noise out, and the process around them, against the published formulas and diffusers' own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models import denoisers
from pipeline.models.denoisers import Process

UNET = {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 4,
}
DIT = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2, "patch_size": 4}
OPTIONS: dict[str, dict[str, Any]] = {"unet": UNET, "dit": DIT}


def network(architecture: Any, classes: int | None = 3, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return denoisers.build(architecture, OPTIONS[architecture] | changes, size=8, channels=1, classes=classes)


def pictures(m: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(m, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Exact(nn.Module):
    """Knows the picture behind all noise, and says what a perfect network would."""

    def __init__(self, picture: Tensor, process: Process) -> None:
        super().__init__()
        self.picture, self.process = picture, process

    def forward(self, noisy: Tensor, time: Tensor, class_labels: Any = None, return_dict: bool = False) -> Any:
        share = self.process.scheduler.alphas_cumprod[time][:, None, None, None]
        noise = (noisy - share.sqrt() * self.picture) / (1 - share).sqrt()
        velocity = share.sqrt() * noise - (1 - share).sqrt() * self.picture
        return (velocity if self.process.velocity else noise,)


@pytest.mark.parametrize("architecture", ["unet", "dit"])
def test_a_class_more_than_there_are_says_none(architecture: str) -> None:
    model = network(architecture)
    for parameter in model.parameters():  # past the zeros that a transformer begins with
        nn.init.normal_(parameter, std=0.1)
    time = torch.tensor([5, 5])
    said = denoisers.predict(model, pictures(1).repeat(2, 1, 1, 1), time, torch.tensor([0, 3]))
    assert said.shape == (2, 1, 8, 8) and not torch.equal(said[0], said[1])
    with pytest.raises(IndexError):
        denoisers.predict(model, pictures(2), time, torch.tensor([0, 4]))


def test_a_transformer_begins_as_the_paper_says_and_draws_nothing_itself() -> None:
    model = network("dit").train()
    time, label = torch.tensor([1, 500, 900, 2]), torch.tensor([0, 1, 2, 3])
    assert not denoisers.predict(model, pictures(), time, label).any()  # adaLN-Zero and a last layer of zeros
    state = torch.get_rng_state()
    denoisers.predict(model, pictures(), time, label)
    assert torch.equal(state, torch.get_rng_state())  # diffusers' own would drop classes, for each block anew


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("unet", {"block_channels": [4]}, r"task\.model\.block_channels: UNet2DModel has none; did you mean block_out"),
        ("unet", {"in_channels": 3, "layer": 1}, r"in_channels: follows(.|\n)*task\.model\.layer"),
        ("unet", {"block_out_channels": [4, 8, 8]}, "cannot be built"),
        ("dit", {"patch_size": 3}, "no multiple of task.model.patch_size, 3"),
        ("dit", {"norm_type": "layer_norm"}, "cannot be built"),
    ],
)
def test_options_that_do_not_fit_are_refused(architecture: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        network(architecture, **changes)


def test_a_size_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ConfigError, match="9 cannot be halved 1 times"):
        denoisers.build("unet", UNET, size=9, channels=1, classes=None)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_errors_are_weighted_as_published(prediction: Any) -> None:
    """Hang et al. 2023: what is left of the error of the picture itself is min(SNR, gamma), for either prediction."""

    class Zero(nn.Module):
        def forward(self, noisy: Tensor, time: Tensor, class_labels: Any, return_dict: bool) -> tuple[Tensor]:
            return (torch.zeros_like(noisy),)

    process = Process("linear", prediction, 1000, 5.0)
    noise, time = torch.randn(4, 1, 8, 8), torch.tensor([3, 200, 500, 900])
    picture = pictures()
    share = process.scheduler.alphas_cumprod[time][:, None, None, None]
    ratio = share / (1 - share)
    assert ratio.max() > 5 > ratio.min()
    noisy = share.sqrt() * picture + (1 - share).sqrt() * noise
    torch.testing.assert_close(process.noisy(picture, noise, time), noisy)
    guess = process.estimate(Zero(), noisy, time, None)
    expected = ((guess - picture).square() * ratio.clamp(max=5)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(process.errors(Zero(), picture, noise, time, None), expected, rtol=1e-3, atol=1e-6)
    plain = Process("linear", prediction, 1000, None).errors(Zero(), picture, noise, time, None)
    assert plain.mean() > 0.1 and not torch.allclose(plain, expected)


def test_noise_grows_as_published() -> None:
    linear, cosine = (Process(name, "epsilon", 1000, None).scheduler.alphas_cumprod for name in ("linear", "cosine"))
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # Ho et al. 2020
    torch.testing.assert_close(linear, (1 - betas).cumprod(0).float(), rtol=1e-3, atol=0)

    def level(t: float) -> float:  # Nichol and Dhariwal 2021, equation 17
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    for step in (0, 250, 800):
        assert float(cosine[step]) == pytest.approx(level((step + 1) / 1000) / level(0), rel=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perfect_network_draws_its_picture(schedule: Any, prediction: Any) -> None:
    process = Process(schedule, prediction, 1000, None)
    picture, noise = pictures(), torch.randn(4, 1, 8, 8)
    model = Exact(picture, process)
    drawn = process.draw(model, noise, None, None, steps=8, guidance=1.0)
    torch.testing.assert_close(drawn, picture, atol=2e-3, rtol=0)
    time = torch.full((4,), 400)
    guess = process.estimate(model, process.noisy(picture, noise, time), time, None)
    torch.testing.assert_close(guess, picture, atol=1e-4, rtol=0)


def test_guidance_goes_beyond_the_class_by_its_factor() -> None:
    """With a network that says its class number, one step of DDIM moves by what the guided answer says."""

    class Label(nn.Module):
        def forward(self, noisy: Tensor, time: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
            seen.append(class_labels.tolist())
            return (class_labels[:, None, None, None].float().expand_as(noisy) * 0.01,)

    seen: list[list[int]] = []
    process = Process("cosine", "v_prediction", 1000, None)
    noise, label = torch.zeros(2, 1, 8, 8), torch.tensor([1, 2])
    plain = process.draw(Label(), noise, label, 3, steps=1, guidance=1.0)
    assert seen.pop() == [1, 2]
    guided = process.draw(Label(), noise, label, 3, steps=1, guidance=2.0)
    assert seen.pop() == [1, 2, 3, 3]
    scale = plain[0, 0, 0, 0] / 0.01  # of an answer of 1
    torch.testing.assert_close(guided[:, 0, 0, 0], scale * torch.tensor([3 + 2 * (1 - 3), 3 + 2 * (2 - 3)]) * 0.01)


@pytest.mark.parametrize("architecture", ["unet", "dit"])
def test_operations_are_counted_without_drawing(architecture: Any) -> None:
    state = torch.get_rng_state()
    one = denoisers.flops_per_picture(architecture, OPTIONS[architecture], size=8, channels=1, classes=3)
    large = denoisers.flops_per_picture(architecture, OPTIONS[architecture], size=16, channels=1, classes=3)
    assert torch.equal(state, torch.get_rng_state()) and 3.0 < large / one < 20.0
