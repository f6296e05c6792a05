"""Randomness as a function of the place: (seed, step, micro batch), so that there is no generator state to save.

Every forward and backward of a micro batch runs inside `draws(...)`, which seeds torch, numpy and Python. Because the
micro batch is the same at every world size, so are its dropout masks and mixup partners. Drawing from torch outside
such a scope would depend on how many micro batches this rank happened to run, so it is found out and raised.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from pipeline.errors import MillstreamError


class DrawOutsideScope(MillstreamError):
    """Something drew from torch's generator outside a micro batch, where the draw would depend on the world size."""


def key(*place: int | str) -> int:
    """A 63-bit seed from a place such as (seed, step, micro batch); other places give unrelated ones."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Randomness:
    """The generators of one worker. `draws` opens them at a place; between two scopes nobody may draw."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._closed: torch.Tensor | None = None

    @contextmanager
    def draws(self, *place: int | str) -> Iterator[None]:
        """Seed torch (all devices), numpy and Python at (seed, *place).

        Raises DrawOutsideScope when torch's host generator has moved since the last scope ended. Python's and numpy's
        are not watched: Ray's own threads draw from them.
        """
        if self._closed is not None and not torch.equal(self._closed, torch.get_rng_state()):
            raise DrawOutsideScope(
                f"torch's random generator was used outside a micro batch, before {place}. Draw in the task's loss(), "
                "or from a generator of your own: else the numbers depend on the world size and on restarts."
            )
        number = key(self.seed, *place)
        torch.default_generator.manual_seed(number)  # torch.manual_seed also asks devices that are not there: 0.2 ms
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(number)
        np.random.seed(number % 2**32)
        random.seed(number)
        try:
            yield
        finally:
            self._closed = torch.get_rng_state()
