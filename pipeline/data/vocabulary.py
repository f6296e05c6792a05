"""What a tokenizer.json says without the tokenizer: how many tokens there are, and how many bytes of text each stands
for.

A byte-level tokenizer (GPT-2 and after) writes every byte of the text as one printable character, so a token is as
many bytes long as it has characters, and the lengths of a row's tokens add up to the bytes of its text, whatever the
language. Tokens that stand for no text (end of text) have length 0. Other kinds of tokenizer, with spaces that come
and go, have no such table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError


@dataclass(frozen=True)
class Vocabulary:
    """`size`: one more than the largest token; `byte_lengths`: int64 [size], or None when the tokenizer is not
    byte-level; `end_of_text` and `length` (tokens predicted per row): from text.json, which the packer writes beside
    it, else None; `chats`: whether that says that rows hold chats.
    """

    size: int
    byte_lengths: np.ndarray | None
    end_of_text: int | None
    length: int | None
    chats: bool = False


def read_vocabulary(path: Path) -> Vocabulary:
    """Read `path`, a tokenizer.json, and the text.json beside it if there is one. Raises DataError."""
    tokenizer, facts = _json(path), {}
    if (path.parent / "text.json").is_file():
        facts = _json(path.parent / "text.json")
    try:
        model, added = tokenizer["model"], tokenizer.get("added_tokens") or []
        vocabulary = model["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of their numbers
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        numbers = [*vocabulary.values(), *(token["id"] for token in added)]
        size = max([*numbers, facts.get("vocab_size", 1) - 1]) + 1
        end_of_text, length = facts.get("eot_id"), facts.get("length")
        byte_lengths = None
        if "ByteLevel" in set(_types(tokenizer.get("pre_tokenizer"))) | set(_types(tokenizer.get("decoder"))):
            byte_lengths = np.zeros(size, dtype=np.int64)
            for token, number in vocabulary.items():
                byte_lengths[number] = len(token)
            for token in added:  # spelled as text, not as bytes
                byte_lengths[token["id"]] = 0 if token.get("special") else len(token["content"].encode())
            if end_of_text is not None:
                byte_lengths[end_of_text] = 0
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"{path} is no tokenizer.json that can be read ({type(error).__name__}: {error})") from error
    return Vocabulary(size, byte_lengths, end_of_text, length, "chats" in facts)


def _types(step: Any) -> Iterator[str]:
    """The kinds of a tokenizer's step and of the steps in it."""
    if isinstance(step, dict):
        yield str(step.get("type"))
        for parts in ("pretokenizers", "decoders"):
            for part in step.get(parts, []):
                yield from _types(part)


def xz_bits_per_byte(folder: Path) -> float | None:
    """Bits per byte of `xz -9` on the text of the shards in `folder`; None when the packer did not measure it."""
    path = folder / "text.json"
    facts = _json(path) if path.is_file() else {}
    return 8 * facts["xz_bytes"] / facts["bytes"] if facts.get("xz_bytes") and facts.get("bytes") else None


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no file {path}; pack the text again, or give the path of its tokenizer.json") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
