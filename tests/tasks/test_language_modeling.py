"""Language modeling against plain PyTorch: losses, exact bytes, short rows, tokenizers, pretrained, messages."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer

from pipeline import initial
from pipeline.data.pack.text import Text, pack_text
from pipeline.data.pack.writer import Packing
from pipeline.data.reader import open_dataset
from pipeline.data.token_rows import IGNORED
from pipeline.data.vocabulary import read_vocabulary
from pipeline.errors import ConfigError, DataError
from pipeline.session import World
from pipeline.tasks import Batch
from pipeline.tasks.language_modeling import Config, Task

LENGTH = 16
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2}
DOCUMENTS = ("def f(x):\n    return x + 1\n" * 10, "naïve Wörter, 日本語, 🙂\n\n", "<|endoftext|> is text here")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packed rows with tokenizer.json and text.json."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "source").mkdir()
    for number, document in enumerate(DOCUMENTS):
        (folder / "source" / f"{number}.txt").write_text(document, encoding="utf-8")
    pack_text(folder / "source", folder / "packed", Packing(min_shards=1), Text(length=LENGTH, vocab_size=300))
    return folder / "packed" / "train"


def task_of(folder: Path, **changes: Any) -> Task:
    values = {"tokenizer": folder / "tokenizer.json", "length": LENGTH, "architecture": "llama", "model": LLAMA}
    return Task(Config.model_validate(values | changes))


def built(task: Task, seed: int = 0) -> nn.Module:
    """With its first weights, as one rank has them."""
    torch.manual_seed(seed)
    model = task.build_model()
    initial.fill(model, World(0, 1, 0, torch.device("cpu"), None), task.weights, None, torch.float32)  # type: ignore[arg-type]
    return model


def batch_of(task: Task, folder: Path, numbers: list[int] | None = None) -> Batch:
    """The samples with these numbers (default: all) as one micro batch."""
    with open_dataset(folder) as dataset:
        wanted = range(len(dataset)) if numbers is None else numbers
        rows = [task.prepare(dataset.sample(number), None) for number in wanted]
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def test_bytes_of_all_rows_are_exactly_those_of_the_text(text: Path) -> None:
    batch = batch_of(task_of(text), text)
    true = sum(len(document.encode()) for document in DOCUMENTS)
    assert int(batch["bytes"].sum()) == true == json.loads((text / "text.json").read_text())["bytes"]
    # every token but the first of the stream is a target once
    assert int((batch["labels"] != IGNORED).sum()) == json.loads((text / "text.json").read_text())["tokens"] - 1


def test_loss_equals_plain_pytorch_and_bits_follow_from_nats(text: Path) -> None:
    task = task_of(text)
    model, batch = built(task), batch_of(task, text)
    loss, sums = task.loss(model, batch)
    targets = batch["labels"] != IGNORED
    with torch.no_grad():
        shares = model(input_ids=batch["tokens"]).logits.double().log_softmax(-1)
    nats = -shares.gather(2, batch["labels"].clamp(min=0)[..., None])[..., 0][targets].sum()
    torch.testing.assert_close(loss.detach().double(), nats, rtol=1e-6, atol=0)
    assert loss.dtype == torch.float32 and task.weight(batch) == int(targets.sum()) == int(sums["loss"][1])
    bits, size = sums["bits_per_byte"]
    assert float(bits) == pytest.approx(float(nats) / math.log(2)) and int(size) == int(batch["bytes"].sum())
    torch.testing.assert_close(task.score(model, batch)["loss"][0], loss.detach())


def test_what_is_shown_is_greedy_and_takes_as_many_passes_for_any_rows(text: Path) -> None:
    task = task_of(text)
    model, batch, passes = built(task), batch_of(task, text), []
    batch["labels"][1, 3:] = IGNORED  # a short row

    def counted(**inputs: Any) -> Any:
        passes.append(len(inputs["input_ids"]))
        return model(**inputs)

    with torch.no_grad():
        tokenizer, rows = Tokenizer.from_file(str(text / "tokenizer.json")), task.show(counted, batch)
        assert passes == [len(rows)] * 9 == [len(batch["tokens"])] * 9
        for row, tokens, labels in zip(rows, batch["tokens"], batch["labels"]):
            begin = max(1, int((labels != IGNORED).sum()) // 2)
            said = tokens[:begin]
            for _ in range(9):
                said = torch.cat([said, model(input_ids=said[None]).logits[0, -1:].argmax(dim=-1)])
            truth = [label for label in labels[begin - 1 : begin + 8].tolist() if label != IGNORED]
            logits = model(input_ids=tokens[None]).logits[0, begin - 1 : begin - 1 + len(truth)]
            nats = functional.cross_entropy(logits, torch.tensor(truth))
            for name, part in {"context": said[:begin], "continuation": said[begin:], "truth": truth}.items():
                assert row[name] == tokenizer.decode(list(part), skip_special_tokens=False)
            assert row["loss"] == pytest.approx(float(nats), rel=1e-5)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_vocabulary(text: Path) -> None:
    task = task_of(text)
    model, batch = built(task), batch_of(task, text)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    bits, size = task.score(model, batch)["bits_per_byte"]
    terms = json.loads((text / "text.json").read_text())["tokens"] - 1
    assert float(bits / size) == pytest.approx(terms * math.log2(task.vocabulary.size) / float(size))


def test_a_short_row_counts_as_if_it_stood_alone(text: Path) -> None:
    task = task_of(text)
    lengths = (batch_of(task, text)["labels"] != IGNORED).sum(dim=1)
    short = int(lengths.argmin())
    terms = int(lengths[short])
    assert terms < LENGTH  # the packed stream ends within a row
    model, batch = built(task), batch_of(task, text, [short])
    alone = {name: values[:, :terms] for name, values in batch.items() if name != "bytes"} | {"bytes": batch["bytes"]}
    torch.testing.assert_close(task.loss(model, batch)[0], task.loss(model, alone)[0])
    assert task.weight(batch) == terms


def test_there_is_no_dropout_unless_asked_for(text: Path) -> None:
    plain, asked = (
        task_of(text, architecture="gpt2", model=GPT2 | more) for more in ({}, {"resid_pdrop": 0.5})
    )  # fmt: skip
    batch = batch_of(plain, text, [0])
    for task, equal in ((plain, True), (asked, False)):
        model = built(task).train()
        assert torch.equal(task.loss(model, batch)[0], task.loss(model, batch)[0]) is equal


def test_sizes_and_tokens_of_the_network_follow_from_the_text(text: Path) -> None:
    config = built(task_of(text, architecture="gpt2", model=GPT2)).config
    end = json.loads((text / "text.json").read_text())["eot_id"]
    assert (config.vocab_size, config.n_positions) == (task_of(text).vocabulary.size, LENGTH)  # type: ignore[union-attr]
    assert (config.bos_token_id, config.eos_token_id, config.use_cache) == (end, end, False)  # type: ignore[union-attr]
    assert config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    wide = built(task_of(text, model=LLAMA | {"vocab_size": 512}))  # rounded up for speed
    assert wide.config.vocab_size == 512  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": LLAMA | {"vocab_size": 100}}, "vocab_size is 100, but .* has 300 tokens"),
        ({"model": LLAMA | {"max_position_embeddings": 8}}, "8 positions, too few for task.length 16"),
        ({"model": LLAMA | {"hiden_size": 8}}, "hiden_size.*did you mean hidden_size"),
        ({"model": LLAMA | {"num_attention_heads": 3}}, "hidden size .16. is not a multiple"),
        ({"architecture": "lama"}, "did you mean llama"),
        ({"architecture": "resnet"}, "has no 'resnet' for causal language modeling"),
        ({"length": 8}, "packed with length 16, not 8"),
        ({"architecture": None, "model": {}, "pretrained": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_networks_that_do_not_fit_the_text_are_refused(text: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        task_of(text, **changes).build_model()


def test_a_section_that_cannot_be_is_refused_without_torch(text: Path) -> None:
    with pytest.raises(ValidationError, match="either `architecture"):
        task_of(text, pretrained="folder")
    with pytest.raises(DataError, match=r"no file .*tokenizer.json"):
        task_of(text / "nowhere")


def test_a_pretrained_folder_gives_its_weights(text: Path, tmp_path: Path) -> None:
    task = task_of(text)
    model, batch = built(task), batch_of(task, text, [0])
    model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    again = task_of(text, architecture=None, model={}, pretrained=tmp_path / "saved")
    assert torch.equal(again.loss(built(again, seed=9), batch)[0], task.loss(model, batch)[0])

    built(task_of(text, architecture="gpt2", model=GPT2)).transformer.save_pretrained(tmp_path / "other")  # type: ignore[union-attr, operator]
    model.config.save_pretrained(tmp_path / "other")  # type: ignore[union-attr, operator]
    with pytest.raises(ConfigError, match="no weights for"):
        task_of(text, architecture=None, model={}, pretrained=tmp_path / "other").build_model()


def test_a_tokenizer_of_transformers_is_written_as_it_was(text: Path, tmp_path: Path) -> None:
    task_of(text).write_settings(_made(tmp_path / "own"))
    again = task_of(text, tokenizer=tmp_path / "own" / "tokenizer.json")
    (tmp_path / "own" / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    again.write_settings(_made(tmp_path / "copied"))
    kept = {path.name: path.read_bytes() for path in (tmp_path / "own").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "copied").iterdir()} == kept
    opened = AutoTokenizer.from_pretrained(tmp_path / "copied")
    assert opened.eos_token_id == task_of(text).vocabulary.end_of_text and opened.model_max_length == LENGTH


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_tokenizer_that_is_not_byte_level_has_no_bits_per_byte(text: Path, tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({f"word{number}": number for number in range(300)}, unk_token="word0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    words.save(str(tmp_path / "tokenizer.json"))
    task = task_of(tmp_path)
    assert read_vocabulary(tmp_path / "tokenizer.json").byte_lengths is None and task.vocabulary.size == 300
    assert list(task.loss(built(task), batch_of(task, text, [0]))[1]) == ["loss"]


def test_flops_are_those_of_products_and_attention(text: Path) -> None:
    options = LLAMA | {"tie_word_embeddings": True, "vocab_size": 320}
    task = task_of(text, model=options)
    model = built(task)
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    attention = 2 * 2 * LENGTH * LENGTH * 16 * 2  # two products of [T, T, width] in each of two layers
    assert task.flops_per_sample() == 3 * (2 * LENGTH * weights + attention)
