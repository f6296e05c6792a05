"""The next token: any causal language model of transformers, from options or a pretrained folder, on packed rows.

    {key}.npy, length + 1 tokens --prepare--> inputs row[:-1], targets row[1:] --> logits --> cross-entropy in fp32

Rows come packed from data/text.py: every token of the text but the very first is the target of exactly one row, so
sums over a held-out set are those of its whole text. They are told in bits per byte, which compares between
tokenizers and with file compressors. Attention is causal over the whole row, across the documents in it.

Batch: "tokens" int64 [m, length], "labels" int64 [m, length] (-100: no target), "bytes" int64 [m] (of text in the
row's targets).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from pipeline.data.vocabulary import read_vocabulary
from pipeline.errors import ConfigError, DataError
from pipeline.sections import Strict
from pipeline.tasks import Batch, Row, Sums

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

    from pipeline.data.reader import Sample
    from pipeline.data.samples import Samples
    from pipeline.models.pretrained import Weights

CONTEXT, CONTINUED = 96, 16  # tokens of a row that are shown, at the most, and that the network adds to them
IGNORED = -100  # what torch's cross-entropy leaves out by default
HEAD = "causal language modeling"


class Config(Strict):
    """The `task` section of language modeling."""

    name: str = "language_modeling"
    tokenizer: Path = Field(description="tokenizer.json beside the shards, written when the text was packed")
    length: int = Field(ge=1, description="tokens predicted per row; as packed")
    architecture: str | None = Field(default=None, description="transformers model type: llama, gpt2, qwen3 ...")
    model: dict[str, Any] = Field(default={}, description="options of the architecture, as in its transformers config")
    pretrained: Path | None = Field(default=None, description="folder of a pretrained network, instead of architecture")

    @model_validator(mode="after")
    def _one_network(self) -> Config:
        if (self.architecture is None) == (self.pretrained is None):
            raise ValueError("needs either `architecture: ...` (fresh weights) or `pretrained: FOLDER`, and not both")
        if self.pretrained and self.model:
            raise ValueError(
                "`model` belongs to `architecture`; a pretrained folder has its options in its config.json"
            )
        return self


class Task:
    """See pipeline/tasks/__init__.py for what each method promises.

    Raises DataError when the tokenizer cannot be read, ConfigError when it does not fit.
    """

    augments = False
    unit = "tokens"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.vocabulary = read_vocabulary(config.tokenizer)
        packed = self.vocabulary.length
        if packed is not None and packed != config.length:
            raise ConfigError(
                f"task.length: rows beside {config.tokenizer} were packed with length {packed}, not {config.length}; "
                f"set task.length to {packed}, or pack again"
            )
        self.weights: Weights | None = None
        self._flops: float | None = None

    def build_model(self, kept: Mapping[str, Any] | None = None) -> nn.Module:
        """input_ids [m, length] -> `.logits` [m, length, vocabulary]. Raises ConfigError."""
        from pipeline.models import architectures

        config = self._network(kept)
        if self.config.pretrained is None:
            model = architectures.build(HEAD, config)
        elif kept is not None:
            model = architectures.empty(HEAD, config)
        else:
            model, self.weights = architectures.load(HEAD, self.config.pretrained, config)
        return model

    def write_settings(self, folder: Path) -> None:
        """The tokenizer's files, for transformers; as they were, where it came from a folder of transformers."""
        from transformers import PreTrainedTokenizerFast

        file = self.config.tokenizer
        if (file.parent / "tokenizer_config.json").is_file():
            for path in (file, *sorted(file.parent.glob("*token*.*"))):
                shutil.copyfile(path, folder / path.name)
            return
        end = self.vocabulary.end_of_text
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), model_max_length=self.config.length)
        if end is not None:
            token = tokenizer.convert_ids_to_tokens(end)
            tokenizer.add_special_tokens({"bos_token": token, "eos_token": token, "pad_token": token})
        tokenizer.save_pretrained(folder)

    def prepare(self, sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        """{"tokens": int64 [length], "labels": int64 [length], "bytes": int64 []}; short rows end in ignored labels.

        Raises DataError naming the sample when it is no row of tokens, too long, or of another vocabulary.
        """
        row, length = self._row(sample), self.config.length
        terms = len(row) - 1
        tokens = np.zeros(length, dtype=np.int64)  # attention is causal: no target sees what stands behind a short row
        labels = np.full(length, IGNORED, dtype=np.int64)
        tokens[:terms], labels[:terms] = row[:-1], row[1:]
        lengths = self.vocabulary.byte_lengths
        size = lengths[row[1:]].sum() if lengths is not None else 0
        return {"tokens": tokens, "labels": labels, "bytes": np.array(size, dtype=np.int64)}

    def gather(self, samples: Samples) -> dict[str, np.ndarray] | None:
        """What `prepare` gives for each, for all rows at once when all of them are whole; else None."""
        rows = samples.array("npy")  # [m, length + 1]
        m, length, size = len(samples), self.config.length, self.vocabulary.size
        if rows is None or rows.shape != (m, length + 1) or rows.dtype.kind not in "ui":
            return None
        if rows.max() >= size or rows.min() < 0:
            return None
        tokens, labels = (samples.empty(name, (m, length), np.int64) for name in ("tokens", "labels"))
        tokens[...], labels[...] = rows[:, :-1], rows[:, 1:]
        lengths = self.vocabulary.byte_lengths
        sizes = np.zeros(m, np.int64) if lengths is None else lengths[labels].sum(axis=1)
        return {"tokens": tokens, "labels": labels, "bytes": sizes}

    def weight(self, batch: Batch) -> float:
        """One term per target."""
        return float((batch["labels"] != IGNORED).sum())

    def loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Sums]:
        """Cross-entropy in nats, summed over the targets."""
        from torch.nn import functional

        tokens, labels = batch["tokens"], batch["labels"]  # [m, length] each
        logits = model(input_ids=tokens, use_cache=False).logits  # [m, length, V]
        nats = functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        sums: Sums = {"loss": (nats.detach(), (labels != IGNORED).sum())}
        if self.vocabulary.byte_lengths is not None:
            sums["bits_per_byte"] = (nats.detach() / math.log(2), batch["bytes"].sum())
        return nats, sums

    def score(self, model: Callable[..., Any], batch: Batch) -> Sums:
        """The same sums; there is nothing that only training does."""
        return self.loss(model, batch)[1]

    def show(self, model: Callable[..., Any], batch: Batch) -> list[Row]:
        """The first half of each row, how the network goes on from there (its likeliest token each time), how the text
        does, and the mean loss of that in nats. Takes as many forward passes as tokens are added, whatever the rows.
        """
        import torch
        from torch.nn import functional

        length = self.config.length
        width = min(length, CONTEXT + CONTINUED - 1)
        longest = min(CONTEXT, max(1, length // 2))
        tokens, labels = batch["tokens"][:, :width].clone(), batch["labels"][:, :width]  # [m, width] each
        begin = ((batch["labels"] != IGNORED).sum(dim=1) // 2).clamp(1, longest)  # [m], tokens of context
        row = torch.arange(len(tokens), device=tokens.device)
        added: list[Tensor] = []
        nats = torch.empty(0)
        for turn in range(min(CONTINUED, width + 1 - longest)):
            place = begin + turn  # attention is causal: what stands from there on in `tokens` is not seen
            logits = model(input_ids=tokens, use_cache=False).logits[..., : self.vocabulary.size]
            if turn == 0:
                nats = functional.cross_entropy(logits.float().mT, labels, ignore_index=IGNORED, reduction="none")
            added.append(logits[row, place - 1].argmax(dim=-1))
            tokens[row, place.clamp(max=width - 1)] = added[-1]  # the last one may be behind the end, and is not read
        follows = [slice(first - 1, first - 1 + len(added)) for first in begin.tolist()]  # of the labels
        decode, continued = self._decoder(), torch.stack(added, dim=1).tolist()
        return [
            {
                "context": decode(batch["tokens"][i, : part.start + 1].tolist()),
                "continuation": decode(continued[i]),
                "truth": decode([label for label in labels[i, part].tolist() if label != IGNORED]),
                "loss": float(nats[i, part].sum() / (labels[i, part] != IGNORED).sum()),
            }
            for i, part in enumerate(follows)
        ]

    def flops_per_sample(self) -> float:
        """Forward and backward of one row, counted once from the graph."""
        import torch

        from pipeline.models import architectures, flops

        if self._flops is None:
            config, shape = self._network(), (1, self.config.length)
            build = partial(architectures.build, HEAD, config)
            self._flops = flops.count(build, lambda: {"input_ids": torch.zeros(shape, dtype=torch.long)})
        return self._flops

    def _decoder(self) -> Callable[[list[int]], str]:
        """Tokens -> their text; bytes that are part of a character show as a replacement sign."""
        from tokenizers import Tokenizer, decoders

        tokenizer = Tokenizer.from_file(str(self.config.tokenizer))
        if tokenizer.decoder is None and self.vocabulary.byte_lengths is not None:
            tokenizer.decoder = decoders.ByteLevel()
        return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False)

    def _network(self, kept: Mapping[str, Any] | None = None) -> PreTrainedConfig:
        """Its configuration in transformers: from the options, the pretrained folder, or what a checkpoint kept."""
        from pipeline.models import architectures

        folder = self.config.pretrained
        if folder is None:
            config, place = self._fresh_config(), "task.model:"
        else:
            config = architectures.kept_config(kept) if kept else architectures.pretrained_config(folder)
            place = f"task.pretrained: {folder}"
        self._check_sizes(config, place)
        config.use_cache = False
        return config

    def _fresh_config(self) -> PreTrainedConfig:
        """Options as given; else no dropout, sizes and token ids of these rows, and what the architecture has."""
        from pipeline.models import architectures

        assert self.config.architecture is not None  # checked by Config
        defaults = {
            "vocab_size": self.vocabulary.size,
            "max_position_embeddings": self.config.length,
            "bos_token_id": self.vocabulary.end_of_text,  # the packer puts one end of text before each document
            "eos_token_id": self.vocabulary.end_of_text,
        }
        config = architectures.configure(HEAD, self.config.architecture, self.config.model, defaults=defaults)
        architectures.without_dropout(config, self.config.model)
        return config

    def _check_sizes(self, config: PreTrainedConfig, place: str) -> None:
        text = config.get_text_config()
        if text.vocab_size < self.vocabulary.size:
            raise ConfigError(
                f"{place} vocab_size is {text.vocab_size}, but {self.config.tokenizer} has {self.vocabulary.size} "
                "tokens; leave vocab_size out, or pack the text with the network's own tokenizer"
            )
        positions = getattr(text, "max_position_embeddings", None)
        if isinstance(positions, int) and positions < self.config.length:
            raise ConfigError(f"{place} has {positions} positions, too few for task.length {self.config.length}")

    def _row(self, sample: Sample) -> np.ndarray:
        """int64 [2 to length + 1]"""
        row = sample["npy"]
        if row.ndim != 1 or row.dtype.kind not in "ui":
            raise DataError(f"sample {sample.key} is {row.dtype}{list(row.shape)}, not a row of whole numbers")
        if not 2 <= len(row) <= self.config.length + 1:
            raise DataError(
                f"sample {sample.key} has {len(row)} tokens; with task.length {self.config.length} a row has 2 to "
                f"{self.config.length + 1}; set task.length as the text was packed"
            )
        row = row.astype(np.int64)
        unknown = row[(row < 0) | (row >= self.vocabulary.size)]
        if len(unknown):
            raise DataError(
                f"sample {sample.key} has token {unknown[0]}, but {self.config.tokenizer} "
                f"knows 0 to {self.vocabulary.size - 1}; give the tokenizer the shards were packed with"
            )
        return row
