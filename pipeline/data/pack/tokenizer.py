"""Tokenizers of text: one that is given, one trained on a corpus, and what of them is said beside the rows.

Read and trained by the library `tokenizers`. A trained one is a byte-level BPE, which gives every text back unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.pack.corpus import Corpus
from pipeline.data.pack.writer import Progress
from pipeline.data.vocabulary import Vocabulary
from pipeline.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")  # ours, then others in use
PIECE_CHARACTERS = 1 << 20  # longer documents are tokenized in pieces that end with a line


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of a folder of transformers that has one; raises DataError."""
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"no tokenizer at {file}; give a tokenizer.json or a folder that holds one")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more exact
        raise DataError(f"{file} is no tokenizer that can be read: {error}") from error
    tokenizer.no_truncation()  # both may be set in the file, and would cut or fill documents without a word
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" spelled out in a document is text
    return tokenizer


def decoder(path: Path, vocabulary: Vocabulary) -> Callable[[list[int]], str]:
    """Tokens -> their text; bytes that are part of a character show as a replacement sign."""
    from tokenizers import Tokenizer, decoders

    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.decoder is None and vocabulary.byte_lengths is not None:
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False)


def train(corpus: Corpus, mask: np.ndarray, vocab_size: int, progress: Progress) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, over bytes as in GPT-2) from the chosen documents only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise DataError(
            f"a vocabulary of {vocab_size} cannot hold the 256 bytes and the end of text; give at least 257"
        )

    def texts() -> Iterator[str]:
        for i, text in enumerate(corpus.texts(mask)):
            yield text
            progress("train tokenizer", i + 1, int(mask.sum()))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def end_of_text(tokenizer: Tokenizer, path: Path | None, asked: str | None = None) -> int:
    """The id of the token between documents: the one asked for, the tokenizer's own, or one known by its name.

    `path`: where the tokenizer came from, if it was not trained here. Raises DataError when it has none.
    """
    names: list[str | None] = [asked] if asked else [*END_OF_TEXT]
    settings = (path / "tokenizer_config.json") if path and path.is_dir() else None
    if settings and settings.is_file() and not asked:
        own = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
        names.insert(0, own.get("content") if isinstance(own, dict) else own)
    for name in names:
        number = tokenizer.token_to_id(name) if name else None
        if number is not None:
            return number
    raise DataError(
        f"the tokenizer has no end-of-text token ({' '.join(filter(None, names))}); name one it has (end_of_text)"
    )


def is_lossless(tokenizer: Tokenizer, texts: Iterable[str]) -> bool:
    """Whether the first documents come back from their tokens unchanged."""
    pieces = [text[:PIECE_CHARACTERS] for text in islice(texts, 16)]
    ids = [tokenizer.encode(piece, add_special_tokens=False).ids for piece in pieces]
    return tokenizer.decode_batch(ids, skip_special_tokens=False) == pieces
