"""Bad samples: ended by, or replaced the same way by whoever meets them; and the two ways to fill a micro batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import index
from pipeline.data.fill import Fill, MicroBatch, Rows, Substitutes, candidates
from pipeline.data.loader import Loader
from pipeline.data.reader import Sample, SampleError, open_dataset
from pipeline.data.samples import Lookup, Samples
from pipeline.errors import DataError
from tests.data.small_loader import BLOCK, SAMPLES, content, gathered, loader, npy, order, plain, write

NOT_DECODED = 9  # holds bytes that are no array, indexed as they are
DAMAGED = (40, 41)  # changed after they were indexed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write(tmp_path / "train")
    flip(folder, [NOT_DECODED], 10)  # in the npy header: a magic that is none
    index.build(folder)
    flip(folder, DAMAGED, 140)
    return folder


def flip(folder: Path, numbers: Sequence[int], place: int) -> None:
    """Change a byte of the arrays of these samples, where they lie in their tars."""
    with open_dataset(folder, check_digests=False) as dataset:
        at = [(dataset.index.locate(number), dataset.sample(number).raw("npy").nbytes) for number in numbers]
        places = [(shard, int(dataset.index.segment(shard).table["offset"][row])) for (shard, row), _ in at]
        paths = [Path(dataset.index.tar_path(shard)) for shard, _ in places]
    for path, (_, offset) in zip(paths, places):
        content = bytearray(path.read_bytes())
        content[offset + place - 8 if place > 10 else offset + 3] ^= 0xFF
        path.write_bytes(content)


def rows(numbers: Sequence[int]) -> Rows:
    zeros = np.zeros(len(numbers), np.int64)
    return Rows(0, zeros, zeros, np.array(numbers, np.int64), "step 3, micro batch 0")


def fill(folder: Path, windows: int = 2, gather=None, prepare=plain) -> Fill:
    return Fill([open_dataset(folder)], prepare, gather, blocks=[BLOCK], windows=windows)


def test_a_bad_sample_ends_the_run_by_default(folder: Path) -> None:
    for number, why in ((40, "are not those that were indexed"), (NOT_DECODED, "not an npy file")):
        with pytest.raises(DataError, match=rf"sample {number} .*step 3, micro batch 0, row 1.*{why}"):
            fill(folder, windows=0)(rows([1, number]), {})


@pytest.mark.parametrize("gather", [None, gathered])
def test_the_next_good_sample_stands_for_a_bad_one(folder: Path, gather) -> None:
    """40 and 41 are in the block 35..41, so 35 stands for both: behind them there is nothing but each other."""
    micro = fill(folder, gather=gather)(rows([1, *DAMAGED, NOT_DECODED]), {})
    assert micro.numbers.tolist() == micro.batch["key"].tolist() == [1, 35, 35, 10]
    assert [(s.source, s.number, s.substitute) for s in micro.found] == [(0, 40, 35), (0, 41, 35), (0, 9, 10)]
    assert all(word in micro.found[0].reason for word in ("s0040.npy", "not those that were indexed", ".tar"))


@pytest.mark.parametrize("gather", [None, gathered])
def test_a_decision_is_replayed_and_not_taken_again(folder: Path, gather) -> None:
    """Sample 90 is good, and 7 stands for it all the same, because that was decided once."""
    micro = fill(folder, gather=gather)(rows([90, 40, 3]), {(0, 40): 12, (0, 90): 7})
    assert micro.numbers.tolist() == micro.batch["key"].tolist() == [7, 12, 3] and micro.found == ()


def test_no_good_sample_near_it_ends_the_run(folder: Path) -> None:
    flip(folder, range(35, 40), 140)  # with 40 and 41 the whole block
    assert fill(folder, windows=2)(rows([40]), {}).numbers.tolist() == [42]
    with pytest.raises(DataError, match="no good sample near it"):
        fill(folder, windows=1)(rows([40]), {})


def test_a_missing_shard_is_bad_and_a_wrong_label_is_not(folder: Path) -> None:
    """What the task refuses is a matter of the configuration, and is never replaced."""

    def refuse(sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        raise DataError("label 7 of 4 classes")

    with pytest.raises(DataError, match=r"row 0: label 7 of 4 classes"):
        fill(folder, prepare=refuse)(rows([1]), {})
    gone = fill(folder)
    (folder / "train-000002.tar").unlink()
    with pytest.raises(DataError, match=r"no good sample near it.*train-000002.tar: the shard is gone"):
        gone(rows([90]), {})  # its block and the next lie in the shard that is gone


@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 9), st.data())
def test_candidates_are_the_block_and_then_the_next_ones(samples: int, block: int, blocks: int, data) -> None:
    number = data.draw(st.integers(0, samples - 1))
    found = list(candidates(number, block, blocks, samples))
    assert len(set(found)) == len(found) and number not in found and all(0 <= one < samples for one in found)
    own = [one for one in range(samples) if one // block == number // block and one != number]
    assert sorted(found[: len(own)]) == own
    assert len(found) >= min(samples, block * (blocks - 1)) - 1


def test_ranks_and_restarts_read_the_same(folder: Path) -> None:
    """With the policy to substitute: any number of workers, threads, and a start in the middle that is told what was
    decided before. Without it being told, the decision is the same, since it follows from the bytes."""
    dataset = open_dataset(folder)
    steps = 2 * SAMPLES // 12

    def run(world_size: int, first: int, last: int, known: Substitutes, **options) -> dict[tuple[int, int], object]:
        read = {}
        for rank in range(world_size):
            with loader(
                dataset, rank=rank, world_size=world_size, start_step=first, substitutes=known, windows=2, **options
            ) as batches:
                for step in range(first, last):
                    read |= {(step, m.index): content(m) for m in batches.step(step) if not m.filler}
        return read

    known: Substitutes = {}
    whole = run(1, 0, steps, known)
    assert known == {(0, 9): 10, (0, 40): 35, (0, 41): 35}
    assert not {9, 40, 41} & {number for _, _, numbers, _ in whole.values() for number in numbers}  # type: ignore
    for world_size in (2, 3, 4):
        assert run(world_size, 0, steps, {}, threads=2, gather=gathered) == whole
    first: Substitutes = {}
    begun = run(2, 0, 5, first)
    assert begun | run(3, 5, steps, first) == whole == begun | run(3, 5, steps, {})


def test_gather_is_left_when_it_says_so_or_when_anything_is_drawn(folder: Path) -> None:
    asked: list[int] = []

    def gather(samples: Samples) -> dict[str, np.ndarray] | None:
        asked.append(len(samples))
        return None if len(asked) == 1 else {"key": np.zeros(len(samples), np.int64)}

    once = fill(folder, gather=gather)
    assert once(rows([3, 5]), {}).batch["key"].tolist() == [3, 5]
    assert once(rows([3, 5]), {}).batch["key"].tolist() == [0, 0]
    Fill(once.datasets, lambda sample, rng: {"x": np.array(sample.number)}, gather, seed=1)(rows([3]), {})
    assert asked == [2, 2]


def test_samples_are_those_read_one_by_one(tmp_path: Path) -> None:
    """Columns over two data sets, each of several shards, in any order and with repeats."""
    datasets = [open_dataset(write(tmp_path / "a")), open_dataset(write(tmp_path / "b"))]
    rng = np.random.default_rng(3)
    sources, numbers = rng.integers(0, 2, 50), rng.integers(0, SAMPLES, 50)
    samples = Samples(Lookup(datasets, sources, numbers))
    one_by_one = [datasets[s].sample(int(n)) for s, n in zip(sources, numbers)]
    assert [sample.key for sample in samples] == [sample.key for sample in one_by_one]
    raw, stacked = samples.raw("npy"), samples.array("npy")
    assert raw is not None and [bytes(data) for data in raw] == [bytes(sample.raw("npy")) for sample in one_by_one]
    assert stacked is not None and np.array_equal(stacked, np.stack([sample["npy"] for sample in one_by_one]))
    assert samples.raw("txt") is None and samples.array("txt") is None and samples.values("cls") is None


def test_columns_check_digests_too(folder: Path) -> None:
    with open_dataset(folder) as dataset:
        samples = Samples(Lookup([dataset], np.zeros(2, np.int64), np.array([1, 40])))
        for read in (samples.raw, samples.array):
            with pytest.raises(SampleError, match=r"s0040.npy.*not those that were indexed"):
                read("npy")


def test_the_task_s_arrays_become_tensors_as_they_are(folder: Path) -> None:
    kinds = {"a": np.zeros(2, np.uint16), "b": np.ones((2, 3), np.float32)[:, ::2], "c": np.array([True, False])}
    micro: MicroBatch = fill(folder, gather=lambda samples: kinds)(rows([0, 1]), {})
    assert {name: value.dtype for name, value in micro.batch.items()} == {
        "a": torch.uint16,
        "b": torch.float32,
        "c": torch.bool,
    }
    with pytest.raises(DataError, match="gave word as <U1"):
        fill(folder, gather=lambda samples: {"word": np.array(["a", "b"])})(rows([0, 1]), {})


def test_arrays_of_other_shapes_are_not_stacked(tmp_path: Path) -> None:
    from pipeline.data.pack.writer import Packing, silent, write_split

    pieces = [("a", np.arange(4)), ("b", np.arange(4)), ("c", np.arange(5)), ("d", np.arange(4, dtype=np.int32))]
    samples = iter([(key, {"npy": npy(values)}) for key, values in pieces])
    write_split(tmp_path / "train", samples, 4, 1000, Packing(min_shards=1), silent)
    with open_dataset(tmp_path / "train") as dataset:

        def stacked(*numbers: int) -> np.ndarray | None:
            return Samples(Lookup([dataset], np.zeros(len(numbers), np.int64), np.array(numbers))).array("npy")

        both = stacked(0, 1)
        assert both is not None and both.tolist() == [[0, 1, 2, 3]] * 2
        assert stacked(0, 2) is None and stacked(1, 3) is None


def test_the_order_is_asked_for_each_micro_batch_of_a_loader(folder: Path) -> None:
    wanted = order(3, 4)
    with Loader(Fill([open_dataset(folder)], plain, blocks=[BLOCK], windows=2), wanted, global_batch_size=12,
                micro_batch_size=3) as batches:  # fmt: skip
        for micro in batches.step(0):
            assert micro.epochs.tolist() == wanted.rows(0, micro.index, 3)[1].tolist()
