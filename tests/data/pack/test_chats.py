"""Chats as rows: only answers are learnt, by a hand-made example; every chat whole and once; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.data.pack.chats import Chats, fit, pack_chats
from pipeline.data.pack.pack import pack
from pipeline.data.pack.template import Template, read_template
from pipeline.data.pack.writer import Packing
from pipeline.data.preview import preview
from pipeline.data.reader import open_dataset
from pipeline.data.token_rows import IGNORED, TokenRows
from pipeline.data.vocabulary import read_vocabulary
from pipeline.errors import DataError

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
PLAIN = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|{{ message.role }}|>{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}<|end|>{% endgeneration %}{% else %}{{ message.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "naïve?"},
    {"role": "assistant", "content": "Yes 🙂."},
    {"role": "user", "content": "Why"},
    {"role": "assistant", "content": "Well"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers: bytes and special tokens, with a template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    own.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(
        ["Well, well: yes, why?"] * 9,
        trainers.BpeTrainer(vocab_size=270, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    own.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": PLAIN}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def source_of(folder: Path, *chats: Any) -> Path:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats) + "\n", encoding="utf-8")
    return path


def rows_of(folder: Path) -> list[tuple[list[int], list[int], list[int]]]:
    """(tokens, mask, starts) of every row, in the order of their keys."""
    with open_dataset(folder) as dataset:
        samples = sorted((dataset.sample(i) for i in range(len(dataset))), key=lambda sample: sample.key)
        return [tuple(sample[name].tolist() for name in ("npy", "mask.npy", "starts.npy")) for sample in samples]  # type: ignore[misc]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "marked"])
def test_only_answers_are_learnt(tmp_path: Path, tokenizer: Path, template: str) -> None:
    """The hand-made example: what is to be learnt are the answers, each with its end, and nothing else."""
    (tmp_path / "own.jinja").write_text(template)
    asked = Chats(length=100, tokenizer=tokenizer, template=tmp_path / "own.jinja")
    packed = pack_chats(source_of(tmp_path, CHAT), tmp_path / "out", Packing(), asked)
    assert packed.samples == {"train": 1} and not packed.warnings
    [(tokens, mask, starts)] = rows_of(tmp_path / "out" / "train")
    decode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode
    whole = "<|system|>Be kind.<|end|><|user|>naïve?<|end|><|assistant|>Yes 🙂.<|end|>"
    whole += "<|user|>Why<|end|><|assistant|>Well<|end|>"
    assert decode(tokens, skip_special_tokens=False) == whole and starts == [0]
    learnt = [token for token, wanted in zip(tokens, mask, strict=True) if wanted]
    assert decode(learnt, skip_special_tokens=False) == "Yes 🙂.<|end|>Well<|end|>"
    facts = json.loads((tmp_path / "out" / "train" / "text.json").read_text())
    assert facts["learnt_bytes"] == len("Yes 🙂.Well".encode()) and facts["learnt_tokens"] == len(learnt)
    assert "learnt: 'Yes 🙂.<|end|>Well<|end|>'" in preview(tmp_path / "out" / "train")
    assert facts["eot_id"] == 0 and read_template(tmp_path / "out" / "train").text == template


def test_rows_of_chats_as_arrays(tmp_path: Path, tokenizer: Path) -> None:
    pack_chats(source_of(tmp_path, CHAT), tmp_path / "out", Packing(), Chats(length=100, tokenizer=tokenizer))
    file = tmp_path / "out" / "train" / "tokenizer.json"
    vocabulary = read_vocabulary(file)
    assert vocabulary.chats and vocabulary.length == 100 and vocabulary.end_of_text == 0
    with open_dataset(file.parent) as dataset:
        row = TokenRows(file, vocabulary, 100, positions=True).prepare(dataset.sample(0))
    wanted = row["labels"] != IGNORED
    assert 10 < wanted.sum() < (row["tokens"] != 0).sum() - 10 and row["bytes"] == len("Yes 🙂.Well".encode())
    first = int(np.flatnonzero(wanted)[0])
    assert row["tokens"][first] == SPECIAL.index("<|assistant|>"), "the first answer follows from its prompt"


def test_every_chat_lies_whole_in_one_row_and_the_same_each_time(tmp_path: Path, tokenizer: Path) -> None:
    rng = np.random.default_rng(5)
    chats = [
        [{"role": "user", "content": "x" * int(rng.integers(30))}, {"role": "assistant", "content": f"well {number}"}]
        for number in range(200)
    ]
    source = source_of(tmp_path, *chats)
    for name in ("one", "two"):
        packed = pack(
            source, tmp_path / name, Packing(holdout=20), kind="chats", chats=Chats(length=63, tokenizer=tokenizer)
        )
    assert all((tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes() for path in
               ("train/train-000000.tar", "test/text.json"))  # fmt: skip
    decode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode
    found, filled, room = [], 0, 0
    for split in ("train", "test"):
        rows = rows_of(tmp_path / "one" / split)
        assert len(rows) == packed.samples[split]
        for tokens, mask, starts in rows:
            assert len(tokens) == len(mask) <= 64 and mask[0] == 0
            filled, room = filled + len(tokens), room + 64
            found += [decode(part.tolist(), skip_special_tokens=False) for part in np.split(tokens, starts[1:])]
    assert sorted(found) == sorted(f"<|user|>{a['content']}<|end|><|assistant|>{b['content']}<|end|>" for a, b in chats)
    assert filled > 0.9 * room


def test_bins_hold_what_they_can(tmp_path: Path) -> None:
    sizes = np.random.default_rng(1).integers(1, 65, 500)
    bins = fit(sizes, 64)
    assert sorted(item for items in bins for item in items) == list(range(500))
    assert all(sizes[items].sum() <= 64 for items in bins)
    assert len(bins) <= 1.05 * -(-sizes.sum() // 64) + 1
    assert fit(np.array([64, 1, 63, 32, 32]), 64) == [[0], [2, 1], [3, 4]]


def test_what_is_cut_or_left_out_is_told(tmp_path: Path, tokenizer: Path) -> None:
    long = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 99}]
    late = [{"role": "user", "content": "a" * 99}, {"role": "assistant", "content": "b"}]
    only = [{"role": "user", "content": "a"}]
    packed = pack_chats(
        source_of(tmp_path, long, late, only), tmp_path / "out", Packing(), Chats(length=20, tokenizer=tokenizer)
    )
    assert packed.samples == {"train": 1} and len(rows_of(tmp_path / "out" / "train")[0][0]) == 21
    told = " ".join(packed.warnings)
    assert "2 chats are longer than 21 tokens and were cut" in told and "2 chats have no answer within a row" in told


def test_a_tokenizer_without_a_template_says_what_to_do(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    source = source_of(tmp_path, CHAT)
    with pytest.raises(DataError, match=r"bare has no chat template .*--template FILE"):
        pack_chats(source, tmp_path / "out", Packing(), Chats(tokenizer=tmp_path / "bare"))
    with pytest.raises(DataError, match=r"need the tokenizer of the network"):
        pack_chats(source, tmp_path / "out", Packing(), Chats())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages | length }}" + PLAIN, r"chats.jsonl:1: .*another way than the beginning .*generation"),
        ("{{ raise_exception('no system') }}", r"chats.jsonl:1: its chat template refuses it: no system"),
        ("{% for %}", r"its chat template refuses it: "),
    ],
)
def test_templates_that_cannot_serve_are_refused(tmp_path: Path, tokenizer: Path, template: str, words: str) -> None:
    (tmp_path / "own.jinja").write_text(template)
    with pytest.raises(DataError, match=words):
        asked = Chats(tokenizer=tokenizer, template=tmp_path / "own.jinja")
        pack_chats(source_of(tmp_path, CHAT), tmp_path / "out", Packing(), asked)


@pytest.mark.parametrize(
    "line", ["[]", "{}", '{"messages": []}', '{"messages": [{"role": "user"}]}', '{"messages": "hello"}', "{broken"]
)
def test_a_line_that_is_no_chat_is_named(tmp_path: Path, tokenizer: Path, line: str) -> None:
    path = source_of(tmp_path, CHAT)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"chats.jsonl, line 3: .*`messages` of \{role, content\}"):
        pack_chats(path, tmp_path / "out", Packing(), Chats(tokenizer=tokenizer))


def test_a_template_writes_the_prompt_of_an_answer(tokenizer: Path) -> None:
    template = read_template(tokenizer / "tokenizer.json")
    assert isinstance(template, Template) and template.tokens == {"eos_token": "<|end|>"}
    assert template.render(CHAT[1:2], prompt=True) == "<|user|>naïve?<|end|><|assistant|>"
