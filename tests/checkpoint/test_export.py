"""Export: what transformers opens is, to the bit, the checkpoint's masters rounded once, and computes what they compute.

A convnet with batch norm, a vision transformer and a language model with tied weights are trained two steps at ZeRO-3
by four ranks, in one start. What they saved is read here without Millstream's own reader.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pipeline import config as configs
from pipeline import tasks
from pipeline.checkpoint.export import Exported, export
from pipeline.checkpoint.format import list_checkpoints
from pipeline.checkpoint.manifest import Manifest
from pipeline.config import Config
from pipeline.errors import CheckpointError
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    folder = tmp_path_factory.mktemp("export")
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


def opened(done: Exported) -> Any:
    model, info = getattr(transformers, done.opener).from_pretrained(
        done.folder, local_files_only=True, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def example(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    if name == "llama":
        return {"input_ids": torch.randint(0, 257, (2, 16), generator=generator)}
    return {"pixel_values": torch.randn(2, 1, 12, 12, generator=generator).to(dtype)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_opened_tensors_and_outputs_are_those_of_the_rounded_masters(
    saved: dict[str, Saved], tmp_path: Path, name: str, dtype: Any
) -> None:
    one, kind = saved[name], getattr(torch, dtype)
    done = export(one.run, tmp_path / "out", dtype=dtype)
    assert not done.notes and done.step == 2 and done.checkpoint == one.path
    model = opened(done)
    own = tasks.find(one.config.task.name).Task(one.config.task).build_model().to(kind).eval()
    for key, tensor in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            assert int(tensor) == 2
            continue
        assert tensor.dtype == kind and torch.equal(tensor, one.master(key).to(kind)), key
        own.state_dict()[key].copy_(one.master(key))  # torch rounds here
    assert {key for key in own.state_dict()} == {key for key in model.state_dict()}
    with torch.no_grad():
        logits = model(**example(name, kind)).logits
        assert torch.equal(logits, own(**example(name, kind)).logits) and logits.isfinite().all()
