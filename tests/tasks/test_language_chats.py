"""Fine-tuning on chats, from the lines to the answers: only they are learnt, and a prompt gets its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from pipeline.data.pack.chats import Chats, pack_chats
from pipeline.data.pack.writer import Packing
from tests.data.pack.test_chats import source_of, tokenizer
from tests.tasks.test_language_modeling import LLAMA, batch_of, built, task_of

__all__ = ["tokenizer"]  # a fixture of every test here

ANSWERS = {"one": "Yes 🙂.", "two": "naïve", "three": "well: why?"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """Three chats in one row."""
    folder = tmp_path_factory.mktemp("chats")
    chats = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        for asked, answer in ANSWERS.items()
    ]
    pack_chats(source_of(folder, *chats), folder / "packed", Packing(), Chats(length=80, tokenizer=tokenizer))
    return folder / "packed" / "train"


def test_each_prompt_gets_its_answer_once_it_is_learnt(rows: Path, tmp_path: Path) -> None:
    """With chats of a row kept apart, so that an answer follows from its own prompt."""
    task = task_of(rows, length=80, attention="document", model=LLAMA | {"hidden_size": 32})
    model, batch = built(task), batch_of(task, rows)
    assert len(batch["tokens"]) == 1 and task.weight(batch) == sum(int(x != -100) for x in batch["labels"][0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        loss, sums = task.loss(model, batch)
        optimizer.zero_grad()
        (loss / task.weight(batch)).backward()
        optimizer.step()
    assert float(sums["loss"][0]) < 0.02 * task.weight(batch)
    with torch.no_grad():
        told = task.sample(model.eval(), list(ANSWERS), 2, torch.Generator(), {"tokens": "20", "temperature": "0"})
        assert [row["text"] for row in told] == [answer for answer in ANSWERS.values() for _ in range(2)]
        plain = task.sample(model, ["one"], 1, torch.Generator(), {"tokens": "3", "temperature": "0", "chat": "false"})
    assert str(plain[0]["text"]).startswith("one")
    (tmp_path / "out").mkdir()
    task.write_settings(tmp_path / "out")
    opened = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = opened.apply_chat_template([{"role": "user", "content": "one"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>one<|end|><|assistant|>" and opened.eos_token == "<|end|>"


def test_labels_stand_where_answers_do(rows: Path) -> None:
    batch = batch_of(task_of(rows, length=80), rows)
    learnt = (batch["labels"][0] != -100).long()
    assert int(learnt[0]) == 0 and int(learnt.diff().eq(1).sum()) == len(ANSWERS)
    assert int(batch["bytes"].sum()) == sum(len(answer.encode()) for answer in ANSWERS.values())
