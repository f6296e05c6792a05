"""The text of a first configuration: every choice with its reason beside it."""

from __future__ import annotations

import shlex
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.starter.folder import NOTHING, Found
from pipeline.whole_file import put
from pipeline.yaml_file import scalar

COLUMN = 31  # where comments begin


def write(found: Found, path: Path, name: str) -> None:
    """Write the YAML. Raises ConfigError when there is something at its place, or nothing can be written there."""
    shown = {"name": scalar(name), "file": shlex.quote(str(path))}
    text = (HEADER + TASKS[found.task] + REST).format(**shown, **found.choices)
    lines = text.splitlines(keepends=True)
    if found.choices["test"] == NOTHING:
        lines = [line for line in lines if not line.startswith("evaluate:")]
    refuse_existing(path)
    try:
        put(path, [_aligned(line).encode() for line in lines])
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; name another file by --out") from error


def refuse_existing(path: Path) -> None:
    """Raises ConfigError when there is something at this place."""
    if path.exists():
        raise ConfigError(f"{path} is there already, and is not written over; give another by --out")


def _aligned(line: str) -> str:
    """The comment behind a value at its column."""
    value, mark, comment = line.partition("  # ")
    return f"{value.rstrip():<{COLUMN - 1}} # {comment.lstrip()}" if mark and value.strip() else line


HEADER = """\
# A first run on this data: a small network, to see that all of it works. `millstream doctor {file}` says what would
# fail; `millstream train {file}` trains, and the same command again goes on.

name: {name}
seed: 0                        # fixes the first weights, the order of samples, and augmentation
steps: {steps}                     # {epochs} epochs
global_batch_size: {batch}          # samples per step, whatever the number of workers
micro_batch_size: {micro}           # of which so many go through the network at once; lower it when memory is short

data:
  train: {train}
  evaluate: {test}

"""
TASKS = {
    "image_classification": """\
task:
  name: image_classification
  classes: {classes}
  channels: {channels}                  # 3: colour, 1: grey; pictures are turned into it
  image_size: {size}               # pixels; pictures are cut square and resized
  architecture: resnet         # any of transformers' image classifiers; vit, convnextv2 ...
  model: {{layer_type: basic, embedding_size: 32, hidden_sizes: [32, 64, 128], depths: [1, 1, 1]}}
  # pretrained: FOLDER         # instead of architecture and model: fine-tune a network that is there
  random_resized_crop: 0.6     # augmentation: at least this share of the picture
  flip: {flip}                 # mirrored pictures; not for letters and digits

evaluate: {{every: {every}, best: test/accuracy}}

optim:
  name: adamw
  lr: 2e-3
  weight_decay: 0.05
  schedule: {{name: cosine, warmup: {warmup}}}
""",
    "audio_classification": """\
task:
  name: audio_classification
  classes: {classes}
  rate: {rate}                  # samples a second, of every clip
  seconds: {seconds}                 # longer clips are cut
  model: {{cell: gru, width: 64, layers: 2}}
  masks: {{bands: 1, frames: 1}} # augmentation: hidden bands of frequencies and of time

evaluate: {{every: {every}, best: test/accuracy}}

optim:
  name: adamw
  lr: 2e-3
  weight_decay: 0.05
  schedule: {{name: cosine, warmup: {warmup}}}
""",
    "language_modeling": """\
task:
  name: language_modeling
  tokenizer: {tokenizer}
  length: {length}                  # tokens of a row, as packed
  architecture: llama          # any of transformers' causal language models; gpt2, qwen3 ...
  model:
    hidden_size: 128
    intermediate_size: 384
    num_hidden_layers: 4
    num_attention_heads: 4
    tie_word_embeddings: true
  # pretrained: FOLDER         # instead of architecture and model; pack the text with that network's tokenizer

evaluate: {{every: {every}, best: test/bits_per_byte, mode: min}}

optim:
  name: adamw
  lr: 1e-3
  betas: [0.9, 0.95]
  weight_decay: 0.1
  schedule: {{name: cosine, warmup: {warmup}}}
""",
}
REST = """
zero: {{stage: 1}}               # 0: nothing is shared among workers, 1: optimizer, 2: gradients too, 3: weights too
precision: {{dtype: fp32}}       # bf16 on GPUs, and on processors that multiply it

checkpoint: {{every: {every}, keep: 2}}

track: {{wandb: auto}}           # Weights & Biases, when there is a key; the page of `millstream report` needs none

cluster:
  workers: 1                   # processes, each with a GPU where there is one
  threads_per_worker: 1
"""
