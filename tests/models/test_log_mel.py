"""Log-mel features against the published formulas, and against a Fourier transform by numpy; masks; stacking."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.models.log_mel import FLOOR, LogMel, hertz_to_mel, masked, mel_filters, stacked

RATE, WINDOW, HOP, BANDS = 8000, 200, 80, 20


def clip(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed)) * 0.1


def padded(*clips: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    samples = torch.zeros(len(clips), longest)
    for row, one in zip(samples, clips):
        row[: len(one)] = one
    return samples, torch.tensor([len(one) for one in clips])


def test_a_thousand_hertz_are_a_thousand_mel() -> None:
    assert hertz_to_mel(1000) == pytest.approx(1000, abs=0.02)
    assert hertz_to_mel(0) == 0 and hertz_to_mel(700) == pytest.approx(2595 * np.log10(2))


@pytest.mark.parametrize("size", [200, 401])
def test_filters_are_triangles_of_height_one_that_add_up(size: int) -> None:
    """Between the first and the last peak two neighbours share each frequency: rising + falling = 1 in hertz."""
    filters = mel_filters(6, size, RATE)
    assert filters.shape == (size // 2 + 1, 6)
    hertz = np.arange(size // 2 + 1) * RATE / size
    peaks = 700 * (10 ** (np.linspace(0, hertz_to_mel(RATE / 2), 8)[1:-1] / 2595) - 1)
    for band in range(6):
        slopes = np.interp(hertz, [*np.r_[0, peaks][band : band + 2], np.r_[peaks, RATE / 2][band + 1]], [0, 1, 0])
        np.testing.assert_allclose(filters[:, band], slopes, atol=1e-6)
    inside = (hertz >= peaks[0]) & (hertz <= peaks[-1])
    np.testing.assert_allclose(filters.sum(dim=1)[inside], 1, atol=1e-6)


def test_features_are_those_of_a_fourier_transform_by_hand() -> None:
    sound = clip(1000).double().numpy()
    samples, lengths = padded(clip(1000), longest=1500)
    features = LogMel(BANDS, RATE, WINDOW, HOP)(samples, lengths)[0]
    quiet = np.pad(sound, WINDOW)  # frame k is centred on sample k * HOP
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    begins = [WINDOW // 2 + k * HOP for k in range(1000 // HOP + 1)]
    power = np.array([np.abs(np.fft.rfft(quiet[b : b + WINDOW] * hann)) ** 2 for b in begins])
    expected = np.log(power @ mel_filters(BANDS, WINDOW, RATE).double().numpy() + FLOOR)
    expected = (expected - expected.mean(axis=0)) / expected.std(axis=0)
    np.testing.assert_allclose(features[: len(begins)], expected, atol=1e-3)
    assert not features[len(begins) :].any()


def test_neither_padding_nor_the_neighbours_matter() -> None:
    log_mel = LogMel(BANDS, RATE, WINDOW, HOP)
    one, other = clip(700), clip(2000, seed=1)
    alone = log_mel(*padded(one, longest=700))[0]
    together = log_mel(*padded(other, one, longest=2400))[1]
    assert len(alone) == 700 // HOP + 1
    torch.testing.assert_close(together[: len(alone)], alone, atol=1e-5, rtol=0)


def test_silence_and_a_single_sample_are_finite() -> None:
    features = LogMel(BANDS, RATE, WINDOW, HOP)(*padded(torch.zeros(800), torch.ones(1), longest=800))
    assert features.isfinite().all() and features[0].abs().max() < 1e-2


def test_masks_hide_just_their_boxes() -> None:
    features = torch.ones(2, 10, 6)
    bands = torch.tensor([[[1, 2], [5, 1]], [[0, 0], [3, 0]]])
    frames = torch.tensor([[[0, 3]], [[9, 1]]])
    seen = masked(features, bands, frames)
    assert not seen[0, :3].any() and not seen[0, :, 1:3].any() and not seen[0, :, 5].any()
    assert seen[0].sum() == 7 * 3 and seen[1].sum() == 9 * 6


def test_stacking_joins_frames_in_their_order() -> None:
    features = torch.arange(2 * 5 * 2).reshape(2, 5, 2).float()
    joined, lengths = stacked(features, torch.tensor([5, 3]), 3)
    assert joined.shape == (2, 2, 6) and lengths.tolist() == [2, 1]
    assert torch.equal(joined[0, 0], features[0, :3].flatten()) and joined[0, 1].tolist() == [6, 7, 8, 9, 0, 0]
