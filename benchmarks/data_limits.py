"""What no loader can beat on one core: the work itself, in a tight loop over the same samples in a random order.

Labels, batches, digests and errors are left out, so that a loader that comes near has nothing left to save.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from data_content import LENGTH, Content, shuffled
from data_peers import cropped, image


def decoded(decode: Callable[[memoryview], Any], folder: Path, batch: int, workers: int) -> Generator[Any, None, None]:
    """Each sample decoded, in an array of its own."""
    content = Content(folder)
    for numbers in shuffled(len(content), batch):
        yield [decode(content.data(number)) for number in numbers]


def gathered(folder: Path, batch: int, workers: int) -> Generator[Any, None, None]:
    """Rows of tokens out of one flat mapped file by an array of their numbers: [batch, 1024], copied by one call."""
    flat = np.memmap(folder.parent / "tokens.bin", np.uint16, "r").reshape(-1, LENGTH)
    rng = np.random.default_rng(3)
    while True:
        order = rng.permutation(len(flat))
        yield from (flat[order[place : place + batch]] for place in range(0, len(flat) - batch + 1, batch))


CASES: dict[str, dict[str, Callable[[Path, int, int], Generator[Any, None, None]]]] = {
    "decode only": {"images64": partial(decoded, image)},
    "decode + crop": {"images224": partial(decoded, cropped)},
    "np.memmap gather": {"tokens": gathered},
}
