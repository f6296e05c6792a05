"""Small networks of transformers, trained by four ranks at ZeRO-3, and all that their checkpoints hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline import config as configs
from pipeline.checkpoint import format, fragments
from pipeline.checkpoint.format import list_checkpoints
from pipeline.checkpoint.fragments import Fragment
from pipeline.checkpoint.manifest import Manifest
from pipeline.config import Config
from pipeline.session import World
from tests import gloo, small_data
from tests.small_session import records_of

IMAGES: dict[str, Any] = {"name": "image_classification", "classes": 4, "channels": 1, "image_size": 12}
CONVNET = IMAGES | {
    "architecture": "resnet",
    "model": {"embedding_size": 6, "hidden_sizes": [6, 8], "depths": [1, 1], "layer_type": "basic"},
    "mean": [0.4],
    "std": [0.3],
}
VIT = IMAGES | {
    "architecture": "vit",
    "model": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "patch_size": 4,
    },
}
LLAMA: dict[str, Any] = {
    "name": "language_modeling",
    "length": 16,
    "architecture": "llama",
    "model": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
    },
}
CASES = ("convnet", "vit", "llama")


class Saved(NamedTuple):
    """A run and what its checkpoint holds."""

    run: Path
    config: Config
    path: Path
    manifest: Manifest
    state: dict[tuple[str, str], Tensor]
    """(parameter, key) -> whole tensor, put together from the fragments."""

    def master(self, name: str) -> Tensor:
        source = self.manifest.aliases.get(name, name)
        return self.state.get((source, "master"), self.state.get((source, "value")))  # type: ignore[return-value, arg-type]


def train_all(world: World, paths: dict[str, Path], runs: Path) -> None:
    for name, path in paths.items():
        records_of(world, configs.load(path), runs / name)


def read(run: Path, config: Config) -> Saved:
    """The newest checkpoint of a run, without Millstream's own reader."""
    path = list_checkpoints(run / "checkpoints")[-1].path
    manifest = Manifest.from_bytes((path / "manifest.json").read_bytes())
    files = {name: load_file(path / name) for name in manifest.files}
    state: dict[tuple[str, str], Tensor] = {}
    for place in manifest.fragments:
        tensor = files[place.file][place.tensor]
        whole = state.setdefault(
            (place.parameter, place.key), torch.empty(manifest.parameters[place.parameter], dtype=tensor.dtype)
        )
        whole.view(-1)[place.start : place.start + place.numel] = tensor
    return Saved(run, config, path, manifest, state)


def train_cases(folder: Path) -> dict[str, Saved]:
    """Every case trained two steps by four ranks at ZeRO-3, the vision transformer in bf16; in one start."""
    pictures, text = small_data.images(folder / "pictures"), small_data.rows(folder / "text")
    paths = {}
    for name, task, data in (
        ("convnet", CONVNET, pictures),
        ("vit", VIT, pictures),
        ("llama", LLAMA | {"tokenizer": str(text / "tokenizer.json")}, text),
    ):
        precision = {"dtype": "bf16"} if name == "vit" else {}
        extra = {"stage3_param_persistence_threshold": 40, "sub_group_size": 900}
        paths[name] = small_data.config(
            folder / f"{name}.yaml",
            task,
            data,
            name=name,
            steps=2,
            zero={"stage": 3, "extra": extra},
            precision=precision,
            optim={"name": "adamw", "lr": 0.01, "schedule": {"warmup": 1}},
        )
    gloo.run(train_all, 4, paths, folder / "runs", timeout=240)
    return {name: read(folder / "runs" / name, configs.load(path)) for name, path in paths.items()}


def written_anew(one: Saved, root: Path, state: dict[tuple[str, str], Tensor], **changes: Any) -> Path:
    """A checkpoint like that of `one` with another state, by one rank; `changes` to its manifest."""
    staging = format.stage(root, 2, 1)
    held = [Fragment(name, key, 0, tensor.reshape(-1)) for (name, key), tensor in state.items()]
    digest = format.write(staging / "rank-00000.safetensors", fragments.file_chunks(held))
    manifest = dataclasses.replace(
        one.manifest,
        fragments=tuple(each.place("rank-00000.safetensors") for each in held),
        files={"rank-00000.safetensors": digest},
        **changes,
    )
    return format.commit(root, staging, manifest, newest_attempt=lambda: 1)
