"""Sound -> log-mel features: how strong each band of frequencies is, frame by frame, on the scale of the ear.

    samples -> short-time Fourier transform -> power -> triangular mel filters -> log -> each clip normalised

Frame k is centred on sample k * hop, and there is silence before the clip and behind it. So what a clip gives depends,
but for rounding, neither on how far it was padded nor on the clips beside it. Computed in fp32 whatever the precision
of the network. It needs torch alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOOR = 1e-6  # added to the power: 60 dB below a band that is full
EPSILON = 1e-5


def hertz_to_mel(hertz: float) -> float:
    """The formula of HTK (Young et al., The HTK Book, section 5.4; O'Shaughnessy 1987)."""
    return 2595 * math.log10(1 + hertz / 700)


def mel_filters(bands: int, size: int, rate: int) -> Tensor:
    """Triangles of height 1 whose corners are evenly spaced in mel from 0 to rate / 2: [size // 2 + 1, bands].

    size: of the Fourier transform. As librosa's `filters.mel(htk=True, norm=None)`.
    """
    corners = torch.linspace(0, hertz_to_mel(rate / 2), bands + 2, dtype=torch.float64)
    corners = 700 * (10 ** (corners / 2595) - 1)  # in hertz
    lower, middle, upper = corners[:-2], corners[1:-1], corners[2:]  # [bands] each
    bins = torch.arange(size // 2 + 1, dtype=torch.float64)[:, None] * rate / size
    rising, falling = (bins - lower) / (middle - lower), (upper - bins) / (upper - middle)
    return torch.minimum(rising, falling).clamp(min=0).float()


class LogMel:
    """window, hop: in samples.  Holds its tables on each device where it was used; nothing in it is trained."""

    def __init__(self, bands: int, rate: int, window: int, hop: int) -> None:
        self.window, self.hop = window, hop
        self._tables = torch.hann_window(window), mel_filters(bands, window, rate)

    def frames(self, lengths: Tensor) -> Tensor:
        """How many frames clips of so many samples have: int64 [m] -> int64 [m]."""
        return lengths // self.hop + 1

    def __call__(self, samples: Tensor, lengths: Tensor) -> Tensor:
        """float32 [m, longest], silent behind each clip's own length [m] -> float32 [m, frames, bands].

        In each clip every band has mean 0 and variance 1 over the clip's own frames; frames behind it are 0.
        """
        if self._tables[0].device != samples.device:
            self._tables = tuple(table.to(samples.device) for table in self._tables)  # type: ignore[assignment]
        window, filters = self._tables
        spectrum = torch.stft(
            samples, self.window, self.hop, window=window, pad_mode="constant", return_complex=True
        )  # [m, bins, frames]
        power = spectrum.real.square() + spectrum.imag.square()
        features = (power.mT @ filters + FLOOR).log()  # [m, frames, bands]
        own = self.frames(lengths)[:, None, None]  # [m, 1, 1]
        there = torch.arange(features.shape[1], device=samples.device)[:, None] < own  # [m, frames, 1]
        mean = (features * there).sum(dim=1, keepdim=True) / own
        features = (features - mean) * there
        variance = features.square().sum(dim=1, keepdim=True) / own
        return features * (variance + EPSILON).rsqrt()


def masked(features: Tensor, bands: Tensor, frames: Tensor) -> Tensor:
    """The features with boxes set to 0, their mean: SpecAugment (Park et al. 2019) without its warp of time.

    bands int64 [m, masks, 2], frames int64 [m, masks, 2]: (first, how many) of each mask.
    """
    hidden = _covered(bands, features.shape[2])[:, None, :] | _covered(frames, features.shape[1])[:, :, None]
    return features.masked_fill(hidden, 0.0)


def _covered(masks: Tensor, size: int) -> Tensor:
    """bool [m, size]: which places lie in any of a clip's masks [m, masks, 2]."""
    places = torch.arange(size, device=masks.device)
    first, count = masks[..., :1], masks[..., 1:]  # [m, masks, 1]
    return ((places >= first) & (places < first + count)).any(dim=1)


def stacked(features: Tensor, lengths: Tensor, stack: int) -> tuple[Tensor, Tensor]:
    """Every `stack` frames as one: [m, frames, bands], [m] -> [m, ceil(frames / stack), stack * bands], [m].

    A recurrent network then takes fewer, longer steps (Sak et al. 2015, "Fast and accurate recurrent neural network
    acoustic models").
    """
    m, frames, bands = features.shape
    features = torch.nn.functional.pad(features, (0, 0, 0, -frames % stack))
    return features.reshape(m, -1, stack * bands), (lengths + stack - 1) // stack
