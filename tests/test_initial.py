"""Starting from a pretrained folder: the same weights at every ZeRO stage, and at stage 3 no rank holds all of them.

One start of four ranks does it all: memory, the weights at stages 0 to 3, training on from an exported folder with
another head, and going on after the folder is gone.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import config as configs
from pipeline.checkpoint.export import export
from pipeline.session import World
from tests import gloo, small_data, small_run
from tests.checkpoint.small_export import VIT
from tests.small_session import of_kind, records_of

CAUSAL = "causal language modeling"
WIDE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 500,
    "tie_word_embeddings": True,
}
NARROW = WIDE | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(folder: Path, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A folder of transformers with random weights; its parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    module: Any = LlamaForCausalLM(LlamaConfig(**options))
    module.to(dtype)
    module.save_pretrained(folder, max_shard_size="40MB")
    return {name: parameter.detach().float() for name, parameter in module.named_parameters()}


def memory(what: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) * 1024


def growth(world: World, folder: Path) -> tuple[int, int]:
    """(peak growth of memory while the network in `folder` is read and shared at stage 3, bytes of the network)."""
    import deepspeed

    from pipeline import engine, initial
    from pipeline.models import architectures

    settings = engine.deepspeed_config(small_run.config("words", 3), world.world_size)
    engine.init_distributed(world)
    module, weights = architectures.load(CAUSAL, folder, architectures.pretrained_config(folder))
    size = sum(parameter.nbytes for parameter in module.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = memory("VmRSS")
    cut = partial(deepspeed.zero.Init, config_dict_or_path=settings, dtype=torch.float32)
    initial.fill(module, world, weights, cut, torch.float32)
    assert all(parameter.numel() == 0 for parameter in module.parameters())
    return memory("VmHWM") - before, size


def masters(world: World, folder: Path, stage: int, dtype: str) -> dict[str, tuple[int, Tensor]]:
    """(start, values) of this rank's part of each parameter, once the engine is built."""
    from pipeline import engine
    from pipeline.checkpoint import layouts
    from pipeline.models import architectures

    settings = small_run.config("words", stage, dtype, optim={"groups": (), "lr": 1e-3})
    module, weights = architectures.load(CAUSAL, folder, architectures.pretrained_config(folder))
    built = engine.build(settings, module, world, weights)
    found = {piece.name: (piece.start, piece.state["master"].clone()) for piece in layouts.pieces(built)}
    assert len(layouts.aliases(built)) == 1  # still tied
    built.close()
    return found


def train(world: World, path: Path, run: Path) -> list[dict[str, Any]]:
    return records_of(world, configs.load(path), run)


def on_four(world: World, root: Path, paths: dict[str, Path]) -> dict[str, Any]:
    found: dict[str, Any] = {"growth": growth(world, root / "wide")}
    for stage, dtype in ((0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")):
        found[f"{stage} {dtype}"] = masters(world, root / "narrow", stage, dtype)
    train(world, paths["first"], root / "first")
    if world.rank == 0:
        export(root / "first", root / "exported")
    world.barrier()
    found["tuned"] = train(world, paths["tuned"], root / "tuned")
    world.barrier()
    if world.rank == 0:
        shutil.copy(paths["tuned"], root / "tuned" / "config.yaml")  # as the driver does
        shutil.move(root / "exported", root / "moved")
    world.barrier()
    found["on"] = train(world, paths["on"], root / "tuned")
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("initial")


@pytest.fixture(scope="module")
def weights(root: Path) -> dict[str, Tensor]:
    return llama(root / "narrow", NARROW, torch.bfloat16)


@pytest.fixture(scope="module")
def found(root: Path, weights: dict[str, Tensor]) -> list[dict[str, Any]]:
    llama(root / "wide", WIDE)
    pictures = small_data.images(root / "pictures")
    adapted = VIT | {"architecture": None, "model": {}, "pretrained": str(root / "exported"), "classes": 7}
    paths = {}
    for name, task, steps in (("first", VIT, 2), ("tuned", adapted, 2), ("on", adapted, 4)):
        paths[name] = small_data.config(
            root / f"{name}.yaml",
            task,
            pictures,
            name="tuned",
            runs=str(root),
            steps=steps,
            zero={"stage": 3},
            optim={"name": "adamw", "lr": 1e-3, "schedule": {"warmup": 1}},
        )
    return gloo.run(on_four, 4, root, paths, timeout=300)


@pytest.mark.slow
def test_no_rank_holds_the_network_at_stage_3(found: list[dict[str, Any]]) -> None:
    """A share is a quarter; what comes on top is one parameter and what the allocator cannot give back."""
    for grown, size in (each["growth"] for each in found):
        assert size > 250e6 and grown < 0.6 * size


@pytest.mark.slow
@pytest.mark.parametrize("case", ["0 fp32", "1 fp32", "2 bf16", "3 fp32", "3 bf16"])
def test_every_stage_begins_with_the_weights_of_the_folder(
    found: list[dict[str, Any]], weights: dict[str, Tensor], case: str
) -> None:
    counted = dict.fromkeys(weights, 0)
    for rank in found:
        for name, (start, values) in rank[case].items():
            assert torch.equal(values, weights[name].view(-1)[start : start + len(values)]), name
            counted[name] += len(values)
    copies = 4 if case.startswith("0") else 1
    assert counted == {name: copies * tensor.numel() for name, tensor in weights.items()}


@pytest.mark.slow
def test_an_exported_network_trains_on_with_another_head(found: list[dict[str, Any]], root: Path) -> None:
    [start] = of_kind(found[0]["tuned"], "start")
    assert start["notes"] == ["new, not from exported: classifier.weight, classifier.bias"]
    steps = of_kind(found[0]["tuned"], "step")
    assert [record["step"] for record in steps] == [0, 1]


@pytest.mark.slow
def test_it_goes_on_when_the_folder_is_gone(found: list[dict[str, Any]], root: Path) -> None:
    assert not (root / "exported").exists()
    [restored] = of_kind(found[0]["on"], "restore")
    assert restored["step"] == 2
    assert [record["step"] for record in of_kind(found[0]["on"], "step")] == [2, 3]
