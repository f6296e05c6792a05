"""The loader's promise: the rows of the order, whatever the ranks and threads; and no thread left."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.fill import Fill
from pipeline.data.loader import Loader, evaluation_batches
from pipeline.data.mixture import Mixture
from pipeline.data.reader import Dataset, Sample, open_dataset
from pipeline.errors import ConfigError, DataError
from tests.data.small_loader import SAMPLES, content, gathered, kept, loader, noisy, order, plain, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("loader") / "train")


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Iterator[Dataset]:
    with open_dataset(folder) as dataset:
        yield dataset


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")] == []


@settings(max_examples=15, deadline=None)
@given(
    micro_batch=st.integers(1, 9),
    micro_batches=st.integers(1, 9),
    start=st.integers(0, 200),
    threads=st.integers(0, 3),
    prefetch=st.integers(1, 12),
    gather=st.sampled_from([None, gathered]),
)
def test_ranks_together_read_what_the_order_says(
    dataset: Dataset, micro_batch: int, micro_batches: int, start: int, threads: int, prefetch: int, gather
) -> None:
    steps, expected = range(start, start + 3), order(micro_batch, micro_batches)
    for world_size in range(1, min(7, micro_batches) + 1):
        for rank in range(world_size):
            own = range(rank * micro_batches // world_size, (rank + 1) * micro_batches // world_size)
            with loader(
                dataset,
                micro_batch=micro_batch,
                micro_batches=micro_batches,
                rank=rank,
                world_size=world_size,
                threads=threads,
                prefetch=prefetch,
                start_step=start,
                gather=gather,
            ) as batches:
                for step in steps:
                    got = batches.step(step)
                    assert len(got) == -(-micro_batches // world_size)
                    assert [micro.index for micro in got if not micro.filler] == list(own)
                    for micro in got:
                        _, epochs, numbers = expected.rows(step, micro.index, micro_batch)
                        assert micro.epochs.tolist() == epochs.tolist()
                        assert micro.numbers.tolist() == numbers.tolist() == micro.batch["key"].tolist()
                        assert torch.equal(micro.batch["x"], torch.from_numpy(np.stack([numbers, numbers**2], 1)))
                    for filler in (micro for micro in got if micro.filler):
                        assert filler.index == own[-1]


def test_two_epochs_hold_every_sample_twice(dataset: Dataset) -> None:
    with loader(dataset, micro_batch=1, micro_batches=1) as batches:
        read = np.concatenate([batches.step(step)[0].numbers for step in range(2 * SAMPLES)])
    assert np.bincount(read, minlength=SAMPLES).tolist() == [2] * SAMPLES


def test_random_numbers_belong_to_sample_and_epoch(dataset: Dataset) -> None:
    def noise(**changes) -> dict[tuple[int, int], tuple[float, ...]]:
        drawn = {}
        start = changes.get("start_step", 0)
        with loader(dataset, noisy, **({"seed": 5} | changes)) as batches:
            for step in range(start, 20):
                for micro in batches.step(step):
                    for epoch, number, values in zip(micro.epochs, micro.numbers, micro.batch["noise"].tolist()):
                        drawn[int(epoch), int(number)] = tuple(values)
        return drawn

    alone = noise()
    assert {epoch for epoch, _ in alone} == {0, 1, 2}
    assert len(set(alone.values())) == len(alone)  # no two alike
    shared = noise(rank=0, world_size=2, threads=3) | noise(rank=1, world_size=2, prefetch=9)
    assert shared == alone
    later = noise(start_step=13)
    assert later.items() <= alone.items()
    assert not set(noise(seed=6).values()) & set(alone.values())


def test_work_is_done_off_the_main_thread(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()
    plan = Mixture.plan

    def watched(self: Mixture, steps: range, own: range, micro_batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        threads.add(threading.current_thread().name)
        return plan(self, steps, own, micro_batch)

    monkeypatch.setattr(Mixture, "plan", watched)

    def prepare(sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        threads.add(threading.current_thread().name)
        return plain(sample, rng)

    with Loader(Fill([dataset], prepare), order(2, 2), global_batch_size=4, micro_batch_size=2) as batches:
        for step in range(5):
            batches.step(step)
    assert threads == {"loader 0"}


def test_a_batch_stays_until_the_next_step_and_its_memory_is_used_again(dataset: Dataset) -> None:
    places: set[int] = set()
    with loader(dataset, threads=3, prefetch=6) as batches:
        for step in range(60):
            got = batches.step(step)
            before = [content(micro) for micro in got]
            time.sleep(0.002)  # threads fill what comes next meanwhile
            assert [content(micro) for micro in got] == before
            places |= {micro.batch["x"].data_ptr() for micro in got}
    assert len(places) <= 6 + 2 * 4  # prepared ahead, handed out, and being handed out


def test_waiting_is_counted(dataset: Dataset) -> None:
    release = threading.Event()

    def slow(sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        release.wait(30)
        return plain(sample, rng)

    with loader(dataset, slow) as batches:
        assert batches.wait_seconds == 0
        threading.Timer(0.05, release.set).start()
        batches.step(0)
        assert batches.wait_seconds > 0


def test_steps_come_in_order(dataset: Dataset) -> None:
    with loader(dataset, start_step=4) as batches:
        with pytest.raises(ValueError, match="step 4 comes next, not 0"):
            batches.step(0)
        assert len(batches.step(4)) == 4
    with pytest.raises(RuntimeError, match="closed"):
        batches.step(5)


def test_closing_does_not_wait_for_the_rest_of_a_micro_batch(dataset: Dataset) -> None:
    prepared: list[str] = []
    begun = threading.Event()

    def prepare(sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        prepared.append(sample.key)
        begun.set()
        threading.Event().wait(0.02)
        return plain(sample, rng)

    batches = loader(dataset, prepare, micro_batch=90, threads=2)
    begun.wait(30)
    batches.close()
    batches.close()
    assert len(prepared) < 2 * 90


def test_sizes_that_cannot_work(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="5 workers cannot share 4 micro batches"):
        loader(dataset, world_size=5)
    with pytest.raises(ConfigError, match="global_batch_size 10 must be a multiple of micro_batch_size 4"):
        Loader(Fill([dataset], plain), order(5, 2), global_batch_size=10, micro_batch_size=4)


def test_damaged_bytes_name_sample_shard_and_place(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[512 + 130] ^= 1  # inside the array of the shard's first sample
    shard.write_bytes(data)
    step = 0
    with open_dataset(tmp_path) as damaged, loader(damaged, threads=2, prefetch=5) as batches:
        with pytest.raises(
            DataError, match=r"sample 34 \(s0034\).*epoch 0, step \d+, micro batch \d, row \d.*000001\.tar"
        ):
            for step in range(20):
                batches.step(step)
        with pytest.raises(RuntimeError, match="closed"):
            batches.step(step)


def test_a_bug_in_a_task_keeps_its_type_and_names_the_sample(dataset: Dataset) -> None:
    def buggy(sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        return {"x": sample["npy"][[7]]}

    with loader(dataset, buggy) as batches, pytest.raises(IndexError) as raised:
        batches.step(0)
    assert (
        "while preparing sample" in raised.value.__notes__[0] and "step 0, micro batch 0" in raised.value.__notes__[0]
    )


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (lambda x: {"x": x[:1]}, r"gave x as int64\[1\], but as int64\[2\]"),
        (lambda x: {"x": x.astype(np.int32)}, r"gave x as int32\[2\], but as int64\[2\]"),
        (lambda x: {"y": x}, r"gave \['y'\], but \['x'\]"),
    ],
)
def test_rows_of_a_micro_batch_must_be_alike(dataset: Dataset, odd, message: str) -> None:
    def prepare(sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        return odd(sample["npy"]) if sample.number == 2 else {"x": sample["npy"]}

    with pytest.raises(DataError, match=r"sample 2 \(s0002\).*row 2.*" + message):
        list(evaluation_batches(Fill([dataset], prepare), 4))


def test_what_no_tensor_holds_is_refused(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="gave word as <U5"):
        next(evaluation_batches(Fill([dataset], lambda sample, rng: {"word": np.array(sample.key)}), 4))


@pytest.mark.parametrize("micro_batch", [1, 8, 40, 103, 200])
@pytest.mark.parametrize("threads", [1, 2])
def test_evaluation_reads_every_sample_once_on_equal_turns(dataset: Dataset, micro_batch: int, threads: int) -> None:
    for world_size in range(1, 8):
        ranks = [
            kept(evaluation_batches(Fill([dataset], plain), micro_batch, rank, world_size, threads))
            for rank in range(world_size)
        ]
        assert {len(batches) for batches in ranks} == {-(-SAMPLES // (micro_batch * world_size))}
        real = sorted((m for batches in ranks for m in batches if not m.filler), key=lambda micro: micro.index)
        assert np.concatenate([micro.numbers for micro in real]).tolist() == list(range(SAMPLES))
        assert torch.cat([micro.batch["key"] for micro in real]).tolist() == list(range(SAMPLES))
        assert all(len(micro.numbers) == micro_batch for micro in real[:-1])
        for rank, batches in enumerate(ranks):
            assert all(micro.index % world_size == rank for micro in batches if not micro.filler)
            assert all(len(micro.batch["x"]) == len(micro.numbers) for micro in batches)  # fillers hold real samples


def test_an_evaluation_that_is_left_early_leaves_no_thread(dataset: Dataset) -> None:
    batches = evaluation_batches(Fill([dataset], plain), 4, threads=2)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
