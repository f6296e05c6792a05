"""Rows of tokens as arrays: documents told apart, labels masked, whole micro batches at once, and what is no row."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data import index
from pipeline.data.reader import Sample, open_dataset
from pipeline.data.samples import Lookup, Samples
from pipeline.data.token_rows import IGNORED, TokenRows
from pipeline.data.vocabulary import read_vocabulary
from pipeline.errors import DataError
from tests import small_data

LENGTH = 16


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.rows(tmp_path_factory.mktemp("rows") / "text", length=LENGTH)


def rows_of(folder: Path, **changes: Any) -> TokenRows:
    file = folder / "tokenizer.json"
    return TokenRows(**{"tokenizer": file, "vocabulary": read_vocabulary(file), "length": LENGTH} | changes)


def sample_of(folder: Path, **fields: np.ndarray) -> Sample:
    """One sample in a tar of its own, read back; `starts` and `mask` beside `row`."""
    folder.mkdir()
    with tarfile.open(folder / "shard-000.tar", "w") as tar:
        for name, values in fields.items():
            npy = io.BytesIO()
            np.save(npy, values)
            member = tarfile.TarInfo("verse.npy" if name == "row" else f"verse.{name}.npy")
            member.size = npy.tell()
            npy.seek(0)
            tar.addfile(member, npy)
    index.build(folder)
    return open_dataset(folder).sample(0)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (np.arange(LENGTH + 2), r"verse has 18 tokens; .* 2 to 17"),
        (np.zeros(1, dtype=np.uint16), "verse has 1 tokens"),
        (np.zeros(LENGTH, dtype=np.float32), r"verse is float32\[16\], not a row of whole numbers"),
        (np.zeros((2, 4), dtype=np.uint16), r"verse is uint16\[2, 4\]"),
        (np.array([1, 300, 2]), r"verse has token 300, but .* knows 0 to 256"),
        (np.array([1, -1, 2]), "verse has token -1"),
    ],
)
def test_a_sample_that_is_no_row_is_named(tmp_path: Path, text: Path, row: np.ndarray, words: str) -> None:
    sample = sample_of(tmp_path / "one", row=row)
    with pytest.raises(DataError, match=words):
        rows_of(text).prepare(sample)


def test_gather_is_prepare_for_whole_rows(tmp_path: Path, text: Path) -> None:
    """And None for a ragged row, one with a token that the tokenizer does not know, one with a mask, and documents."""
    rows = rows_of(text)

    def samples(folder: Path, numbers: list[int]) -> Samples:
        return Samples(Lookup([open_dataset(folder)], np.zeros(len(numbers), np.int64), np.array(numbers)))

    with open_dataset(text) as dataset:
        lengths = [len(dataset.sample(number)["npy"]) for number in range(len(dataset))]
        whole = [number for number, length in enumerate(lengths) if length == LENGTH + 1]
        each = [rows.prepare(dataset.sample(number)) for number in whole]
    ragged = [number for number in range(len(lengths)) if number not in whole]
    got = rows.gather(samples(text, whole))
    assert got is not None and len(whole) > 3 and ragged
    for name in ("tokens", "labels", "bytes"):
        assert np.array_equal(got[name], np.stack([row[name] for row in each])), name
    assert rows.gather(samples(text, [*whole, *ragged])) is None
    assert rows_of(text, positions=True).gather(samples(text, whole)) is None
    row = np.arange(LENGTH + 1, dtype=np.uint16)
    for name, fields in (("unknown", {"row": row + 250}), ("masked", {"row": row, "mask": row.astype(np.uint8)})):
        sample_of(tmp_path / name, **fields)
        assert rows.gather(samples(tmp_path / name, [0])) is None
    sample_of(tmp_path / "plain", row=row)
    assert rows.gather(samples(tmp_path / "plain", [0])) is not None


def test_a_mask_leaves_labels_out_and_their_bytes(tmp_path: Path, text: Path) -> None:
    row = np.arange(10, 20, dtype=np.uint16)
    mask = np.array([1, 0, 0, 1, 1, 0, 0, 0, 0, 1], np.uint8)  # what it says of the first token is never asked
    got = rows_of(text).prepare(sample_of(tmp_path / "one", row=row, mask=mask))
    assert got["tokens"][:9].tolist() == list(range(10, 19))
    assert got["labels"].tolist() == [IGNORED, IGNORED, 13, 14, *[IGNORED] * 4, 19, *[IGNORED] * 7]
    assert got["bytes"] == 3 and "positions" not in got


def test_positions_begin_anew_with_each_document(tmp_path: Path, text: Path) -> None:
    row = np.arange(LENGTH + 1, dtype=np.uint16)
    for number, (starts, expected) in enumerate(
        [
            ([], [*range(16)]),
            ([0], [*range(16)]),
            ([3, 4, 9], [0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]),
            ([15, 16], [*range(15), 0]),  # the last token of a row is a label only
        ]
    ):
        sample = sample_of(tmp_path / str(number), row=row, starts=np.array(starts, np.uint32))
        assert rows_of(text, positions=True).prepare(sample)["positions"].tolist() == expected


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ({"mask": np.ones(3, np.uint8)}, r"verse has 5 tokens and a mask uint8\[3\]"),
        ({}, r"verse does not say where documents begin .*leave task.attention out"),
        ({"starts": np.array([3, 1], np.uint32)}, "no list of rising places"),
        ({"starts": np.array([5], np.uint32)}, "begins at 5, behind its 5 tokens"),
    ],
)
def test_what_lies_beside_a_row_must_fit_it(
    tmp_path: Path, text: Path, beside: dict[str, np.ndarray], words: str
) -> None:
    sample = sample_of(tmp_path / "one", row=np.arange(5, dtype=np.uint16), **beside)
    with pytest.raises(DataError, match=words):
        rows_of(text, positions=True).prepare(sample)
