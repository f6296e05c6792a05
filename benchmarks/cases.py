"""The runs that are measured and checked: a ResNet on JPEG images, a Llama on packed tokens; toy, small and large.

What a resume changes is also checked for an LSTM on tones and a U-Net of diffusion on the images; these are toys only.

    write(folder, "convnet", "small") -> raw files -> the project's own packer -> shards and a configuration beside them

Images and sounds are drawn at random and the text is of a few packages of Python's own library: nothing is fetched.
What it gives up: the data set fits into the page cache, so a slow disk is not measured.
"""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml
from PIL import Image

from pipeline.data.pack.pack import pack, pack_images, pack_text
from pipeline.data.pack.text import Text
from pipeline.data.pack.writer import Packing

CASES = ("convnet", "language")
RESUMED = (*CASES, "audio", "diffusion")  # what resume_matrix.py has
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
AUDIO: dict[str, Any] = {"seconds": 0.2, "mels": 20, "stack": 2, "model": {"width": 16, "layers": 2, "dropout": 0.1}}
DIFFUSION: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


def write(folder: Path, case: str, size: str, **changes: Any) -> Path:
    """Pack the data of `case` below `folder`; returns its configuration's path. `changes` replace top-level keys."""
    settings = (LANGUAGES if case == "language" else CONVNETS)[size if case in CASES else "toy"]
    data = folder / f"{case}-data"
    match case:
        case "language":
            task = _text(folder, data, settings, PACKAGES[size])
        case "audio":
            task = _sounds(folder, data)
        case "diffusion":
            _images(folder, data, settings)
            task = {"name": "diffusion", "classes": CLASSES, "image_size": settings["image_size"], "model": DIFFUSION}
        case _:
            task = _images(folder, data, settings)
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


def _sounds(folder: Path, data: Path) -> dict[str, Any]:
    """Tones of 0.1 to 0.3 seconds, one pitch per class, in noise, as wavs in class folders: the `task` section."""
    rng, raw, rate = np.random.default_rng(0), folder / "sounds", 8000
    for number in range(48):
        label, time = number % CLASSES, np.arange(int(rng.integers(rate // 10, rate * 3 // 10))) / rate
        wave = 0.3 * np.sin(2 * np.pi * 200 * 1.4**label * time) + rng.normal(0, 0.05, len(time))
        path = raw / f"class-{label}" / f"{number:05d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave, rate, subtype="PCM_16")
    pack(raw, data, Packing(), kind="audio")
    shutil.rmtree(raw)
    return {
        "name": "audio_classification",
        "classes": CLASSES,
        "rate": rate,
        "masks": {"bands": 1, "band_width": 4, "frames": 1, "frame_width": 4},
        **AUDIO,
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
