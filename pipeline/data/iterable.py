"""A data set as torch's IterableDataset: the batches of a rank in Millstream's order, for loops that are not ours.

    loader = pipeline.open_dataset("data/photos/train").loader(256, prepare=prepare)
    for batch in loader: ...                                # {name: tensor [rows, ...]}, without an end
    state = loader.state_dict()                             # one number, and what it counts in
    loader.load_state_dict(state)                           # goes on with the very next batch

The order is that of a run (order.py): a function of data, seed, `batch_size` and `lanes`, so ranks need not talk to
each other, and another world size shares out the same global batches. Batches are made ahead by threads here. Inside a
DataLoader with workers each worker makes its share of the steps, and the DataLoader puts them back in order.

What it gives up: with workers, or in a loop that fetches ahead (Lightning does when the loader has no `steps`), `step`
does not count what was trained on; the loop's own count is the state then (`loader.step = ...`). Bad samples end the
iteration; mixtures are for runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.data import ahead
from pipeline.data.fill import Fill, Gather, Prepare
from pipeline.data.loader import Planned
from pipeline.data.mixture import Mixture, Source
from pipeline.data.reader import Dataset, Sample
from pipeline.data.sound import Audio
from pipeline.errors import ConfigError, DataError
from pipeline.sections import Data

VERSION = 1  # of the state
SHUFFLE_BLOCKS = Data.model_fields["shuffle_blocks"].default  # a run's


class Batches(IterableDataset[dict[str, torch.Tensor]]):
    """One rank's batches of a data set; `Dataset.loader` makes one and says what the arguments mean.

    step: of the next batch, from 0; may be set. Iterating goes on from there, to step `steps` if that is not None.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        prepare: Prepare | None = None,
        gather: Gather | None = None,
        augment: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        steps: int | None = None,
        lanes: int = 1,
        shuffle_blocks: int = SHUFFLE_BLOCKS,
        threads: int = 1,
        prefetch: int = 4,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ConfigError(f"{world_size} ranks cannot share a batch of {batch_size} samples: it must be a multiple")
        if not 0 <= rank < world_size:
            raise ConfigError(f"there is no rank {rank} among {world_size}: ranks are 0 to {world_size - 1}")
        source = Source("train", dataset.identity, len(dataset), dataset.block)
        self.mixture = Mixture.start(
            [source], lanes=lanes, shuffle_blocks=shuffle_blocks, seed=seed, global_batch=batch_size
        )
        self.fill = Fill([dataset], prepare or everything, gather, seed=seed if augment else None)
        self.rank, self.rows, self.steps = rank, batch_size // world_size, steps
        self.threads, self.prefetch = threads, prefetch
        self.step = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Raises DataError naming the sample that is bad."""
        worker = get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker is not None and any(dataset.remote for dataset in self.fill.datasets):
            # A process that was forked has none of the threads that fetch.
            self.fill = replace(self.fill, datasets=[dataset.reopen() for dataset in self.fill.datasets])
        first = self.step
        planned = Planned(
            self.mixture, self.fill, range(self.rank, self.rank + 1), self.rows, first, looks_up=parts == 1
        )
        plans = (partial(planned.rows, step, self.rank) for step in self._steps(first + part, parts))
        prepared = ahead.start(self.fill, plans, threads=self.threads, processes=0, depth=self.prefetch)
        try:
            for step in self._steps(first + part, parts):
                prepared.give_back()
                batch = {name: tensor.clone() for name, tensor in prepared.take().batch.items()}
                self.step = step + 1
                yield batch
        finally:
            prepared.close()

    def __len__(self) -> int:
        """Steps from the first to the last, wherever it is now. TypeError when there is no last one."""
        if self.steps is None:
            raise TypeError("a loader without `steps` has no end")
        return self.steps

    def _steps(self, first: int, stride: int) -> Iterable[int]:
        return count(first, stride) if self.steps is None else range(first, self.steps, stride)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` goes on from: plain JSON, the same on all ranks."""
        return {"version": VERSION, "step": self.step, "order": self.mixture.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the batch after the last that was had. Raises DataError for other data, or another order."""
        if state.get("version") != VERSION:
            raise DataError("the state of the data was written by another version of Millstream; begin anew")
        differences = self.mixture.differences(state["order"])
        if differences:
            raise DataError(
                f"the state is of other data, or of another order: {'; '.join(differences)}; put data, seed and "
                "batch_size back, or begin anew"
            )
        self.step = state["step"]


def everything(sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    """All fields of a sample as arrays, by their names; what is none (text, json) asks for a `prepare` of one's own."""
    arrays: dict[str, np.ndarray] = {}
    for field in sample.fields:
        value = sample[field]
        if isinstance(value, Audio):
            value = value.samples
        if not isinstance(value, np.ndarray | int):
            what = f"field {field} is {type(value).__name__}, no array"
            raise DataError(f"{what}; give loader(prepare=...) a function that makes arrays of a sample")
        arrays[field] = np.asarray(value)
    return arrays
