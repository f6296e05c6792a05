"""Which token is drawn: shares as the network has them, cut by top-k and top-p, and never one beyond the vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.models.generation import Draw

SHARES = torch.tensor([0.1, 0.4, 0.2, 0.3])
LOGITS = torch.cat([SHARES.log() + 5.0, torch.tensor([90.0])])  # the last one is beyond the vocabulary


def drawn(count: int = 20_000, **changes: Any) -> torch.Tensor:
    """How often each token came, as shares [4]."""
    settings: dict[str, Any] = {"vocabulary": 4, "temperature": 1.0, "top_k": None, "top_p": 1.0} | changes
    tokens = Draw(**settings)(LOGITS.expand(count, -1), torch.Generator().manual_seed(0))
    return torch.bincount(tokens, minlength=4) / count


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.69}, [0, 4 / 7, 0, 3 / 7]),  # the two likeliest have more
        ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 3, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),  # 7 of 9 are more than 0.7
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_their_share(changes: dict[str, Any], expected: list[float]) -> None:
    found = drawn(**changes)
    assert found.tolist() == pytest.approx(expected, abs=0.015)
    assert all((share > 0) is (wanted > 0) for share, wanted in zip(found.tolist(), expected, strict=True))
