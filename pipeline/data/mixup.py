"""Images of a micro batch mixed with each other, and their labels by the same shares: mixup and cutmix.

    mixup    every pixel: share of the image + (1 - share) of its partner         Zhang et al. 2018 (arXiv 1710.09412)
    cutmix   a box of the partner's pixels, (1 - share) of the area               Yun et al. 2019 (arXiv 1905.04899)

One share, one box and one order of partners are drawn for a micro batch, from torch's host generator, which the loop
seeds by (seed, step, micro batch): the same at every world size, and no device is waited for. What it gives up: a
share for each image, which mixes a little more.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Mix(NamedTuple):
    """How one micro batch is mixed. `box` is None for mixup; `share` is of each image itself, exact for the box."""

    share: float
    partner: Tensor  # int64 [m], on the host
    box: tuple[slice, slice] | None = None  # rows, columns


def draw(count: int, height: int, width: int, *, mixup: float, cutmix: float, probability: float = 1.0) -> Mix | None:
    """Draw for `count` images of [height, width]; None: this micro batch stays as it is.

    `mixup` and `cutmix` are the alphas of Beta(alpha, alpha), from which the share is drawn; 0: not that one. When both
    are set each is taken for half of the micro batches. `probability`: of being mixed at all.
    """
    import torch

    if not (mixup or cutmix) or (probability < 1 and float(torch.rand(())) >= probability):
        return None
    cut = bool(cutmix) and (not mixup or float(torch.rand(())) < 0.5)
    alpha = cutmix if cut else mixup
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    partner = torch.randperm(count)
    if not cut:
        return Mix(share, partner)
    # a box of the image's own aspect around any point; what would lie outside is cut off
    side = math.sqrt(1 - share)
    row, column = (int(torch.randint(length, ())) for length in (height, width))
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    rows = slice(max(row - half_height, 0), min(row + half_height, height))
    columns = slice(max(column - half_width, 0), min(column + half_width, width))
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return Mix(1 - area / (height * width), partner, (rows, columns))


def apply(image: Tensor, mix: Mix) -> Tensor:
    """[m, C, H, W] -> the same, mixed."""
    partner = mix.partner.to(image.device)
    if mix.box is None:
        return image.lerp(image[partner], 1 - mix.share)
    rows, columns = mix.box
    mixed = image.clone()
    mixed[:, :, rows, columns] = image[partner, :, rows, columns]
    return mixed


def cross_entropy(
    logits: Tensor, label: Tensor, smoothing: float = 0.0, mix: Mix | None = None
) -> tuple[Tensor, Tensor]:
    """Sum over the micro batch in fp32, and how many are right: [m, classes], [m] -> [], []. A mixed image is right by
    its shares.
    """
    from torch.nn import functional

    loss = functional.cross_entropy(logits.float(), label, reduction="sum", label_smoothing=smoothing)
    correct = (logits.argmax(dim=-1) == label).sum()
    if mix is None:
        return loss, correct
    loss_2, correct_2 = cross_entropy(logits, label[mix.partner.to(label.device)], smoothing)
    return mix.share * loss + (1 - mix.share) * loss_2, mix.share * correct + (1 - mix.share) * correct_2
