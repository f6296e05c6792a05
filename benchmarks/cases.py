"""The two runs that are measured and checked: a ResNet on JPEG images, a Llama on packed tokens; toy, small and large.

    write(folder, "convnet", "small") -> raw files -> the project's own packer -> shards and a configuration beside them

The images are drawn at random and the text is that of a few packages of Python's own library, so nothing is fetched.
What it gives up: the data set fits into the page cache, so a slow disk is not measured.
"""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pipeline.data.pack import pack_images, pack_text
from pipeline.data.text import Text
from pipeline.data.writer import Packing

CASES = ("convnet", "language")
SIZES = ("toy", "small", "large")
CLASSES = 8
QUALITY = 90  # of the JPEGs
PACKAGES = {
    "toy": ("json",),
    "small": ("asyncio", "email"),
    "large": ("asyncio", "email", "unittest", "multiprocessing"),
}

# By size: what a person would call tiny, small for a CPU (a step of some 100 ms), and small for a GPU.
CONVNETS: dict[str, dict[str, Any]] = {
    "toy": {
        "images": 48,
        "image_size": 16,
        "model": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "batch": (16, 4),
    },
    "small": {
        "images": 640,
        "image_size": 64,
        "model": {
            "embedding_size": 32,
            "hidden_sizes": [32, 64, 128, 256],
            "depths": [2, 2, 2, 2],
            "layer_type": "basic",
        },
        "batch": (32, 16),
    },
    "large": {"images": 2560, "image_size": 224, "model": {"layer_type": "bottleneck"}, "batch": (128, 64)},
}
LANGUAGES: dict[str, dict[str, Any]] = {
    "toy": {
        "length": 32,
        "vocab_size": 512,
        "model": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        "batch": (16, 4),
    },
    "small": {
        "length": 128,
        "vocab_size": 2048,
        "model": {
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        "batch": (16, 8),
    },
    "large": {
        "length": 1024,
        "vocab_size": 8192,
        "model": {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
        },
        "batch": (32, 16),
    },
}


def write(folder: Path, case: str, size: str, **changes: Any) -> Path:
    """Pack the data of `case` below `folder`; returns its configuration's path. `changes` replace top-level keys."""
    settings = (CONVNETS if case == "convnet" else LANGUAGES)[size]
    data = folder / f"{case}-data"
    task = _images(folder, data, settings) if case == "convnet" else _text(folder, data, settings, PACKAGES[size])
    global_batch, micro_batch = settings["batch"]
    values: dict[str, Any] = {
        "name": case,
        "steps": 10,
        "global_batch_size": global_batch,
        "micro_batch_size": micro_batch,
        "runs": str(folder / "runs"),
        "data": {"train": str(data / "train")},
        "task": task,
        "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1, "schedule": {"warmup": 2}},
        "checkpoint": {"every": 1_000_000},
        "track": {"wandb": "off"},
    }
    path = folder / f"{case}.yaml"
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return path


def _images(folder: Path, data: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Smooth noise with a tint per class, as JPEGs in class folders, packed: the `task` section for them."""
    rng, raw, size = np.random.default_rng(0), folder / "images", settings["image_size"]
    for number in range(settings["images"]):
        label = number % CLASSES
        coarse = rng.integers(0, 160, (size // 8, size // 8, 3), dtype=np.uint8)
        coarse[:, :, label % 3] += np.uint8(10 * label)
        image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        path = raw / f"class-{label}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=QUALITY)
    pack_images(raw, data, Packing())
    shutil.rmtree(raw)
    return {
        "name": "image_classification",
        "classes": CLASSES,
        "image_size": size,
        "architecture": "resnet",
        "model": settings["model"],
        "crop": max(1, size // 16),
        "flip": True,
    }


def _text(folder: Path, data: Path, settings: dict[str, Any], packages: tuple[str, ...]) -> dict[str, Any]:
    """Source text of some packages of Python's library, packed into rows of tokens: the `task` section for them."""
    raw = folder / "text"
    for package in packages:
        shutil.copytree(
            Path(sysconfig.get_path("stdlib")) / package, raw / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    text = Text(length=settings["length"], vocab_size=settings["vocab_size"], patterns=("*.py",))
    pack_text(raw, data, Packing(), text)
    shutil.rmtree(raw)
    return {
        "name": "language_modeling",
        "tokenizer": str(data / "train" / "tokenizer.json"),
        "length": settings["length"],
        "architecture": "llama",
        "model": settings["model"],
    }
