"""Documents in a row: with `attention: document` none sees another; networks that cannot are refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.data.pack.text import Text, pack_text
from pipeline.data.pack.writer import Packing
from pipeline.data.reader import open_dataset
from pipeline.errors import ConfigError
from pipeline.models import documents
from tests.tasks.test_language_modeling import GPT2, LENGTH, LLAMA, batch_of, built, task_of

GQA = LLAMA | {"num_key_value_heads": 1}
NETWORKS: list[tuple[str, dict[str, Any]]] = [
    ("llama", LLAMA),
    ("gpt2", GPT2),
    ("qwen3", GQA | {"head_dim": 8}),
    ("mistral", GQA | {"sliding_window": 5}),
    ("gpt_neox", LLAMA),
    ("gemma3_text", GQA | {"head_dim": 8, "sliding_window": 5}),
]
MAMBA2 = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 8}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that hold several short documents each."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "source").mkdir()
    for number in range(40):
        (folder / "source" / f"{number}.txt").write_text("abcdefgh"[: 2 + number % 6], encoding="utf-8")
    pack_text(folder / "source", folder / "packed", Packing(min_shards=1), Text(length=LENGTH, vocab_size=300))
    return folder / "packed" / "train"


def logits(model: nn.Module, tokens: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    own = {} if positions is None else {"position_ids": positions}
    with torch.no_grad():
        return model(input_ids=tokens, **own, use_cache=False).logits


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(("architecture", "options"), NETWORKS, ids=[name for name, _ in NETWORKS])
def test_logits_of_a_document_are_those_it_has_alone(
    text: Path, architecture: str, options: dict[str, Any], kernel: str
) -> None:
    task = task_of(text, architecture=architecture, model=options, attention="document")
    model = built(task).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.set_attn_implementation(kernel)  # type: ignore[operator]
    batch, compared, seen = batch_of(task, text), 0, 0.0
    together = logits(model, batch["tokens"], batch["positions"])
    as_one = logits(model, batch["tokens"], None)
    for row, positions in enumerate(batch["positions"]):
        edges = [*np.flatnonzero(positions.numpy() == 0).tolist(), LENGTH]
        for begin, end in pairwise(edges):
            alone = logits(model, batch["tokens"][row : row + 1, begin:end], None)[0]
            torch.testing.assert_close(together[row, begin:end], alone, rtol=1e-4, atol=1e-5)
            compared += begin > 0
            seen = max(seen, float((as_one[row, begin:end] - alone).abs().max()) if begin else 0.0)
    assert compared > 20 and seen > 0.1, "several documents a row, and without positions they do see each other"


def test_loss_and_shown_samples_keep_documents_apart(text: Path) -> None:
    task = task_of(text, attention="document")
    model, batch = built(task), batch_of(task, text)
    changed = dict(batch)
    row = next(row for row in range(len(batch["tokens"])) if int((batch["positions"][row] == 0).sum()) >= 2)
    [second, *_] = np.flatnonzero(batch["positions"][row].numpy() == 0)[1:]
    changed["tokens"] = batch["tokens"].clone()
    changed["tokens"][row, : int(second)] = 7  # another first document, though labels stay
    only = {name: values[row : row + 1] for name, values in batch.items()}
    other = {name: values[row : row + 1] for name, values in changed.items()}
    labels = only["labels"].clone()
    labels[0, : int(second)] = -100
    assert task.loss(model, only | {"labels": labels})[0] == task.loss(model, other | {"labels": labels})[0]
    assert task.loss(model, only)[0] != task.loss(model, other)[0]
    with torch.no_grad():
        assert len(task.show(model, only)) == 1


@pytest.mark.parametrize(
    ("architecture", "options", "words"),
    [
        ("lstm", {"hidden_size": 16}, r"LstmForCausalLM carries a state over the whole row"),
        ("mamba2", MAMBA2, r"Mamba2ForCausalLM carries a state"),
        ("bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2}, r"BloomForCausalLM takes no positions"),
    ],
)
def test_networks_that_cannot_are_refused(text: Path, architecture: str, options: dict[str, Any], words: str) -> None:
    task = task_of(text, architecture=architecture, model=options, attention="document")
    with pytest.raises(ConfigError, match=words):
        task.build_model()
    task_of(text, architecture=architecture, model=options).build_model()


def test_a_network_that_only_says_so_is_found_out(text: Path) -> None:
    model = built(task_of(text))
    documents.require(model)

    class Deaf(nn.Module):
        config = model.config

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> Any:
            return self.inner(input_ids=input_ids, use_cache=use_cache)

    with pytest.raises(ConfigError, match="lets documents in a row see each other"):
        documents.require(Deaf())


def test_rows_without_documents_are_named(tmp_path: Path) -> None:
    from pipeline.errors import DataError
    from tests import small_data

    folder = small_data.rows(tmp_path / "rows", length=LENGTH)
    task = task_of(folder, attention="document")
    with open_dataset(folder) as dataset, pytest.raises(DataError, match="does not say where documents begin"):
        task.prepare(dataset.sample(0), None)
