"""The training data of a run: its data sets, the order of their samples, and what has been decided on bad ones.

    config.data -> data sets + mixture (which sample stands where, which steps are left out) -> loader of one rank
                        |-> state: what a checkpoint keeps of the data, and `resume` holds against

A run goes on with the same data in the same order, or not at all: every difference is named and refused, unless a
person asked for a new order on purpose. What it gives up: the state says which data (by identity), not where they lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.config import Config
from pipeline.data.decode import load_decoders
from pipeline.data.fill import Fill, Substitutes
from pipeline.data.loader import Loader
from pipeline.data.mixture import Mixture, Source
from pipeline.data.reader import Dataset, Sample, open_dataset
from pipeline.data.remote.cache import Place
from pipeline.data.remote.cache_policy import ahead_bytes, least_bytes
from pipeline.data.skipped import Skipped
from pipeline.errors import ConfigError, DataError

VERSION = 1  # of the state


class Preparing(Protocol):
    """What of a task the data need; tasks.Task says what it means. `gather`, if it has one, is used too."""

    augments: bool

    def prepare(self, sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]: ...


def open_set(config: Config, place: Path | str) -> Dataset:
    """One of the data sets that a configuration names, as its `data` says. Raises DataError as open_index does."""
    data = config.data
    cache = Place(data.cache, data.cache_bytes)
    return open_dataset(place, data.check_digests, load_decoders(data.decoders), data.block_bytes, cache)


class Stream:
    """Opened data sets in the order that the configuration asks for, or, after `resume`, that of a checkpoint."""

    def __init__(self, config: Config) -> None:
        self.config = config
        sources = config.data.train
        self.datasets = [open_set(config, source.folder) for source in sources.values()]
        self.mixture = Mixture.start(
            [
                Source(
                    name,
                    dataset.identity,
                    len(dataset),
                    dataset.block,
                    source.weight,
                )
                for (name, source), dataset in zip(sources.items(), self.datasets)
            ],
            lanes=config.data.lanes or config.micro_batches,
            shuffle_blocks=config.data.shuffle_blocks,
            seed=config.seed,
            global_batch=config.global_batch_size,
        )
        self.substitutes: Substitutes = {}
        self.skipped = Skipped.of(config.data.skip_steps)
        self.reordered = False  # whether this order begins where the run goes on

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the order, the size of a micro batch, which samples stand for bad ones, and which
        steps are left out.
        """
        return {
            "version": VERSION,
            "sources": [*self.config.data.train],
            "order": self.mixture.state,
            "micro_batch": self.config.micro_batch_size,
            "substitutes": sorted([source, number, by] for (source, number), by in self.substitutes.items()),
            "skipped": [list(window) for window in self.skipped.windows],
        }

    def leave_out(self, windows: Iterable[Sequence[int]]) -> None:
        """Also leave these windows of steps, (first, last) each, out."""
        self.skipped = Skipped.of([*self.skipped.windows, *windows])

    def resume(self, step: int, saved: Mapping[str, Any], new_order: bool) -> list[str]:
        """Go on as the checkpoint of `step` was going on; what a person should know of it, a line each.

        Steps that it left out stay so; what is asked for now counts from `step` on.

        Raises DataError, naming every difference, for other data or another order, unless `new_order`.
        """
        if saved.get("version") != VERSION:
            raise DataError("was written by another version, whose order of samples is not known; start anew (--fresh)")
        reordered = self.mixture.differences(saved["order"])
        differences = [*reordered]
        if saved["micro_batch"] != self.config.micro_batch_size:
            differences.append(f"micro batch: {saved['micro_batch']} -> {self.config.micro_batch_size}")
        if differences and not new_order:
            raise DataError(
                f"was trained on other data, or in another order: {'; '.join(differences)}. Put data, seed and batch "
                "sizes back, or start a new run (--fresh), or go on with the new ones on purpose (--new-order)"
            )
        before = saved["sources"]
        # A source may have another name now; it has another place only when the order is a new one.
        now = [*self.config.data.train] if reordered else before
        self.substitutes = {
            (now.index(before[source]), number): by
            for source, number, by in saved["substitutes"]
            if before[source] in now
        }
        self.skipped = self.skipped.since(step)
        self.leave_out(saved.get("skipped", ()))
        self.reordered = bool(differences)
        notes: list[str] = []
        if reordered:
            self.mixture, notes = Mixture.continued(saved["order"], step, self.mixture, self._grown)
        else:
            self.mixture = Mixture.from_state(saved["order"])
        if not differences:
            return []
        return [f"new order from step {step}: {'; '.join(differences)}", *notes]

    def __str__(self) -> str:
        """In a few words, for people: how much there is, and in which shares it is read."""
        sets = zip(self.config.data.train, self.datasets)
        sizes = [f"{name} {len(one):,} samples, {one.index.bytes / 1e6:,.1f} MB" for name, one in sets]
        if len(sizes) == 1:
            return f"{len(self.datasets[0]):,} samples, {self.datasets[0].index.bytes / 1e6:,.1f} MB"
        shares = (f"{draws / of:.4g} of the batches" for _, draws, of in self.mixture.shares)
        return "; ".join(f"{size}, {share}" for size, share in zip(sizes, shares))

    def window_bytes(self, world_size: int) -> int:
        """About what one worker reads from at a time: the windows of its lanes, over all data sets."""
        segment = self.mixture.segments[-1]
        lanes = -(-segment.lanes // world_size)
        blocks = lanes * segment.window_blocks
        return sum(min(blocks * dataset.block_bytes, dataset.index.bytes) for dataset in self.datasets)

    def _grown(self, source: int, samples: int) -> str | None:
        """The identity that the first `samples` samples of a source have by themselves."""
        return self.datasets[source].index.prefix_identity(samples)

    def loader(self, task: Preparing, rank: int, world_size: int, first: int, here: Sequence[int] = ()) -> Loader:
        """A rank's micro batches from step `first` on; what it decides on bad samples it writes into `substitutes`.

        here: the ranks on this node, which share its cache of what comes from URLs; by default `rank` alone. Raises
        ConfigError when the cache cannot hold what they read from at a time.
        """
        data, config = self.config.data, self.config
        self._share_cache(world_size, len(here) or 1)
        blocks = [one.block for one in self.datasets]
        lanes = data.lanes or config.micro_batches
        fill = Fill(
            self.datasets,
            task.prepare,
            getattr(task, "gather", None),
            seed=config.seed if task.augments else None,
            blocks=blocks,
            windows=max(2, -(-data.shuffle_blocks // lanes)) if data.bad_samples == "substitute" else 0,
        )
        return Loader(
            fill,
            self.mixture,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            rank=rank,
            world_size=world_size,
            threads=data.threads,
            processes=data.processes,
            prefetch=data.prefetch,
            start_step=first,
            substitutes=self.substitutes,
            skipped=self.skipped,
            here=here,
        )

    def _share_cache(self, world_size: int, workers: int) -> None:
        """Say how far ahead of need each URL is read, with `workers` of `world_size` on this node."""
        remotes = [(dataset, dataset.remote) for dataset in self.datasets if dataset.remote is not None]
        segment, size = self.mixture.segments[-1], self.config.data.cache_bytes
        blocks, least = -(-segment.lanes // world_size) * segment.window_blocks, 0
        for dataset, fetching in remotes:
            block, all_bytes = dataset.block_bytes, dataset.index.bytes
            window = min(blocks * block, all_bytes)
            least += min(workers * least_bytes(window, block), all_bytes)
            fetching.remote.ahead_bytes = ahead_bytes(window, block, size // (workers * len(remotes)))
        if least > size:
            raise ConfigError(
                f"data.cache_bytes is {size / 1e6:,.1f} MB, and the {workers} workers of this node read from "
                f"{least / 1e6:,.1f} MB at a time (their lanes' windows of {segment.window_blocks} blocks, and what is "
                f"on its way): set data.cache_bytes to at least {least}, or lower data.shuffle_blocks or "
                "data.block_bytes, which gives another order"
            )

    def close(self) -> None:
        """Let go of all files."""
        for dataset in self.datasets:
            dataset.close()
