"""Mixup and cutmix against the published code's arithmetic, one pixel and one soft label at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from pipeline.data import mixup

M, HEIGHT, WIDTH, CLASSES = 6, 9, 12, 5


def drawn(seed: int, **alphas: float) -> mixup.Mix | None:
    torch.manual_seed(seed)
    return mixup.draw(M, HEIGHT, WIDTH, **{"mixup": 0.0, "cutmix": 0.0, **alphas})


def images() -> torch.Tensor:
    return torch.rand(M, 2, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))


def soft_loss(logits: torch.Tensor, label: torch.Tensor, mix: mixup.Mix, smoothing: float) -> torch.Tensor:
    """Sum over the images of the cross-entropy with labels mixed as vectors, by hand."""
    total = torch.zeros(())
    for i in range(M):
        soft = torch.full((CLASSES,), smoothing / CLASSES)
        soft[label[i]] += (1 - smoothing) * mix.share
        soft[label[mix.partner[i]]] += (1 - smoothing) * (1 - mix.share)
        total -= (soft * functional.log_softmax(logits[i], dim=0)).sum()
    return total


@pytest.mark.parametrize("alphas", [{"mixup": 0.4}, {"cutmix": 1.0}])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_pixels_and_labels_are_mixed_by_the_same_share(alphas: dict[str, float], smoothing: float) -> None:
    generator = torch.Generator().manual_seed(2)
    logits, label = torch.randn(M, CLASSES, generator=generator), torch.randint(CLASSES, (M,), generator=generator)
    image = images()
    for seed in range(20):
        mix = drawn(seed, **alphas)
        assert mix is not None and sorted(mix.partner.tolist()) == list(range(M))
        expected, own = image.clone(), 0
        for row in range(HEIGHT):
            for column in range(WIDTH):
                if mix.box is None:
                    expected[:, :, row, column] *= mix.share
                    expected[:, :, row, column] += (1 - mix.share) * image[mix.partner, :, row, column]
                elif row in range(*mix.box[0].indices(HEIGHT)) and column in range(*mix.box[1].indices(WIDTH)):
                    expected[:, :, row, column] = image[mix.partner, :, row, column]
                else:
                    own += 1
        if mix.box is not None:
            assert mix.share == pytest.approx(own / (HEIGHT * WIDTH))  # what is left of the image is its share
        torch.testing.assert_close(mixup.apply(image, mix), expected)
        loss, correct = mixup.cross_entropy(logits, label, smoothing, mix)
        torch.testing.assert_close(loss, soft_loss(logits, label, mix, smoothing))
        guesses = logits.argmax(dim=1)
        right = mix.share * (guesses == label).sum() + (1 - mix.share) * (guesses == label[mix.partner]).sum()
        assert float(correct) == pytest.approx(float(right))


def test_a_box_is_that_of_the_published_code() -> None:
    """rand_bbox of the paper's repository: the side is the root of the share, the centre anywhere, cut at the edges."""
    cut_off = 0
    for seed in range(50):
        mix = drawn(seed, cutmix=1.0)
        assert mix is not None and mix.box is not None
        torch.manual_seed(seed)
        share = float(torch.distributions.Beta(1.0, 1.0).sample())
        torch.randperm(M)
        centre = int(torch.randint(HEIGHT, ())), int(torch.randint(WIDTH, ()))
        for part, middle, length in zip(mix.box, centre, (HEIGHT, WIDTH)):
            half = int(length * math.sqrt(1 - share)) // 2
            assert (part.start, part.stop) == (max(0, middle - half), min(length, middle + half))
            cut_off += part.stop - part.start < 2 * half
    assert cut_off


def test_which_and_whether_are_drawn_by_their_probabilities() -> None:
    both = [drawn(seed, mixup=0.4, cutmix=1.0) for seed in range(400)]
    boxes = sum(mix is not None and mix.box is not None for mix in both)
    assert None not in both and abs(boxes - 200) < 4 * math.sqrt(100)  # within 4 standard deviations
    some = [drawn(seed, mixup=0.4, probability=0.25) for seed in range(400)]
    assert abs(sum(mix is not None for mix in some) - 100) < 4 * math.sqrt(75)
    state = torch.get_rng_state()
    assert mixup.draw(M, HEIGHT, WIDTH, mixup=0.0, cutmix=0.0) is None
    assert torch.equal(state, torch.get_rng_state())  # nothing is drawn for what is off


def test_every_share_of_beta_comes() -> None:
    """Beta(1, 1) is even: as many boxes leave less than a half of the image as more, before they are cut off."""
    shares = torch.tensor([mix.share for seed in range(400) if (mix := drawn(seed, mixup=1.0))])
    assert abs(float(shares.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / 400)
    assert float(shares.min()) < 0.05 and float(shares.max()) > 0.95
