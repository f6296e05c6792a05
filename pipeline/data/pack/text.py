"""Text files -> rows of tokens of fixed length in WebDataset shards.

Files become documents, documents are held out, a byte-level BPE tokenizer is trained on the others (or loaded), and
each split becomes one stream: end-of-text, document, end-of-text, document, ... Row i holds tokens [i * length, i *
length + length], one more than `length`: inputs are row[:-1], targets row[1:], and each token of the stream but the
very first is predicted exactly once. The stream lies in a scratch file while rows are shuffled, so memory holds a
group of documents, not the corpus. Killed on its way, packing goes on with the tokenizer, streams and shards that are
there.

text.json beside the shards has what bits per byte are computed from, and what `xz -9` makes of the held-out text.
"""

from __future__ import annotations

import lzma
import os
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.pack.corpus import PATTERNS, Corpus, find_files, look_through
from pipeline.data.pack.source import fingerprint
from pipeline.data.pack.tokenizer import PIECE_CHARACTERS, end_of_text, is_lossless, load_tokenizer, train
from pipeline.data.pack.work import Work, work_folder
from pipeline.data.pack.writer import (
    MEMBER_BYTES,
    Packed,
    Packing,
    Progress,
    common,
    held_out,
    permutation,
    plan,
    silent,
    write_card,
    write_json,
    write_split,
)
from pipeline.errors import DataError
from pipeline.whole_file import put

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GROUP_CHARACTERS = 4 << 20  # tokenized at once, on all cores
XZ_LIMIT_BYTES = 1 << 28  # xz takes a second for 2 MB; beyond this its figure is left out


@dataclass(frozen=True)
class Text:
    """What of the source is text, and how it becomes rows."""

    length: int = 512  # tokens predicted per row; a row holds one more
    vocab_size: int = 8192  # of the tokenizer that is trained
    tokenizer: Path | None = None  # a tokenizer.json, or a folder with one, to use instead of training
    end_of_text: str | None = None  # the token between documents; None: the tokenizer's own
    patterns: tuple[str, ...] = PATTERNS
    exclude: tuple[str, ...] = ()  # patterns of file and folder names that are left out
    field: str = "text"  # of each line of a .jsonl


def pack_text(source: Path, out: Path, packing: Packing, text: Text, *, progress: Progress = silent) -> Packed:
    """Pack text as rows {row}.npy (uint16 or uint32, [length + 1]; the last of the stream may be shorter) and
    {row}.starts.npy (uint32: places in the row where a document begins, at its end-of-text token).

    `packing.holdout` counts documents: files, and lines of .jsonl. Beside the shards: tokenizer.json, text.json. Raises
    DataError when there is no text, a .jsonl line cannot be read, or the tokenizer does not fit.
    """
    if text.length < 1:
        raise DataError(f"rows of {text.length} tokens cannot be; give a length of at least 1")
    if text.tokenizer and not text.tokenizer.exists():
        raise DataError(f"no tokenizer at {text.tokenizer}; give a tokenizer.json or a folder that holds one")
    read = [*find_files(source, text.patterns, text.exclude), *([text.tokenizer] if text.tokenizer else [])]
    with work_folder(out, plan(packing, fingerprint(read, asdict(text)))) as work:
        corpus, warnings = look_through(source, text.patterns, text.exclude, text.field, progress)
        if packing.holdout and len(corpus.names) == 1:
            raise DataError(
                f"{source} is one document, none can be held out; split it into several files, or hold out 0"
            )
        mask = held_out(corpus.names, packing.holdout, "documents")
        warnings += common(corpus.digests, mask, "documents")
        tokenizer = _tokenizer(work, corpus, ~mask, text, progress)
        facts: dict[str, Any] = {
            "vocab_size": max(tokenizer.get_vocab().values()) + 1,
            "length": text.length,
            "eot_id": end_of_text(tokenizer, text.tokenizer, text.end_of_text),
            "lossless": is_lossless(tokenizer, corpus.texts(np.ones_like(mask))),
        }
        if not text.tokenizer and facts["vocab_size"] < text.vocab_size:
            warnings.append(f"the text gives a vocabulary of {facts['vocab_size']} tokens, not {text.vocab_size}")
        if not facts["lossless"]:
            warnings.append(
                "the tokenizer does not give the text back unchanged: its bits per byte compare with nothing else"
            )
        parts = {"train": ~mask, "test": mask} if mask.any() else {"train": ~mask}
        rows = {}
        for name, chosen in parts.items():
            rows[name] = _write_part(work, name, corpus, chosen, tokenizer, facts, packing, warnings, progress)
    return Packed(out, rows, (*work.warnings, *warnings))


def _tokenizer(work: Work, corpus: Corpus, mask: np.ndarray, text: Text, progress: Progress) -> Tokenizer:
    """The one that is given, or one of these documents, trained now or before a packing was stopped."""
    path = text.tokenizer or work.folder / "tokenizer.json"
    if not text.tokenizer and not path.exists():
        put(path, [train(corpus, mask, text.vocab_size, progress).to_str(pretty=True).encode()])
    return load_tokenizer(path)


def _write_part(
    work: Work,
    name: str,
    corpus: Corpus,
    mask: np.ndarray,
    tokenizer: Tokenizer,
    common_facts: dict[str, Any],
    packing: Packing,
    warnings: list[str],
    progress: Progress,
) -> int:
    """Tokenize and write one split; how many rows it has."""
    folder = work.out / name
    stream, starts = _tokenize(
        work.folder / f"{name}.tokens", corpus.texts(mask), int(mask.sum()), tokenizer, common_facts, progress
    )
    length = common_facts["length"]
    rows = -(-(len(stream) - 1) // length)
    if not rows:
        raise DataError(f"the documents for {folder.name} have no tokens; pack more text")
    order = permutation(rows, packing)
    sample_bytes = 2 * MEMBER_BYTES + (length + 1) * stream.itemsize + 2 * 128
    samples = ((f"{i:09d}", _row(stream, starts, int(i), length)) for i in order)
    write_split(folder, samples, rows, sample_bytes, packing, progress)
    size_bytes = int(corpus.size_bytes[mask].sum())
    xz_bytes = None
    if folder.name == "test" and size_bytes <= XZ_LIMIT_BYTES:
        progress("xz -9", 0, 1)
        xz_bytes = _xz_bytes(corpus.texts(mask))
        progress("xz -9", 1, 1)
    facts = common_facts | {
        "bytes": size_bytes,
        "tokens": len(stream),
        "rows": rows,
        "documents": int(mask.sum()),
        "files": len(np.unique(corpus.file_of[mask])),
        "xz_bytes": xz_bytes,
    }
    write_json(folder / "text.json", {"format": 1, **facts})
    tokenizer.save(str(folder / "tokenizer.json"))
    write_card(folder, "text", corpus.source, packing, {"samples": rows, **facts, "warnings": warnings})
    return rows


def _row(stream: np.ndarray, starts: np.ndarray, row: int, length: int) -> dict[str, bytes]:
    """One sample: its tokens, and where in them documents begin."""
    low = row * length
    tokens = stream[low : low + length + 1]
    first, last = np.searchsorted(starts, (low, low + len(tokens)))
    return {"npy": npy(tokens), "starts.npy": npy((starts[first:last] - low).astype(np.uint32))}


def npy(values: np.ndarray) -> bytes:
    """An array as the bytes of a .npy file."""
    buffer = BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(values), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _tokenize(
    path: Path, texts: Iterator[str], count: int, tokenizer: Tokenizer, facts: dict[str, Any], progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Write the stream of tokens to `path`: the stream as a memory map, int64[documents] where each document begins.

    Both are there already when a packing goes on.
    """
    dtype = np.dtype(np.uint16 if facts["vocab_size"] <= 1 << 16 else np.uint32)
    begins_path = path.with_suffix(".starts.npy")
    if not begins_path.exists():  # it is written last
        starts, total = array("q"), 0
        with open(path, "wb") as file:
            for group in _groups(texts):
                pieces = tokenizer.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
                for (begins, _), encoding in zip(group, pieces):
                    if begins:
                        starts.append(total)
                    ids = np.array([facts["eot_id"]] * begins + encoding.ids, dtype=dtype)
                    file.write(ids.tobytes())
                    total += len(ids)
                progress("tokenize", len(starts), count)
            file.flush()
            os.fsync(file.fileno())
        put(begins_path, [npy(np.array(starts, np.int64))])
    size = path.stat().st_size // dtype.itemsize
    return np.memmap(path, dtype=dtype, mode="r", shape=(size,)), np.load(begins_path)


def _groups(texts: Iterator[str]) -> Iterator[list[tuple[bool, str]]]:
    """Pieces of documents, (whether it begins its document, text), in groups of a size that memory holds."""
    group: list[tuple[bool, str]] = []
    size = 0
    for text in texts:
        for i, piece in enumerate(_pieces(text)):
            group.append((i == 0, piece))
            size += len(piece)
            if size >= GROUP_CHARACTERS:
                yield group
                group, size = [], 0
    if group:
        yield group


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most PIECE_CHARACTERS, each but the last ending with a line where there is one."""
    begin = 0
    while len(text) - begin > PIECE_CHARACTERS:
        cut = text.rfind("\n", begin, begin + PIECE_CHARACTERS) + 1
        end = cut if cut > begin else begin + PIECE_CHARACTERS
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _xz_bytes(texts: Iterator[str]) -> int:
    """What `xz -9` makes of the texts, one after the other."""
    compressor = lzma.LZMACompressor(preset=9)
    return sum(len(compressor.compress(text.encode())) for text in texts) + len(compressor.flush())
