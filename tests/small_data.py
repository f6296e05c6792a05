"""Data sets and configurations small enough to train in seconds: coloured squares to classify, counting sequences to
continue, tones to tell apart.
"""

from __future__ import annotations

import io
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pipeline.data import index


def images(folder: Path, count: int = 96, classes: int = 4, size: int = 12, shards: int = 3) -> Path:
    """PNG images [size, size] grey, one bright quarter per class, plus noise; `count` samples in uneven shards."""
    rng = np.random.default_rng(7)
    samples = []
    for number in range(count):
        label = int(rng.integers(classes))
        pixels = rng.integers(0, 120, (size, size), dtype=np.uint8)
        row, column = divmod(label, 2)
        half = size // 2
        pixels[row * half : (row + 1) * half, column * half : (column + 1) * half] += 100
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "png")
        samples.append((f"{number:05d}", {"png": png.getvalue(), "cls": str(label).encode()}))
    return _write(folder, samples, shards)


def rows(folder: Path, count: int = 96, length: int = 16, vocabulary: int = 257, shards: int = 3) -> Path:
    """Token rows uint16 [length + 1] that count upwards; every fifth is shorter (a ragged batch). With a tokenizer of
    bytes.
    """
    rng = np.random.default_rng(8)
    samples = []
    for number in range(count):
        tokens = length + 1 if number % 5 else int(rng.integers(2, length))
        row = (rng.integers(vocabulary) + np.arange(tokens) * rng.integers(1, 4)) % vocabulary
        npy = io.BytesIO()
        np.save(npy, row.astype(np.uint16))
        samples.append((f"{number:05d}", {"npy": npy.getvalue()}))
    _write(folder, samples, shards)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def sounds(folder: Path, count: int = 48, classes: int = 3, rate: int = 8000, shards: int = 3) -> Path:
    """Tones of 0.1 to 0.4 seconds, higher by class, in noise; wav and flac by turns."""
    rng = np.random.default_rng(9)
    samples = []
    for number in range(count):
        label = int(rng.integers(classes))
        time = np.arange(int(rng.integers(rate // 10, rate * 4 // 10))) / rate
        wave = 0.3 * np.sin(2 * np.pi * 400 * 2**label * time) + rng.normal(0, 0.05, len(time))
        extension, file = ("wav", "flac")[number % 2], io.BytesIO()
        soundfile.write(file, wave, rate, format=extension.upper(), subtype="PCM_16")
        samples.append((f"{number:05d}", {extension: file.getvalue(), "cls": str(label).encode()}))
    return _write(folder, samples, shards)


def _write(folder: Path, samples: list[tuple[str, dict[str, bytes]]], shards: int) -> Path:
    folder.mkdir(parents=True)
    edges = [len(samples) * i * i // shards**2 for i in range(shards + 1)]  # uneven on purpose
    for number, (begin, end) in enumerate(pairwise(edges)):
        with tarfile.open(folder / f"shard-{number:03d}.tar", "w") as tar:
            for key, fields in samples[begin:end]:
                for extension, data in fields.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    index.build(folder)
    return folder


def config(path: Path, task: dict[str, Any], train: Path, **changes: Any) -> Path:
    """Write a complete toy configuration to `path`; `changes` replace whole sections or top-level values."""
    values: dict[str, Any] = {
        "name": "toy",
        "steps": 20,
        "global_batch_size": 16,
        "micro_batch_size": 4,
        "runs": str(path.parent / "runs"),
        "data": {"train": str(train)},
        "task": task,
        "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1, "schedule": {"warmup": 4}},
        "zero": {"stage": 1},
        "checkpoint": {"every": 5},
        "track": {"wandb": "off"},
        "cluster": {"workers": 2, "restarts": 8},
    }
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return path
