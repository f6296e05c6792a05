"""What a simulated node reads is what the order says, and its link and cache do what can be reckoned by hand."""

from __future__ import annotations

import json
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import load_resolved
from pipeline.data import index, root
from pipeline.data.loader import Loader
from pipeline.data.mixture import Mixture, Source
from pipeline.data.reader import Sample
from pipeline.data.remote import uses
from pipeline.data.remote.cache_policy import Ahead
from pipeline.data.remote.foresight import Foreseen
from pipeline.data.remote.link import Link, Transfers
from pipeline.data.remote.node import Node, Piece, Worker
from pipeline.data.remote.simulate import Topology, lockstep, of_config, of_folder, simulate
from pipeline.data.remote.uses import PAGE, Remote
from pipeline.data.stream import Stream
from pipeline.errors import ConfigError
from tests.data.file_server import FileServer
from tests.small_tars import samples, write_tar
from tests.test_cli import Run, millstream  # noqa: F401

BATCH, MICRO = 24, 4
FAST = Link(0.0, 1e15)
RUN = """
name: run
steps: 10
global_batch_size: 24
micro_batch_size: 6
data: {{train: {{a: "{place}"}}, block_bytes: 8192, shuffle_blocks: 8, cache: "{cache}"}}
task: {{name: image_classification, architecture: resnet, image_size: 8, channels: 1, classes: 10}}
optim: {{name: adamw, lr: 1e-3}}
cluster: {{workers: 2}}
"""


def table(counts: list[int], of_sample: int) -> root.Shards:
    records = np.array([(n, n * of_sample, b"", 0) for n in counts], root.RECORD)
    return root.Shards(records, memoryview(b""))


SETS = [Remote(table([30, 0, 71, 9], 20_000), 7, 140_000), Remote(table([50], 9_000), 5, 45_000)]
MIXED = Mixture.start(
    [Source(name, name, each.samples, each.block, weight) for name, each, weight in zip("ab", SETS, (2, 1))],
    lanes=BATCH // MICRO,
    shuffle_blocks=12,
    seed=3,
    global_batch=BATCH,
)


def alone(samples: int = 400, block: int = 5, lanes: int = 4, batch: int = 16) -> tuple[Mixture, list[Remote]]:
    data = Remote(table([samples // 4] * 4, 50_000), block, block * 50_000)
    source = Source("a", "a", samples, block)
    return Mixture.start([source], lanes=lanes, shuffle_blocks=8, seed=0, global_batch=batch), [data]


@pytest.mark.parametrize("rows", [1, 50, 1 << 18])  # of the order at a time
@pytest.mark.parametrize("rank, world", [(0, 1), (1, 3), (3, 4)])
def test_uses_are_those_of_the_order(rank: int, world: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uses, "ROWS", rows)
    mine, steps = uses.own(rank, world, BATCH // MICRO), range(2, 13)
    found = uses.uses(MIXED, SETS, mine, MICRO, steps)
    expected = []
    for turn, (step, j) in enumerate((step, j) for step in steps for j in mine):
        sources, _, numbers = MIXED.rows(step, j, MICRO)
        pieces = [int(SETS[s].pieces.of(np.array([n]))[0]) for s, n in zip(sources.tolist(), numbers.tolist())]
        expected += [(turn, *pair, samples) for pair, samples in Counter(zip(sources.tolist(), pieces)).items()]
    assert list(zip(*(column.tolist() for column in found))) == expected


def test_workers_share_all_micro_batches() -> None:
    for world in range(1, 7):
        assert [j for rank in range(world) for j in uses.own(rank, world, 6)] == list(range(6))


def test_pieces_cover_their_shards() -> None:
    data = SETS[0]
    pieces = np.unique(data.pieces.of(np.arange(data.samples)))
    assert data.bytes <= sum(data.size(piece) for piece in pieces.tolist()) <= data.bytes + 2 * 4096 * len(pieces)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 40)), min_size=1, max_size=8))
def test_transfers_share_the_bandwidth_evenly(asked: list[tuple[int, int]]) -> None:
    """Against a link that gives every transfer its share in small steps."""
    ends: dict[int, float] = {}
    now = 0.0
    link = Transfers(10.0)

    def _note(number: int) -> None:
        ends[number] = now

    for number, (begin, size) in sorted(enumerate(asked), key=lambda each: each[1][0]):
        while link.next_end <= begin:
            now, done = link.end()
            done()
        link.begin(begin, size, partial(_note, number))
    while link.next_end < float("inf"):
        now, done = link.end()
        done()
    left, now, small = {number: float(size) for number, (_, size) in enumerate(asked)}, 0.0, 1e-2
    while left:
        under_way = [number for number in left if asked[number][0] <= now + 1e-9]
        now += small
        for number in under_way:
            left[number] -= small * 10.0 / len(under_way)
            if left[number] <= 1e-9:
                assert ends[number] == pytest.approx(now, abs=len(asked) * 2 * small)
                del left[number]


def worker(turns: list[list[int]], depth: int = 1, most: int = 1 << 60) -> Worker:
    return Worker(turns, len(turns), 1, depth, Ahead(most))


def pieces(count: int, size: int, shards: int = 1, index: int = 0) -> dict[int, Piece]:
    return {number: Piece(size, size, number % shards, index) for number in range(count)}


@pytest.mark.parametrize("alone", [0, 100])
def test_a_first_batch_costs_its_round_trips_and_its_bytes(alone: int) -> None:
    """Index and a look at the tar, then the piece, or its samples by themselves: twice the latency; what the second
    batch needs comes after that.
    """
    one = worker([[0], [1]])
    one.first = {0: alone}
    node = Node([one], pieces(2, 1000, index=500), Link(0.5, 1000.0), 10_000)
    if alone:
        waits = lockstep([node], 2, 10.0)
        assert waits == pytest.approx([0.5 * 2 + 0.5 + 0.1, 0.0])
        assert (node.fetched, node.requests, node.held) == (2600, 5, 2000)
        return
    waits = lockstep([node], 2, 0.0)
    assert waits == pytest.approx([0.5 * 2 + 0.5 + 1.0, 0.5 + 1.0])
    assert (node.fetched, node.requests, node.held) == (2500, 4, 2000)


@pytest.mark.parametrize("step_seconds, rest", [(2.0, 0.0), (0.25, 10 - 1 - 9 * 0.25)])
def test_computing_hides_what_comes_meanwhile(step_seconds: float, rest: float) -> None:
    """Ten pieces of a second each, one a step, the first one alone."""
    turns = [[number] for number in range(10)]
    node = Node([worker(turns, most=1)], pieces(10, 1000), Link(0.0, 1000.0), 10_000)
    waits = lockstep([node], 10, step_seconds)
    assert waits[0] == pytest.approx(1.0) and waits[1:].sum() == pytest.approx(rest)


def test_all_wait_for_the_slowest_node() -> None:
    nodes = [Node([worker([[0], [1]], most=1)], pieces(2, size), Link(0.0, 1000.0), 10_000) for size in (1000, 3000)]
    assert lockstep(nodes, 2, 1.0) == pytest.approx(
        [3.0, 2.0]
    )  # the second piece of the slow one: a second of its three is hidden


def test_workers_of_a_node_fetch_a_common_piece_once() -> None:
    both = [worker([[0, 1], [2]]), worker([[1, 3], [2]])]
    node = Node(both, pieces(4, 1000, shards=2, index=10), FAST, 10_000)
    lockstep([node], 2, 0.0)
    assert node.fetched == 4 * 1000 + 2 * 10  # and an index of each shard


@pytest.mark.parametrize("capacity, fetched", [(4000, 4), (3000, 5)])
def test_what_does_not_fit_is_fetched_again(capacity: int, fetched: int) -> None:
    """Four pieces, the first one needed again at the end; without room for all, what is needed last goes."""
    node = Node([worker([[0], [1], [2], [3], [3], [0]], most=1)], pieces(4, 1000), FAST, capacity)
    lockstep([node], 6, 1.0)
    assert node.fetched == fetched * 1000 and node.most_held <= capacity + 1000


@pytest.mark.parametrize("nodes, workers", [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_an_epoch_is_fetched_once_by_lanes(nodes: int, workers: int) -> None:
    mixture, sets = alone()
    topology = Topology(nodes, workers, 4, FAST, 10**9)
    found = simulate(mixture, sets, topology)
    assert found.steps == found.epoch == 25 and found.nodes == list(range(nodes))
    whole = sum(sets[0].size(piece) for piece in np.unique(sets[0].pieces.of(np.arange(400))).tolist())
    cut = 4 * 2 * sets[0].size(0) if nodes > 1 else 0  # blocks that two lanes share, at the edges of lanes and windows
    alone_first = nodes * workers * 4 * (50_000 + PAGE)  # first micro batches, where they come by themselves
    assert whole <= found.fetched.sum() <= whole + cut + alone_first
    assert (found.held <= found.fetched + found.ahead).all() and found.requests.min() > 0  # held: what has arrived


def test_many_nodes_are_sampled() -> None:
    mixture, sets = alone(samples=64_000, block=16, lanes=1000, batch=1000)
    found = simulate(mixture, sets, Topology(1000, 1, 1, Link(0.02, 1e9), 10**9, step_seconds=0.1), steps=10)
    assert len(found.nodes) == 16 and found.nodes[0] == 0 and found.nodes[-1] == 999
    assert found.waits[0] > 2 * 0.02  # what it takes at the least: index, piece


def test_quality_tells_a_good_shuffle_from_none() -> None:
    _, sets = alone(samples=4000)
    good = Mixture.start([Source("a", "a", 4000, 1)], lanes=16, shuffle_blocks=4000, seed=0, global_batch=64)
    bad = Mixture.start([Source("a", "a", 4000, 1000)], lanes=1, shuffle_blocks=1, seed=0, global_batch=64)
    spreads = [uses.quality(mixture, sets, 0, 4, 60).spread for mixture in (good, bad)]
    assert 0.8 < spreads[0] < 1.2 and spreads[1] > 3


@pytest.mark.parametrize(
    "topology, message",
    [
        (Topology(5, 1, 4, FAST, 10**9), "5 workers cannot share 4 micro batches"),
        (Topology(1, 4, 4, FAST, 10**6), r"a cache of 0.001 GB is too small: the 4 workers .* from 0.02 GB"),
    ],
)
def test_what_a_run_refuses_is_refused(topology: Topology, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(*alone(), topology)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for number in range(3):
        write_tar(tmp_path / "data" / f"{number}.tar", samples(60, start=60 * number))
    index.build(tmp_path / "data")
    return tmp_path / "data"


def test_the_command_on_a_folder(millstream: Run, folder: Path) -> None:  # noqa: F811
    asked = ["data", "simulate", str(folder), "--nodes", "2", "--micro-batch", "6", "--global-batch", "24"]
    done = millstream(*asked, "--step-seconds", "0.5", "--latency", "100")
    assert done.code == 0, done.err
    assert "nodes: 2, workers on each: 1; 8 steps of 24 samples (an epoch)" in done.out
    assert "first batch" in done.out and "3 of 3 shards" in done.out
    found = json.loads(millstream(*asked, "--json", "--steps", "3").out)
    mixture, sets = of_folder(str(folder), 24, 6, None)
    expected = simulate(mixture, sets, Topology(2, 1, 6, Link(0.025, 1e9), 32 << 30), 3)
    assert found["fetched"] == expected.fetched.tolist() and found["waits"] == pytest.approx(expected.waits)
    assert millstream(*asked, "--cache", "0.00001").code == 78


class Texts:
    """A task that reads, and makes a number of it."""

    augments = False

    def prepare(self, sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        return {"bytes": np.array([len(sample.raw("txt"))])}


def test_bytes_are_those_that_a_run_fetches(folder: Path, tmp_path: Path) -> None:
    """Two nodes, one after the other. What is ahead depends on time until all that shall be asked for has been, so
    that is waited for after each step; then what a node fetches is known to a page.
    """
    config = tmp_path / "run.yaml"
    for node in range(2):
        with FileServer(folder) as server:
            config.write_text(RUN.format(place=server.url, cache=tmp_path / f"cache{node}"))
            stream = Stream(load_resolved(config))
            with stream.loader(Texts(), node, 2, 0) as loader:
                for step in range(8):
                    loader.step(step)
                    while not has_all(stream, loader):
                        time.sleep(0.01)
            stream.close()
            fetched = sum(each.end - each.begin for each in server.asked if each.name.endswith((".tar", ".tar.idx")))
            fetched -= sum(each.end - each.begin for each in server.asked if each.method == "HEAD")
        config.write_text(RUN.format(place=folder, cache=tmp_path / "none"))
        forecast = simulate(*of_config(load_resolved(config)), Topology(2, 1, 6, FAST, 10**9), 8)
        predicted = int(forecast.fetched[node] + forecast.ahead[node])
        assert predicted == pytest.approx(fetched, rel=0.1)


def has_all(stream: Stream, loader: Loader) -> bool:
    """Whether all pieces are here that shall be asked for now."""
    assert isinstance(loader._ahead, Foreseen)
    foresight, fetching = loader._ahead._foresight, stream.datasets[0].remote
    assert fetching is not None
    with foresight._wake:
        if not foresight._ended and foresight._may_look():
            return False
    for piece in list(foresight._epochs):
        tar = fetching._tar(fetching.pieces.rows(piece)[0])
        if tar is None or fetching.pieces.block_in(piece) not in tar.blocks:
            return False
    return True


def test_the_command_on_a_configuration(millstream: Run, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    config = tmp_path / "run.yaml"
    config.write_text(RUN.format(place=folder, cache=tmp_path / "none"))
    done = millstream("data", "simulate", str(config), "seed=4", "--workers", "2", "--nodes", "2", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["nodes"] == [0, 1] and found["steps"] == found["epoch"] == 8
    assert millstream("data", "simulate", str(config), "--workers", "5").code == 78
