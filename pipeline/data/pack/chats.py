"""Chats in JSON lines -> rows of tokens in WebDataset shards, with a mask that leaves only the answers to be learnt.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}

    line -> text by the tokenizer's chat template (template.py) -> tokens, and which of them begin inside an answer
         -> several chats in a row, best fit first, none cut -> {row}.npy, {row}.mask.npy, {row}.starts.npy

A chat never lies across two rows. One that is longer than a row is cut at its end, and counted; `attention: document`
keeps the chats of a row from seeing each other. Beside the shards stand the tokenizer, its template and text.json.

Packing a row best-fit is Ding et al. 2024 (arXiv 2404.10830). What it gives up: tools and pictures in messages.
"""

from __future__ import annotations

import json
import shutil
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from pipeline.data.pack.corpus import find_files
from pipeline.data.pack.source import fingerprint
from pipeline.data.pack.template import FILE, SETTINGS, Template, read_template
from pipeline.data.pack.text import npy
from pipeline.data.pack.tokenizer import end_of_text, load_tokenizer
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
from pipeline.data.vocabulary import read_vocabulary
from pipeline.errors import DataError
from pipeline.whole_file import put

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PATTERN = "*.jsonl"
MISSING = "each line must be a JSON object with a list `messages` of {role, content}, both text"


@dataclass(frozen=True)
class Chats:
    """How chats become rows. `tokenizer`: a tokenizer.json, or a folder with one; `template`: instead of its own."""

    length: int = 512  # tokens predicted per row; a row holds at most one more
    tokenizer: Path | None = None
    template: Path | None = None


@dataclass
class _Tokens:
    """All chats of a source, one after the other: tokens, whether each is to be learnt, where chats begin and end."""

    names: list[str]
    digests: list[bytes]
    tokens: np.ndarray
    mask: np.ndarray
    edges: np.ndarray  # int64[chats + 1]
    cut: int = 0
    silent: int = 0


def pack_chats(source: Path, out: Path, packing: Packing, chats: Chats, *, progress: Progress = silent) -> Packed:
    """Pack chats as rows {row}.npy (uint16 or uint32, 2 to length + 1 tokens), {row}.mask.npy (uint8, 1: to be learnt)
    and {row}.starts.npy (uint32: where chats begin). `packing.holdout` counts chats.

    Raises DataError when there are none, a line is no chat, or the tokenizer has no template.
    """
    if chats.length < 1:
        raise DataError(f"rows of {chats.length} tokens cannot be; give a length of at least 1")
    if chats.tokenizer is None:
        raise DataError("chats need the tokenizer of the network that learns them; name its folder with --tokenizer")
    files = find_files(source, [PATTERN])
    if not files:
        raise DataError(f"no {PATTERN} in {source}; {MISSING}")
    tokenizer, template = load_tokenizer(chats.tokenizer), read_template(chats.tokenizer, chats.template)
    tokenizer.encode_special_tokens = False  # the template spells them
    beside = [path for path in (chats.tokenizer, chats.template) if path]
    with work_folder(out, plan(packing, fingerprint([*files, *beside], asdict(chats)))) as work:
        read = _read(source, files, tokenizer, template, chats.length, progress)
        mask = held_out(read.names, packing.holdout, "chats")
        warnings = common(read.digests, mask, "chats")
        if read.cut:
            warnings.append(
                f"{read.cut} chats are longer than {chats.length + 1} tokens and were cut; a larger --length?"
            )
        if read.silent:
            warnings.append(f"{read.silent} chats have no answer within a row, and were left out")
        parts = {"train": ~mask, "test": mask} if mask.any() else {"train": ~mask}
        rows = {
            name: _write_part(
                work, name, source, read, np.flatnonzero(chosen), chats, template, packing, warnings, progress
            )
            for name, chosen in parts.items()
        }
    return Packed(out, rows, (*work.warnings, *warnings))


def _read(
    source: Path, files: list[Path], tokenizer: Tokenizer, template: Template, length: int, progress: Progress
) -> _Tokens:
    """All chats as tokens; those without an answer are left out."""
    dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.uint32
    names: list[str] = []
    digests: list[bytes] = []
    tokens: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    cut = without = 0
    for number, path in enumerate(files):
        for place, messages in _messages(source, path):
            try:
                text, spans = template.answers(messages)
            except DataError as error:
                raise DataError(f"{path}, {place}: {error}") from error
            encoding = tokenizer.encode(text, add_special_tokens=False)
            begins = np.array([begin for begin, _ in encoding.offsets], np.int64)
            learnt = np.zeros(len(begins), np.uint8)
            for begin, end in spans:
                learnt[(begins >= begin) & (begins < end)] = 1
            cut += len(begins) > length + 1
            ids, learnt = np.array(encoding.ids[: length + 1], dtype), learnt[: length + 1]
            learnt[:1] = 0  # what begins a chat follows from nothing
            if not learnt.any():
                without += 1
                continue
            names.append(place)
            digests.append(xxhash.xxh3_128_digest(text.encode()))
            tokens.append(ids)
            masks.append(learnt)
        progress("tokenize", number + 1, len(files))
    if not names:
        raise DataError(f"{source} has no chat with an answer (a message of the role assistant)")
    edges = np.concatenate([[0], np.cumsum([len(each) for each in tokens])])
    return _Tokens(names, digests, np.concatenate(tokens), np.concatenate(masks), edges, cut, without)


def _messages(source: Path, path: Path) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Place and messages of each line; raises DataError for a line that is no chat."""
    name = path.relative_to(source).as_posix() if path != source else path.name
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                messages = json.loads(line)["messages"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}, line {number}: {type(error).__name__}: {error}; {MISSING}") from error
            good = isinstance(messages, list) and messages
            if not good or not all(
                isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
                for each in messages
            ):
                raise DataError(f"{path}, line {number}: {MISSING}")
            yield f"{name}:{number}", messages


def fit(sizes: np.ndarray, room: int) -> list[list[int]]:
    """Which items, of `sizes` up to `room`, lie in which bin: the largest first, each where it leaves least room."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room that is left, bin), rising
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        place = bisect_left(free, (size, -1))
        if place == len(free):
            free_room, number = room, len(bins)
            bins.append([])
        else:
            free_room, number = free.pop(place)
        bins[number].append(item)
        insort(free, (free_room - size, number))
    return bins


def _write_part(
    work: Work,
    name: str,
    source: Path,
    read: _Tokens,
    chosen: np.ndarray,
    chats: Chats,
    template: Template,
    packing: Packing,
    warnings: list[str],
    progress: Progress,
) -> int:
    """Write one split; how many rows it has."""
    assert chats.tokenizer is not None
    folder = work.out / name
    folder.mkdir(exist_ok=True)
    rows = fit(np.diff(read.edges)[chosen], chats.length + 1)
    order = permutation(len(rows), packing)
    samples = ((f"{i:09d}", _row(read, chosen[rows[i]])) for i in order.tolist())
    sample_bytes = 3 * MEMBER_BYTES + (chats.length + 1) * (read.tokens.itemsize + 1) + 3 * 128
    write_split(folder, samples, len(rows), sample_bytes, packing, progress)
    home = chats.tokenizer if chats.tokenizer.is_dir() else chats.tokenizer.parent
    shutil.copyfile(home / "tokenizer.json" if chats.tokenizer.is_dir() else chats.tokenizer, folder / "tokenizer.json")
    for path in (home / SETTINGS, home / "special_tokens_map.json"):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    put(folder / FILE, [template.text.encode()])
    spans = [slice(*read.edges[i : i + 2].tolist()) for i in chosen.tolist()]
    learnt = np.concatenate([read.tokens[span][read.mask[span] == 1] for span in spans])
    tokenizer = load_tokenizer(chats.tokenizer)
    lengths = read_vocabulary(folder / "tokenizer.json").byte_lengths
    facts: dict[str, Any] = {
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "length": chats.length,
        "eot_id": end_of_text(tokenizer, chats.tokenizer),
        "chats": len(chosen),
        "rows": len(rows),
        "tokens": int(np.diff(read.edges)[chosen].sum()),
        "learnt_tokens": len(learnt),
        "learnt_bytes": None if lengths is None else int(lengths[learnt].sum()),
    }
    write_json(folder / "text.json", {"format": 1, **facts})
    write_card(folder, "chats", source, packing, {"samples": len(rows), **facts, "warnings": warnings})
    return len(rows)


def _row(read: _Tokens, chats: np.ndarray) -> dict[str, bytes]:
    """One sample: tokens of its chats, which of them are to be learnt, and where chats begin."""
    spans = [slice(*read.edges[i : i + 2].tolist()) for i in chats.tolist()]
    sizes = [span.stop - span.start for span in spans]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    tokens, mask = (np.concatenate([values[span] for span in spans]) for values in (read.tokens, read.mask))
    return {"npy": npy(tokens), "mask.npy": npy(mask), "starts.npy": npy(starts.astype(np.uint32))}
