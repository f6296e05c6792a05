"""The page about fine-tuning on chats: its files and its commands, as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.run import Run

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "configs/chats.md").read_text()
ANSWER = "A part of the order."


def block(kind: str) -> str:
    [text] = re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return text


def save_base(folder: Path) -> None:
    """A small Llama that was never trained, and a tokenizer without a template."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    own.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet, end = pre_tokenizers.ByteLevel.alphabet(), "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[end], initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    own.train_from_iterator([block("json")], trainer)
    PreTrainedTokenizerFast(tokenizer_object=own, eos_token=end, bos_token=end).save_pretrained(folder)
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=own.get_vocab_size(), **sizes)).save_pretrained(folder)


@pytest.mark.slow
def test_the_example_learns_to_answer(tmp_path: Path) -> None:
    save_base(tmp_path / "exported/base")
    (tmp_path / "chats.jsonl").write_text(block("json") * 40)
    (tmp_path / "chat.jinja").write_text(block("jinja"))
    # What was never trained learns too little at the rate of the page, which is for what was.
    (tmp_path / "chats.yaml").write_text(block("yaml").replace("lr: 3e-4", "lr: 1e-2"))
    script = f'set -e\nmillstream() {{ "{sys.executable}" -m pipeline "$@"; }}\n{block("bash")}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "WANDB_MODE": "disabled"}
    ran = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    scores = [each["metrics"] for each in Run(tmp_path / "runs/chats").records() if each["kind"] == "evaluation"]
    assert len(scores) == 2 and scores[-1]["eval/test/loss"] < 0.1
    assert ANSWER in PAGE and ANSWER in ran.stdout.splitlines()  # and nothing behind it: that it ends is learnt too
    told = AutoTokenizer.from_pretrained(tmp_path / "exported/chats")
    text = told.apply_chat_template([{"role": "user", "content": "Who?"}], tokenize=False, add_generation_prompt=True)
    assert text == "user\nWho?<|endoftext|>assistant\n"
