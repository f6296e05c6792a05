"""A run's reading of remote shards, before any machine is paid for: bytes of each node, cache, first batch, waits.

    uses.py (what each worker reads) -> node.py (requests, cache, loaders) -> all nodes, step by step -> Forecast

Of many nodes some are simulated, spread evenly over all, and of a long epoch the first steps: nodes are alike but for
chance, and every window of an order is read as the one before. So the slowest of all nodes is a little slower than the
slowest of those, and a step a little longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.config import Config
from pipeline.data.index import Index, read_root
from pipeline.data.mixture import Mixture, Source
from pipeline.data.order import block_samples
from pipeline.data.pack.writer import Progress, silent
from pipeline.data.remote.cache_policy import BLOCK_BYTES, Ahead, ahead_bytes, least_bytes
from pipeline.data.remote.link import Link
from pipeline.data.remote.node import Node, Piece, Worker
from pipeline.data.remote.uses import Quality, Remote, Uses, own, quality, uses
from pipeline.errors import ConfigError
from pipeline.sections import Data

NODES = 16  # that are simulated, at most
ROWS = 1 << 20  # of the order that are looked at, at most, unless the steps are given


@dataclass(frozen=True)
class Topology:
    """Who reads. workers: of each node.  prefetch: micro batches read ahead, at least.  cache: bytes of each node.

    step_seconds: of computing in a step, 0: as fast as the data come.  decode_seconds: of a micro batch.  listed:
    the store can be listed, as s3 and others can, and http cannot.
    """

    nodes: int
    workers: int
    micro_batch: int
    link: Link
    cache: int
    prefetch: int = 4
    step_seconds: float = 0.0
    decode_seconds: float = 0.0
    listed: bool = False


class Forecast(NamedTuple):
    """steps: simulated, of `epoch` in an epoch.  nodes: their numbers.  fetched, ahead, requests, held: int64[nodes].

    fetched: bytes for these steps.  ahead: more that were asked for by their end, for later ones.  requests: for all.
    held: the most bytes in a node's cache.  waits: float64[steps], seconds before each step; the first one's is the
    time to the first batch.  least: bytes of a cache below which a run is refused.  quality: of each source.
    """

    steps: int
    epoch: int
    nodes: list[int]
    fetched: np.ndarray
    ahead: np.ndarray
    requests: np.ndarray
    held: np.ndarray
    waits: np.ndarray
    least: int
    quality: list[Quality]


def simulate(
    mixture: Mixture,
    sets: Sequence[Remote],
    topology: Topology,
    steps: int | None = None,
    progress: Progress = silent,
) -> Forecast:
    """The first `steps` steps of a run; None: an epoch of all its data together, or what ROWS allows.

    Raises ConfigError when workers outnumber micro batches, or the cache is too small for a run.
    """
    batch, world = mixture.segments[-1].global_batch, topology.nodes * topology.workers
    micro_batches = batch // topology.micro_batch
    if world > micro_batches:
        raise ConfigError(
            f"{world} workers cannot share {micro_batches} micro batches ({batch} samples, micro batches of "
            f"{topology.micro_batch}): simulate fewer workers, or a larger global batch"
        )
    chosen = np.unique(np.linspace(0, topology.nodes - 1, min(NODES, topology.nodes)).round().astype(int)).tolist()
    epoch = -(-sum(each.samples for each in sets) // batch)
    rows = max(1, batch * len(chosen) // topology.nodes)
    wanted = steps or min(epoch, max(1, ROWS // rows))
    most, least = share(mixture, sets, world, topology)
    if topology.cache < least:
        raise ConfigError(
            f"a cache of {topology.cache / 1e9:.3g} GB is too small: the {topology.workers} workers of a node read "
            f"from {least / 1e9:.3g} GB at a time; give it more, or lower data.shuffle_blocks or data.block_bytes"
        )
    mean = sum(each.bytes for each in sets) / max(1, sum(each.samples for each in sets))
    seen = wanted + min(
        max(epoch, ROWS // rows), 2 * int(most * world / (mean * batch)) + topology.prefetch + 2
    )  # as far as a run looks
    made = []
    for node in chosen:
        progress("order", len(made), len(chosen))
        ranks = range(node * topology.workers, (node + 1) * topology.workers)
        mine = [own(rank, world, micro_batches) for rank in ranks]
        found = [uses(mixture, sets, each, topology.micro_batch, range(seen)) for each in mine]
        made.append(_node(found, sets, [len(each) for each in mine], wanted, most, topology))
    waits = lockstep(made, wanted, topology.step_seconds, progress)
    mixed = [quality(mixture, sets, source, topology.micro_batch, epoch) for source in range(len(sets))]
    return Forecast(
        wanted,
        epoch,
        chosen,
        fetched=np.array([node.fetched for node in made]),
        ahead=np.array([node.beyond for node in made]),
        requests=np.array([node.requests for node in made]),
        held=np.array([node.most_held for node in made]),
        waits=waits,
        least=least,
        quality=mixed,
    )


def of_config(config: Config) -> tuple[Mixture, list[Remote]]:
    """The order of a run whose shards are all remote, and its data sets. Raises DataError when one has no index."""
    data = config.data
    tables = {name: read_root(source.folder) for name, source in data.train.items()}
    size = data.block_bytes or BLOCK_BYTES
    sets = [_remote(table, size) for table in tables.values()]
    asked = [
        Source(name, table.identity, table.samples, each.block, data.train[name].weight)
        for (name, table), each in zip(tables.items(), sets)
    ]
    mixture = Mixture.start(
        asked,
        lanes=data.lanes or config.micro_batches,
        shuffle_blocks=data.shuffle_blocks,
        seed=config.seed,
        global_batch=config.global_batch_size,
    )
    return mixture, sets


def of_folder(place: str, batch: int, micro_batch: int, shuffle_blocks: int | None) -> tuple[Mixture, list[Remote]]:
    """The same for one data set, with a run's defaults for all else."""
    table = read_root(place)
    data = _remote(table, BLOCK_BYTES)
    together = shuffle_blocks or Data.model_fields["shuffle_blocks"].default
    mixture = Mixture.start(
        [Source("shards", table.identity, table.samples, data.block)],
        lanes=max(1, batch // micro_batch),
        shuffle_blocks=together,
        seed=0,
        global_batch=batch,
    )
    return mixture, [data]


def _remote(table: Index, block_bytes: int) -> Remote:
    """Its first index stands for all."""
    first = int(np.flatnonzero(table.shards.records["samples"])[0])
    index = table.storage.map(f"{table.shards.name(first)}.idx")
    block = block_samples(table.samples, table.bytes, block_bytes)
    return Remote(table.shards, block, block_bytes, len(index) / int(table.shards.records["samples"][first]))


def share(mixture: Mixture, sets: Sequence[Remote], world: int, topology: Topology) -> tuple[int, int]:
    """As a run shares a node's cache: bytes that a worker asks for ahead, and bytes that the cache must have."""
    segment, most, least = mixture.segments[-1], 0, 0
    blocks = -(-segment.lanes // world) * segment.window_blocks
    for each in sets:
        window = min(blocks * each.block_bytes, each.bytes)
        least += min(topology.workers * least_bytes(window, each.block_bytes), each.bytes)
        most += ahead_bytes(window, each.block_bytes, topology.cache // (topology.workers * len(sets)))
    return most, least


def lockstep(nodes: Sequence[Node], steps: int, step_seconds: float, progress: Progress = silent) -> np.ndarray:
    """float64[steps], seconds that training waits for the data before each step: all wait for the slowest."""
    waits, end = np.zeros(steps), 0.0
    for step in range(steps):
        for node in nodes:
            node.ask(step, end)
        begin = max(end, *(node.ready(step) for node in nodes))
        waits[step] = begin - end
        end = begin + step_seconds
        progress("steps", step + 1, steps)
    return waits


def _node(
    found: Sequence[Uses], sets: Sequence[Remote], per_step: Sequence[int], steps: int, most: int, of: Topology
) -> Node:
    """What its workers read, as a Node knows it: pieces of all sources under numbers of their own."""
    span = 1 + max(int(each.pieces.max()) for each in found)
    pieces: dict[int, Piece] = {}
    for known in np.unique(np.concatenate([each.sources * span + each.pieces for each in found])).tolist():
        source, piece = divmod(known, span)
        data, shard = sets[source], sets[source].pieces.rows(piece)[0]
        index = int(data.index_bytes * data.counts[shard])
        pieces[known] = Piece(data.size(piece), data.block * data.bytes // data.samples, source * span + shard, index)
    workers = []
    for each, count in zip(found, per_step):
        edges = np.flatnonzero(np.diff(each.turns)) + 1
        turns = [part.tolist() for part in np.split(each.sources * span + each.pieces, edges)]
        far = sum(each.samples for each in sets) // of.micro_batch  # as foresight.py
        begun = int(np.searchsorted(each.turns, count))  # what the first step needs
        known, back = np.unique(each.sources[:begun] * span + each.pieces[:begun], return_inverse=True)
        samples = np.bincount(back, each.samples[:begun]).astype(int).tolist()
        alone = {k: sets[k // span].size_alone(k % span, n) for k, n in zip(known.tolist(), samples)}
        workers.append(Worker(turns, steps * count, count, max(of.prefetch, count), Ahead(most), far, alone))
    return Node(workers, pieces, of.link, of.cache, of.decode_seconds, of.listed)
