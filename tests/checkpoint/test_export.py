"""Export: what transformers opens is, to the bit, the checkpoint's masters rounded once, and computes the same.

A convnet with batch norm, a vision transformer and a language model with tied weights are trained two steps at ZeRO-3
by four ranks, in one start. What they saved is read here without Millstream's own reader.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import typer
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

import pipeline
from pipeline import tasks
from pipeline.checkpoint import weights
from pipeline.checkpoint.export import Exported, export
from pipeline.cli import export as cli_export
from pipeline.data import augment
from pipeline.errors import CheckpointError
from tests.checkpoint.small_export import CASES, Saved, train_cases, written_anew


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    return train_cases(tmp_path_factory.mktemp("export"))


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
    own = tasks.find(one.config.task.name).Task(one.config.task).build_model().eval()
    state = own.state_dict(keep_vars=True)
    assert state.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            assert int(tensor) == 2
            continue
        assert tensor.dtype == kind and torch.equal(tensor, one.master(key).to(kind)), key
        state[key].data = one.master(key).to(kind)  # tables that are not saved stay as they are built
    with torch.no_grad():
        logits = model(**example(name, kind)).logits
        assert torch.equal(logits, own(**example(name, kind)).logits) and logits.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_files_are_those_that_save_pretrained_would_write(saved: dict[str, Saved], tmp_path: Path, name: str) -> None:
    """The same names, each tensor once, in files as small as asked; nothing else than what is needed beside them."""
    done = export(saved[name].run, tmp_path / "out", shard_bytes=3000)
    whole = opened(done)
    whole.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    index = json.loads((done.folder / "model.safetensors.index.json").read_text())
    ours = {file: load_file(done.folder / file) for file in set(index["weight_map"].values())}
    assert {tensor: file for file, tensors in ours.items() for tensor in tensors} == index["weight_map"]
    assert index["weight_map"].keys() == theirs.keys() and len(ours) > 3
    assert all(torch.equal(ours[file][tensor], theirs[tensor]) for tensor, file in index["weight_map"].items())
    for tensors in ours.values():
        sizes = [tensor.nbytes for tensor in tensors.values()]
        assert sum(sizes) <= 3000 or len(sizes) == 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in theirs.values())
    beside = {"README.md", "config.json", "model.safetensors.index.json", "preprocessor_config.json"}
    if name == "llama":
        beside = beside - {"preprocessor_config.json"} | {"generation_config.json"}
        beside |= {"tokenizer.json", "tokenizer_config.json"}
        assert "lm_head.weight" not in theirs
    assert set(done.files) - set(ours) == beside
    assert list(tmp_path.iterdir()) and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_page_says_where_it_is_from(saved: dict[str, Saved], tmp_path: Path) -> None:
    one = saved["vit"]
    page = (export(one.path, tmp_path / "out", dtype="bfloat16").folder / "README.md").read_text()
    assert hashlib.sha256((one.path / "manifest.json").read_bytes()).hexdigest() in page
    for word in ("vit, after 2 steps", "rounded once to bfloat16", "4 workers, ZeRO stage 3, trained in bf16", "torch"):
        assert word in page


def test_input_is_prepared_as_in_training(saved: dict[str, Saved], tmp_path: Path) -> None:
    """A square image; others are cut after they are resized there, and before here."""
    done = export(saved["convnet"].run, tmp_path / "out")
    pixels = np.random.default_rng(3).integers(0, 256, (30, 30, 1), dtype=np.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(done.folder)
    theirs = processor(Image.fromarray(pixels[:, :, 0]), return_tensors="np")["pixel_values"][0]
    ours = (augment.fit(pixels, 12).transpose(2, 0, 1) / 255 - 0.4) / 0.3
    assert np.abs(theirs - ours).max() < 1.01 / 255 / 0.3  # rounding to a byte may fall the other way


def test_text_is_taken_apart_as_in_training(saved: dict[str, Saved], tmp_path: Path) -> None:
    one = saved["llama"]
    done = export(one.run, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(done.folder)
    ours = Tokenizer.from_file(str(one.config.task.tokenizer))  # type: ignore[attr-defined]
    assert theirs("naïve text\n")["input_ids"] == ours.encode("naïve text\n").ids
    tokens = opened(done).generate(**theirs("abc", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] == 7


@pytest.mark.parametrize("name", CASES)
def test_the_bare_network_has_the_masters_too(saved: dict[str, Saved], name: str) -> None:
    loaded = weights.load(saved[name].run)
    tensors = [*loaded.module.named_parameters(), *loaded.module.named_buffers()]
    held = {key: tensor for key, tensor in tensors if key in saved[name].manifest.parameters}
    assert held.keys() == saved[name].manifest.parameters.keys() and len(held) > 8
    assert all(torch.equal(tensor, saved[name].master(key).to(tensor.dtype)) for key, tensor in held.items())


def test_averages_are_exported_when_they_were_kept(saved: dict[str, Saved], tmp_path: Path) -> None:
    one = saved["convnet"]
    with pytest.raises(CheckpointError, match="keeps no running averages"):
        export(one.run, tmp_path / "out", ema=True)
    averages = {(name, "ema"): t * 0.5 for (name, key), t in one.state.items() if key == "master"}
    path = written_anew(one, tmp_path / "checkpoints", one.state | averages)
    model = opened(export(path, tmp_path / "out", ema=True))
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, one.master(name) * 0.5), name
    for name, tensor in model.named_buffers():
        assert "tracked" in name or torch.equal(tensor, one.master(name)), name


@pytest.mark.parametrize("place", [3, 40, 4000, -1])
def test_a_flipped_bit_is_named_and_nothing_is_left(saved: dict[str, Saved], tmp_path: Path, place: int) -> None:
    """In the header's size, in the header, among the values, in the last of them."""
    path = Path(shutil.copytree(saved["convnet"].path, tmp_path / "c" / saved["convnet"].path.name))
    file = path / "rank-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not exported, checkpoint-00000002 is damaged: rank-00002\.safetensors"):
        export(path, tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["c"]
    file.write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match=r"rank-00002\.safetensors has \d+ bytes"):
        export(path, tmp_path / "out")


def test_what_is_there_is_not_touched_and_an_interrupt_leaves_nothing(saved: dict[str, Saved], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out is there already"):
        export(saved["convnet"].run, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())

    def interrupt(stage: str, done: int, total: int) -> None:
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".other-")]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(saved["convnet"].run, tmp_path / "other", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        export(tmp_path, tmp_path / "other")


def test_a_network_that_would_open_as_another_is_refused(saved: dict[str, Saved], tmp_path: Path) -> None:
    one = saved["convnet"]
    path = written_anew(one, tmp_path / "plain", one.state, network={})
    with pytest.raises(CheckpointError, match="is one of neither transformers nor diffusers") as refused:
        export(path, tmp_path / "out")
    said = str(refused.value).rpartition(": ")[2]
    module = eval(said, {"pipeline": pipeline, "pathlib": pathlib})
    assert all(torch.equal(tensor, one.master(name)) for name, tensor in module.named_parameters())
    kept = {key: tensor for key, tensor in one.state.items() if "running" not in key[0]}  # as with group norm
    shapes = {name: shape for name, shape in one.manifest.parameters.items() if "running" not in name}
    path = written_anew(one, tmp_path / "group", kept, parameters=shapes)
    with pytest.raises(CheckpointError, match=r"running_mean is not in it(.|\n)*and \d+ more"):
        export(path, tmp_path / "out")
    path = written_anew(one, tmp_path / "other", one.state, network=saved["vit"].manifest.network)
    with pytest.raises(CheckpointError, match="is not the ViTForImageClassification"):
        export(path, tmp_path / "out")


def test_values_that_float16_cannot_hold_are_refused(saved: dict[str, Saved], tmp_path: Path) -> None:
    one = saved["llama"]
    state = dict(one.state)
    state["model.norm.weight", "master"] = state["model.norm.weight", "master"] * 1e6
    path = written_anew(one, tmp_path / "checkpoints", state)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has values beyond 65,504"):
        export(path, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_the_command_says_how_to_open_it(saved: dict[str, Saved], tmp_path: Path) -> None:
    """And what it says works in a process that knows nothing of Millstream; without the task's files it says so."""
    one = saved["llama"]
    config = one.manifest.config | {"task": one.manifest.config["task"] | {"tokenizer": str(tmp_path / "gone.json")}}
    path = written_anew(one, tmp_path / "checkpoints", one.state, config=config)
    command = [sys.executable, "-m", "pipeline", "checkpoint", "export", str(path), str(tmp_path / "out")]
    done = subprocess.run([*command, "--max-shard-size", "8kB"], capture_output=True, text=True, check=True)
    assert "without the settings of its input" in done.stderr and "gone.json" in done.stderr
    line = done.stdout.splitlines()[-1].removeprefix("open it: ")
    assert line == f"transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})"
    code = f"import transformers; print({line}.config.architectures)"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert there.stdout == "['LlamaForCausalLM']\n"
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "is there already" in again.stderr


def test_sizes_are_read_as_they_are_written() -> None:
    assert [cli_export.size(text) for text in ("5GB", "1.5 MB", "2GiB", "700", "3kb")] == [
        5 * 10**9, 1_500_000, 2 * 1024**3, 700, 3000,
    ]  # fmt: skip
    for text in ("", "big", "0GB", "-5GB", "5 G B"):
        with pytest.raises(typer.BadParameter, match="is no size"):
            cli_export.size(text)
