"""Rows of tokens in shards -> the arrays of a language model.

    {key}.npy, 2 to length + 1 tokens --> tokens row[:-1], labels row[1:], bytes of text in the labels
    {key}.starts.npy, where documents begin --> positions, counted anew in each document (where they are asked for)
    {key}.mask.npy, one flag per token --> labels that are left out where it is 0 (what is not an answer)

A row that is shorter than `length`, such as the last one of a text, ends in labels that are ignored: it counts as if
it stood alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.reader import Sample
from pipeline.data.samples import Samples
from pipeline.data.vocabulary import Vocabulary
from pipeline.errors import DataError

IGNORED = -100  # what torch's cross-entropy leaves out by default
TOKENS, STARTS, MASK = "npy", "starts.npy", "mask.npy"


@dataclass(frozen=True)
class TokenRows:
    """How rows are read. `tokenizer`: for messages; `positions`: whether documents are told apart."""

    tokenizer: Path
    vocabulary: Vocabulary
    length: int
    positions: bool = False

    def prepare(self, sample: Sample) -> dict[str, np.ndarray]:
        """{"tokens": int64 [length], "labels": int64 [length], "bytes": int64 []} and, where it is asked for,
        "positions" int64 [length].

        Raises DataError naming the sample when it is no row of tokens, too long, or of another vocabulary, or when what
        lies beside the row does not fit it.
        """
        row, length = self._row(sample), self.length
        terms = len(row) - 1
        tokens = np.zeros(length, dtype=np.int64)  # attention is causal: no target sees what stands behind a short row
        labels = np.full(length, IGNORED, dtype=np.int64)
        tokens[:terms] = row[:-1]
        labels[:terms] = np.where(_mask(sample, row)[1:], row[1:], IGNORED)
        lengths = self.vocabulary.byte_lengths
        size = lengths[labels[labels != IGNORED]].sum() if lengths is not None else 0
        found = {"tokens": tokens, "labels": labels, "bytes": np.array(size, dtype=np.int64)}
        if self.positions:
            found["positions"] = _positions(_starts(sample, row), length)
        return found

    def gather(self, samples: Samples) -> dict[str, np.ndarray] | None:
        """What `prepare` gives for each, for all rows at once when all of them are whole and plain; else None."""
        rows = None if self.positions or samples.has(MASK).any() else samples.array(TOKENS)  # [m, length + 1]
        m, length, size = len(samples), self.length, self.vocabulary.size
        if rows is None or rows.shape != (m, length + 1) or rows.dtype.kind not in "ui":
            return None
        if rows.max() >= size or rows.min() < 0:
            return None
        tokens, labels = (samples.empty(name, (m, length), np.int64) for name in ("tokens", "labels"))
        tokens[...], labels[...] = rows[:, :-1], rows[:, 1:]
        lengths = self.vocabulary.byte_lengths
        sizes = np.zeros(m, np.int64) if lengths is None else lengths[labels].sum(axis=1)
        return {"tokens": tokens, "labels": labels, "bytes": sizes}

    def _row(self, sample: Sample) -> np.ndarray:
        """int64 [2 to length + 1]"""
        row = sample[TOKENS]
        if row.ndim != 1 or row.dtype.kind not in "ui":
            raise DataError(f"sample {sample.key} is {row.dtype}{list(row.shape)}, not a row of whole numbers")
        if not 2 <= len(row) <= self.length + 1:
            raise DataError(
                f"sample {sample.key} has {len(row)} tokens; with task.length {self.length} a row has 2 to "
                f"{self.length + 1}; set task.length as the text was packed"
            )
        row = row.astype(np.int64)
        unknown = row[(row < 0) | (row >= self.vocabulary.size)]
        if len(unknown):
            raise DataError(
                f"sample {sample.key} has token {unknown[0]}, but {self.tokenizer} "
                f"knows 0 to {self.vocabulary.size - 1}; give the tokenizer the shards were packed with"
            )
        return row


def _mask(sample: Sample, row: np.ndarray) -> np.ndarray:
    """bool [tokens of the row]: which of them are to be learnt; all where nothing is said."""
    if MASK not in sample:
        return np.ones(len(row), dtype=bool)
    mask = sample[MASK]
    if mask.shape != row.shape or mask.dtype.kind not in "bui":
        raise DataError(
            f"sample {sample.key} has {len(row)} tokens and a mask {mask.dtype}{list(mask.shape)}; pack it again"
        )
    return mask != 0


def _starts(sample: Sample, row: np.ndarray) -> np.ndarray:
    """int64 [documents that begin in the row]"""
    if STARTS not in sample:
        raise DataError(
            f"sample {sample.key} does not say where documents begin ({STARTS}); pack the text with `millstream data "
            "pack`, or leave task.attention out"
        )
    starts = sample[STARTS]
    if starts.ndim != 1 or starts.dtype.kind not in "ui" or (np.diff(starts.astype(np.int64)) <= 0).any():
        raise DataError(f"sample {sample.key}: {STARTS} is no list of rising places; pack the text again")
    if len(starts) and not 0 <= starts[-1] < len(row):
        raise DataError(f"sample {sample.key}: a document begins at {starts[-1]}, behind its {len(row)} tokens")
    return starts.astype(np.int64)


def _positions(starts: np.ndarray, length: int) -> np.ndarray:
    """int64 [length]: 0, 1, 2, ... and from 0 again where a document begins."""
    place = np.arange(length)
    begins = np.zeros(length, dtype=np.int64)
    inside = starts[starts < length]
    begins[inside] = inside
    return place - np.maximum.accumulate(begins)
