"""Packed text is the text: every token predicted once, documents on one side only, the numbers beside it true."""

from __future__ import annotations

import json
import lzma
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pipeline.data.pack import text as text_module
from pipeline.data.pack.pack import pack
from pipeline.data.pack.text import Text, pack_text
from pipeline.data.pack.tokenizer import load_tokenizer
from pipeline.data.pack.writer import Packing
from pipeline.data.reader import open_dataset
from pipeline.errors import DataError

WORDS = ("def", "return", "value", "the", "naïve", "數據", "x = 1\n", "    if", "<|endoftext|>", "\r\n", "\t")


def document(i: int) -> str:
    chosen = np.random.default_rng(i).integers(0, len(WORDS), 40 + 5 * i)
    return " ".join(WORDS[j] for j in chosen) + "\n"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """20 documents in files and folders, an empty one, hidden ones and one of another kind."""
    source = tmp_path / "corpus"
    (source / "deep" / "deeper").mkdir(parents=True)
    (source / ".git").mkdir()
    for i in range(20):
        folder = source / "deep" / "deeper" if i % 3 else source
        (folder / f"{i:02d}.{'py' if i % 2 else 'txt'}").write_bytes(document(i).encode())
    (source / "empty.txt").touch()
    (source / ".git" / "a.txt").write_text("hidden")
    (source / "picture.gif").write_bytes(b"GIF89a")
    return source


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "text.json").read_text())


def stream(folder: Path) -> tuple[np.ndarray, list[int]]:
    """The tokens of a split put together again, and where documents begin; checks that rows overlap by one token."""
    length = facts(folder)["length"]
    with open_dataset(folder) as dataset:
        samples = sorted((dataset.sample(i) for i in range(len(dataset))), key=lambda sample: sample.key)
        assert [int(sample.key) for sample in samples] == list(range(len(samples)))
        rows = [np.array(sample["npy"]) for sample in samples]
        starts = {int(i * length + start) for i, sample in enumerate(samples) for start in sample["starts.npy"]}
        assert all(sample["starts.npy"].dtype == np.uint32 for sample in samples)
    assert all(len(row) == length + 1 for row in rows[:-1]) and 2 <= len(rows[-1]) <= length + 1
    assert all(row[-1] == following[0] for row, following in pairwise(rows))
    return np.concatenate([rows[0][:1], *(row[1:] for row in rows)]), sorted(starts)


def documents(folder: Path) -> list[str]:
    """The documents of a split, from its tokens."""
    tokens, starts = stream(folder)
    tokenizer = load_tokenizer(folder)
    assert (tokens[starts] == facts(folder)["eot_id"]).all() and starts[0] == 0
    parts = np.split(tokens, starts[1:])
    return [tokenizer.decode(part[1:].tolist(), skip_special_tokens=False) for part in parts]


def test_every_document_is_there_once_and_whole(corpus: Path, tmp_path: Path) -> None:
    packed = pack(corpus, tmp_path / "out", Packing(holdout=0.25), text=Text(length=32, vocab_size=300))
    paths = sorted(path.relative_to(corpus).as_posix() for path in corpus.rglob("[0-9]*.*"))
    given = {(corpus / path).read_bytes().decode() for path in paths}
    train, test = (documents(tmp_path / "out" / split) for split in ("train", "test"))
    assert (len(train), len(test)) == (15, 5)
    assert set(train) | set(test) == given
    for split, texts in (("train", train), ("test", test)):
        folder = tmp_path / "out" / split
        tokens, _ = stream(folder)
        known = facts(folder)
        assert tokens.dtype == np.uint16
        assert known["tokens"] == len(tokens)
        assert known["bytes"] == sum(len(text.encode()) for text in texts)
        assert known["rows"] == packed.samples[split] == -(-(len(tokens) - 1) // 32)
        assert (known["documents"], known["files"], known["lossless"]) == (len(texts), len(texts), True)
        assert known["vocab_size"] == load_tokenizer(folder).get_vocab_size() == 300
    # in the order of their paths, which is what xz saw
    assert test == [text for path in paths if (text := (corpus / path).read_bytes().decode()) in test]
    assert facts(tmp_path / "out/test")["xz_bytes"] == len(lzma.compress("".join(test).encode(), preset=9))
    assert facts(tmp_path / "out/train")["xz_bytes"] is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test", "train"]  # no scratch file


def test_packing_twice_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        pack_text(corpus, tmp_path / name, Packing(holdout=3), Text(length=16, vocab_size=280))
    a, b = ({p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in "ab")
    assert a == b and len(a) > 20


@pytest.mark.parametrize("stage", ["train tokenizer", "tokenize", "write train", "write test"])
def test_a_stopped_packing_goes_on(corpus: Path, tmp_path: Path, stage: str) -> None:
    options = Packing(holdout=3), Text(length=16, vocab_size=280)
    pack_text(corpus, tmp_path / "whole", *options)
    stages: list[str] = []

    def interrupt(at: str, done: int, total: int) -> None:
        if at == stage and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_text(corpus, tmp_path / "out", *options, progress=interrupt)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.packing").exists()
    pack_text(corpus, tmp_path / "out", *options, progress=lambda at, done, total: stages.append(at))
    assert ("train tokenizer" in stages) is (stage == "train tokenizer")
    assert ("tokenize" in stages) is (stage != "write test")  # else the tokens of test are missing still
    out, whole = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*.*")} for f in (tmp_path / "out", tmp_path / "whole")
    )
    assert out == whole and not (tmp_path / ".out.packing").exists()


def test_the_tokenizer_sees_nothing_held_out(corpus: Path, tmp_path: Path) -> None:
    options = Packing(holdout=0.25), Text(length=32, vocab_size=300)
    pack_text(corpus, tmp_path / "before", *options)
    held = set(documents(tmp_path / "before" / "test"))
    for path in corpus.rglob("[0-9]*.*"):
        if path.read_bytes().decode() in held:
            path.write_text("zzzz qqqq " * 500)
    pack_text(corpus, tmp_path / "after", *options)
    before, after = ((tmp_path / name / "train" / "tokenizer.json").read_bytes() for name in ("before", "after"))
    assert before == after
    assert set(documents(tmp_path / "after" / "test")) == {"zzzz qqqq " * 500}


def test_long_documents_are_cut_into_pieces_and_come_back_whole(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(text_module, "GROUP_CHARACTERS", 120)
    (corpus / "one line.txt").write_text("word " * 100)
    pack_text(corpus, tmp_path / "out", Packing(), Text(length=32, vocab_size=300))
    assert sorted(documents(tmp_path / "out/train")) == sorted([*map(document, range(20)), "word " * 100])


def test_lines_of_json_are_documents(tmp_path: Path) -> None:
    texts = [document(i) for i in range(8)]
    lines = [json.dumps({"id": i, "body": text}) for i, text in enumerate([*texts, ""])]
    source = tmp_path / "a.jsonl"
    source.write_text("\n\n".join(lines) + "\n")
    pack_text(source, tmp_path / "out", Packing(holdout=2), Text(length=16, vocab_size=270, field="body"))
    train, test = (documents(tmp_path / "out" / split) for split in ("train", "test"))
    assert len(test) == 2 and sorted(train + test) == sorted(texts)
    assert facts(tmp_path / "out/train")["files"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "line 2: no JSON object with a field 'text' .JSONDecodeError"),
        (b'{"body": "a"}', "line 2: no JSON object with a field 'text' but with 'body': .*--kind table"),
        (b'{"messages": []}', "line 2: no JSON object with a field 'text' but one with 'messages': .*--kind chats"),
        (b"[1]", "line 2: no JSON object"),
        (b'{"text": 5}', "line 2: field 'text' is int, not text"),
        (b'{"text": "\xff"}', "line 2: no JSON object with a field 'text' .UnicodeDecodeError"),
    ],
)
def test_a_bad_line_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"a\.jsonl, {message}"):
        pack_text(tmp_path / "a.jsonl", tmp_path / "out", Packing(), Text())
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_bytes_that_are_not_utf8_and_twins_are_said(corpus: Path, tmp_path: Path) -> None:
    (corpus / "latin.txt").write_bytes("caf\xe9 au lait ".encode("latin-1") * 10)
    (corpus / "honest.txt").write_text("a replacement mark \ufffd of its own")
    for i in range(12):
        (corpus / f"twin{i}.md").write_text("the same text in many files\n" * 5)
    packed = pack_text(corpus, tmp_path / "out", Packing(holdout=0.5), Text(length=16, vocab_size=300))
    texts = documents(tmp_path / "out/train") + documents(tmp_path / "out/test")
    assert "caf\ufffd au lait " * 10 in texts and len(texts) == 34
    twins = documents(tmp_path / "out/test").count("the same text in many files\n" * 5)
    assert packed.warnings == (
        "1 documents hold bytes that are not UTF-8; replacement marks stand for them",
        f"{twins} of the 17 held-out documents are also, byte for byte, among the training documents",
    )


def trained(texts: list[str], **parts: Any) -> Tokenizer:
    """A tokenizer as others ship it: with an end-of-text of its own, with truncation, padding and a post-processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # type: ignore[assignment]
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    return tokenizer


def test_a_tokenizer_of_others(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pretrained"
    folder.mkdir()
    trained([document(1)]).save(str(folder / "tokenizer.json"))
    for name, option in (("file", folder / "tokenizer.json"), ("folder", folder)):
        packed = pack_text(corpus, tmp_path / name, Packing(), Text(length=32, tokenizer=option))
        assert sorted(documents(tmp_path / name / "train")) == sorted(map(document, range(20)))
        assert facts(tmp_path / name / "train")["eot_id"] == 1 and not packed.warnings
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<pad>"}}))
    pack_text(corpus, tmp_path / "own", Packing(), Text(length=32, tokenizer=folder))
    assert facts(tmp_path / "own" / "train")["eot_id"] == 0
    pack_text(corpus, tmp_path / "asked", Packing(), Text(length=32, tokenizer=folder, end_of_text="</s>"))
    assert facts(tmp_path / "asked" / "train")["eot_id"] == 1
    with pytest.raises(DataError, match=r"no end-of-text token \(<stop>\); name one it has"):
        pack_text(corpus, tmp_path / "none", Packing(), Text(tokenizer=folder, end_of_text="<stop>"))


def test_a_tokenizer_that_loses_something_is_said(corpus: Path, tmp_path: Path) -> None:
    trained([document(1)], normalizer=normalizers.Lowercase()).save(str(tmp_path / "tokenizer.json"))
    (corpus / "00.txt").write_text("Capital Letters")
    packed = pack_text(corpus, tmp_path / "out", Packing(), Text(length=32, tokenizer=tmp_path / "tokenizer.json"))
    assert len(packed.warnings) == 1 and "does not give the text back unchanged" in packed.warnings[0]
    assert facts(tmp_path / "out/train")["lossless"] is False


def test_large_vocabularies_need_four_bytes(tmp_path: Path) -> None:
    names = [f"<{i}>" for i in range(70_000)]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate([*names, "</s>"])}, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = tmp_path / "a.txt"
    source.write_text("<69999> <7> <65536>")
    pack_text(source, tmp_path / "out", Packing(), Text(length=2, tokenizer=tmp_path / "tokenizer.json"))
    tokens, starts = stream(tmp_path / "out/train")
    assert tokens.dtype == np.uint32 and tokens.tolist() == [70_000, 69_999, 7, 65_536] and starts == [0]


def test_what_is_left_out(corpus: Path, tmp_path: Path) -> None:
    options = Text(length=16, vocab_size=260, patterns=("*.py",), exclude=("deeper",))
    pack_text(corpus, tmp_path / "out", Packing(), options)
    wanted = [document(i) for i in range(20) if i % 2 and not i % 3]
    assert sorted(documents(tmp_path / "out/train")) == sorted(wanted)


@pytest.mark.parametrize(
    ("holdout", "text", "message"),
    [
        (0, Text(patterns=("*.rst",)), r"no text in .*: 0 files match \*.rst"),
        (0, Text(patterns=("empty*",)), "1 files match .* all empty"),
        (0, Text(vocab_size=256), "a vocabulary of 256 cannot hold"),
        (0, Text(length=0), "rows of 0 tokens"),
        (20, Text(), "leaves none to train on"),
        (0.1, Text(patterns=("00.txt",)), "is one document, none can be held out"),
        (0, Text(tokenizer=Path("nowhere")), "no tokenizer at nowhere"),
    ],
)
def test_text_that_cannot_be_packed(holdout: float, text: Text, message: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        pack_text(corpus, tmp_path / "out", Packing(holdout=holdout), text)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
