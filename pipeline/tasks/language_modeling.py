"""The next token: any causal language model of transformers, from options or a pretrained folder, on packed rows.

    {key}.npy, length + 1 tokens --prepare--> inputs row[:-1], targets row[1:] --> logits --> cross-entropy in fp32

Rows come packed from data/pack/text.py: every token of the text but the very first is the target of exactly one row, so
sums over a held-out set are those of its whole text. They are told in bits per byte, which compares between
tokenizers and with file compressors. Rows of chats (data/pack/chats.py) have targets only where an answer stands.
Attention is causal over the whole row or, with `attention: document`, over the document that a token belongs to.

Batch: "tokens" int64 [m, length], "labels" int64 [m, length] (-100: no target), "bytes" int64 [m] (of text in the
row's targets), and where documents are kept apart "positions" int64 [m, length].
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from pipeline import task_file
from pipeline.data.token_rows import IGNORED, TokenRows
from pipeline.data.vocabulary import read_vocabulary
from pipeline.errors import ConfigError
from pipeline.sections import Strict
from pipeline.tasks import Batch, Row, Sums

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

    from pipeline.data.reader import Sample
    from pipeline.data.samples import Samples
    from pipeline.models.pretrained import Weights

CONTEXT, CONTINUED = 96, 16  # tokens of a row that are shown, at the most, and that the network adds to them
LARGEST_EXPONENT = 700.0  # e to this is still a float
HEAD = "causal language modeling"


class Config(Strict):
    """The `task` section of language modeling."""

    name: str = "language_modeling"
    tokenizer: Path = Field(description="tokenizer.json beside the shards, written when the text was packed")
    length: int = Field(ge=1, description="tokens predicted per row; as packed")
    architecture: str | None = Field(default=None, description="transformers model type: llama, gpt2, qwen3 ...")
    attention: Literal["row", "document"] = Field(default="row", description="what a token sees of those before it")
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
        self.rows = TokenRows(config.tokenizer, self.vocabulary, config.length, config.attention == "document")
        self.weights: Weights | None = None
        self._flops: float | None = None

    def build_model(self, kept: Mapping[str, Any] | None = None) -> nn.Module:
        """input_ids [m, length] -> `.logits` [m, length, vocabulary]. Raises ConfigError."""
        from pipeline.models import architectures, documents

        config = self._network(kept)
        if self.config.pretrained is None:
            model = architectures.build(HEAD, config)
        elif kept is not None:
            model = architectures.empty(HEAD, config)
        else:
            model, self.weights = architectures.load(HEAD, self.config.pretrained, config)
        if self.config.attention == "document":
            documents.require(model)
        return model

    def write_settings(self, folder: Path) -> None:
        """The tokenizer's files, for transformers; as they were, where it came from a folder of transformers."""
        from transformers import PreTrainedTokenizerFast

        file = self.config.tokenizer
        if (file.parent / "tokenizer_config.json").is_file():
            templates = sorted(file.parent.glob("chat_template.*"))
            for path in (file, *sorted(file.parent.glob("*token*.*")), *templates):
                shutil.copyfile(path, folder / path.name)
            return
        end = self.vocabulary.end_of_text
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), model_max_length=self.config.length)
        if end is not None:
            token = tokenizer.convert_ids_to_tokens(end)
            tokenizer.add_special_tokens({"bos_token": token, "eos_token": token, "pad_token": token})
        tokenizer.save_pretrained(folder)

    def prepare(self, sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        """A row as the arrays of a batch; raises DataError when it is none (see data/token_rows.py)."""
        return self.rows.prepare(sample)

    def gather(self, samples: Samples) -> dict[str, np.ndarray] | None:
        """What `prepare` gives for each, for all rows at once when all of them are whole and plain; else None."""
        return self.rows.gather(samples)

    def weight(self, batch: Batch) -> float:
        """One term per target."""
        return float((batch["labels"] != IGNORED).sum())

    def loss(self, model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Sums]:
        """Cross-entropy in nats, summed over the targets."""
        from torch.nn import functional

        labels = batch["labels"]  # [m, length]
        logits = model(**_inputs(batch), use_cache=False).logits  # [m, length, V]
        nats = functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        sums: Sums = {"loss": (nats.detach(), (labels != IGNORED).sum())}
        if self.vocabulary.byte_lengths is not None:
            sums["bits_per_byte"] = (nats.detach() / math.log(2), batch["bytes"].sum())
        return nats, sums

    def derive(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Perplexity, beside the mean loss that it is the exponential of."""
        return {"perplexity": math.exp(min(metrics["loss"], LARGEST_EXPONENT))}

    def score(self, model: Callable[..., Any], batch: Batch) -> Sums:
        """The same sums; there is nothing that only training does."""
        return self.loss(model, batch)[1]

    def show(self, model: Callable[..., Any], batch: Batch) -> list[Row]:
        """The first half of each row, how the network goes on from there (its likeliest token each time), how the text
        does, and the mean loss of that in nats. Takes as many forward passes as tokens are added, whatever the rows.
        """
        from torch.nn import functional

        from pipeline.data.pack.tokenizer import decoder
        from pipeline.models import generation

        length = self.config.length
        width = min(length, CONTEXT + CONTINUED - 1)
        longest = min(CONTEXT, max(1, length // 2))
        labels = batch["labels"][:, :width]  # [m, width]
        begin = ((batch["labels"] != IGNORED).sum(dim=1) // 2).clamp(1, longest)  # [m], tokens of context
        turns = min(CONTINUED, width + 1 - longest)
        inputs = {name: values[:, :width] for name, values in _inputs(batch).items()}
        added, logits = generation.likeliest(model, inputs, begin, turns, self.vocabulary.size)
        nats = functional.cross_entropy(logits.float().mT, labels, ignore_index=IGNORED, reduction="none")
        follows = [slice(first - 1, first - 1 + turns) for first in begin.tolist()]  # of the labels
        decode, continued = decoder(self.config.tokenizer, self.vocabulary), added.tolist()
        return [
            {
                "context": decode(batch["tokens"][i, : part.start + 1].tolist()),
                "continuation": decode(continued[i]),
                "truth": decode([label for label in labels[i, part].tolist() if label != IGNORED]),
                "loss": float(nats[i, part].sum() / (labels[i, part] != IGNORED).sum()),
            }
            for i, part in enumerate(follows)
        ]

    def sample(
        self, model: Any, prompts: list[str], count: int, generator: torch.Generator, options: Mapping[str, str]
    ) -> list[Row]:
        """What the network writes: {"text": the prompt and what follows, "tokens": how many were added}.

        A prompt stands at the beginning of a document, as the rows have them; in a chat it is what the user says, and
        "text" is the answer alone. Options: models/writing.py.
        """
        from pipeline.models.writing import Writing, write_texts

        asked, file = task_file.options(Writing, options), self.config.tokenizer
        written = write_texts(model, prompts, count, generator, asked, file, self.vocabulary)
        return [{"text": text, "tokens": tokens} for text, tokens in written]

    def flops_per_sample(self) -> float:
        """Forward and backward of one row, counted once from the graph."""
        import torch

        from pipeline.models import architectures, flops

        if self._flops is None:
            config, shape = self._network(), (1, self.config.length)
            build = partial(architectures.build, HEAD, config)
            self._flops = flops.count(build, lambda: {"input_ids": torch.zeros(shape, dtype=torch.long)})
        return self._flops

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


def _inputs(batch: Batch) -> dict[str, Tensor]:
    """What the network is called with: tokens, and positions where they say which document a token belongs to."""
    positions = {"position_ids": batch["positions"]} if "positions" in batch else {}
    return {"input_ids": batch["tokens"], **positions}
