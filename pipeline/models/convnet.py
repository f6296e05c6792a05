"""The plain convnet of He et al. 2015 (arXiv 1512.03385, section 4.2), with and without what made it trainable deep.

    image -> 3x3 -> three stages of n blocks of two 3x3 convolutions, each stage half as large and twice as wide
          -> mean over the image -> logits

So there are 6n + 2 layers with weights. `residual` adds each block's input to its output, `normalised` puts a batch
norm behind each convolution: without both it is the plain network whose depth stops it from training. Where a stage
begins, the input is thinned out and padded with channels of zeros (the paper's option A), so both networks have the
same weights. What it gives up: bottlenecks, and strides for pictures larger than some 64 pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class Block(nn.Module):
    """[m, before, H, W] -> [m, channels, H / stride, W / stride]"""

    def __init__(self, before: int, channels: int, stride: int, residual: bool, normalised: bool) -> None:
        super().__init__()
        self.residual, self.stride, self.added = residual, stride, channels - before
        self.conv1, self.norm1 = _convolution(before, channels, stride, normalised)
        self.conv2, self.norm2 = _convolution(channels, channels, 1, normalised)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        if self.residual:
            y = y + functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return functional.relu(y)


class ConvNet(nn.Module):
    """pixel_values [m, channels, H, W] -> `.logits` [m, classes]. `depth`: 6n + 2; `width`: the first stage's channels.

    Weights as He et al. 2015 (arXiv 1502.01852) draw them: normal, variance 2 / (9 channels).
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        depth: int = 20,
        width: int = 16,
        residual: bool = True,
        normalised: bool = True,
    ) -> None:
        super().__init__()
        self.stem, self.norm = _convolution(channels, width, 1, normalised)
        blocks, before = [], width
        for stage in range(3):
            for number in range((depth - 2) // 6):
                stride = 2 if stage and not number else 1
                blocks.append(Block(before, width << stage, stride, residual, normalised))
                before = width << stage
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutputWithNoAttention:
        x = functional.relu(self.norm(self.stem(pixel_values)))  # [m, width, H, W]
        for block in self.blocks:
            x = block(x)
        logits: torch.FloatTensor = self.head(x.mean(dim=(2, 3)))  # [m, classes]
        return ImageClassifierOutputWithNoAttention(logits=logits)


def _convolution(before: int, channels: int, stride: int, normalised: bool) -> tuple[nn.Module, nn.Module]:
    """3x3, and the batch norm behind it; the norm has a bias already."""
    convolution = nn.Conv2d(before, channels, 3, stride, padding=1, bias=not normalised)
    return convolution, nn.BatchNorm2d(channels) if normalised else nn.Identity()
