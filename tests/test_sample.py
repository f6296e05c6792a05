"""`millstream sample`: texts and pictures from a checkpoint, the same for the same seed; weights as they were saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline import sample as sampling
from pipeline import task_file, tasks
from pipeline.checkpoint import format, fragments, weights
from pipeline.checkpoint.fragments import Fragment
from pipeline.checkpoint.manifest import Manifest
from pipeline.errors import CheckpointError, ConfigError, RunError
from pipeline.models import exported
from pipeline.sections import Strict
from pipeline.tasks import Row
from tests import small_data
from tests.checkpoint.small_export import LLAMA
from tests.test_cli import Run, millstream

__all__ = ["millstream"]  # a fixture of every test here


class Config(Strict):
    """A task of this file: squares of a shade, and numbers drawn at random."""

    name: str


class Shades(Strict):
    side: int = 4


class Task:
    def __init__(self, config: Config) -> None: ...

    def build_model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def sample(
        self, model: nn.Module, prompts: list[str], count: int, generator: torch.Generator, options: Mapping[str, str]
    ) -> list[Row]:
        assert not model.training and not torch.is_grad_enabled()
        side = task_file.options(Shades, options).side
        shades = [int(torch.randint(200, (1,), generator=generator)) for _ in range(count) for _ in prompts or [""]]
        return [{"shade": shade, "picture": np.full((side, side, 1), shade, np.uint8)} for shade in shades]


def saved(run: Path, section: dict[str, Any], step: int = 7, ema: bool = False) -> tuple[Path, nn.Module]:
    """A checkpoint of a network with its first weights, cut in the middle as two ranks would; and that network."""
    torch.manual_seed(3)
    module = tasks.find(section["name"]).Task(task_file.validate(section)).build_model()
    statistics = {name: value for name, value in module.named_buffers() if "running" in name}
    staging = format.stage(run / "checkpoints", step, 1)
    places, files = [], {}
    for rank in (0, 1):
        held = []
        for name, tensor in module.named_parameters():
            flat, half = tensor.detach().reshape(-1), tensor.numel() // 2
            piece, start = (flat[half:], half) if rank else (flat[:half], 0)
            held.append(Fragment(name, "master", start, piece))
            if ema:
                held.append(Fragment(name, "ema", start, piece + 1))
        if rank:
            held += [Fragment(name, "value", 0, value.reshape(-1)) for name, value in statistics.items()]
        file = f"rank-{rank:05d}.safetensors"
        files[file] = format.write(staging / file, fragments.file_chunks(held))
        places += [each.place(file) for each in held]
    shapes = {name: tuple(tensor.shape) for name, tensor in [*module.named_parameters(), *statistics.items()]}
    manifest = Manifest(
        step, 1, 2, 1, "fp32", shapes, tuple(places), files,
        aliases={"lm_head.weight": "model.embed_tokens.weight"} if section["name"] == "language_modeling" else {},
        config={"name": run.name, "task": section}, network=exported.describe(module),
    )  # fmt: skip
    return format.commit(run / "checkpoints", staging, manifest, newest_attempt=lambda: 1), module


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a language model that has learnt nothing, with two checkpoints."""
    folder = tmp_path_factory.mktemp("llama")
    text = small_data.rows(folder / "text")
    (text / "text.json").write_text(json.dumps({"format": 1, "eot_id": 0, "vocab_size": 257, "length": 16}))
    section = LLAMA | {"tokenizer": str(text / "tokenizer.json"), "model": LLAMA["model"] | {"initializer_range": 0.3}}
    for step in (5, 7):
        saved(folder / "verses", section, step, ema=step == 7)
    return folder / "verses"


@pytest.fixture
def shades(tmp_path: Path) -> Path:
    saved(tmp_path / "shades", {"name": __name__})
    return tmp_path / "shades"


def test_weights_are_those_that_were_saved(llama: Path) -> None:
    newest = weights.load(llama)
    assert newest.path.name == "checkpoint-00000007" and not newest.notes and not newest.module.training
    torch.manual_seed(3)
    module = newest.task.build_model()
    for loaded, plus in ((newest, 0), (weights.load(newest.path), 0), (weights.load(llama, ema=True), 1)):
        for (name, tensor), read in zip(module.named_parameters(), loaded.module.parameters(), strict=True):
            assert torch.equal(tensor + plus, read), name
    assert newest.module.lm_head.weight is newest.module.model.embed_tokens.weight  # type: ignore[union-attr]


def test_a_damaged_checkpoint_is_passed_over_and_told(llama: Path, tmp_path: Path) -> None:
    section = weights.load(llama).manifest.config["task"]
    for step in (1, 2):
        path, _ = saved(tmp_path / "run", section, step)
    file = path / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    loaded = weights.load(tmp_path / "run")
    assert loaded.manifest.step == 1 and "does not match its sha256" in loaded.notes[0]
    with pytest.raises(CheckpointError, match=r"is damaged: .*sha256"):
        weights.load(path)
    with pytest.raises(CheckpointError, match="keeps no running averages"):
        weights.load(tmp_path / "run", ema=True)
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        weights.load(tmp_path)
    saved(tmp_path / "run", section | {"model": section["model"] | {"num_hidden_layers": 1}}, 3)
    manifest = format.list_checkpoints(tmp_path / "run" / "checkpoints")[-1].manifest
    assert manifest is not None
    other = weights.load(llama).task.build_model()
    with pytest.raises(CheckpointError, match=r"another network .*: model.layers.1.* is not in it; .* \d+ more"):
        weights.read_into(other, tmp_path, manifest)


def test_a_seed_says_what_is_written(llama: Path) -> None:
    def texts(seed: int, *prompts: str, **options: str) -> list[Any]:
        rows = sampling.sample(loaded, prompts, count=3, seed=seed, options=options)
        return [row["text"] for row in rows]

    loaded = weights.load(llama)

    first = texts(0, "ab", "c", tokens="8")
    assert first == texts(0, "ab", "c", tokens="8") != texts(1, "ab", "c", tokens="8")
    assert [text[:2] for text in first[:3]] == ["ab"] * 3 and [text[0] for text in first[3:]] == ["c"] * 3
    assert len(set(first[:3])) == 3
    greedy = texts(0, "ab", tokens="8", temperature="0")
    assert greedy == texts(5, "ab", tokens="8", temperature="0") and len(set(greedy)) == 1
    assert greedy[:1] == texts(5, "ab", tokens="8", top_k="1")[:1] == texts(5, "ab", tokens="8", top_p="0.000001")[:1]
    assert len(texts(0, tokens="3")) == 3  # without a prompt


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": "0", "temprature": "1"}, r"2 problems:(.|\n)*must be at least 1(.|\n)*did you mean temperature"),
        ({"top_p": "high"}, "top_p: should be a number, not 'high'"),
        (
            {"tokens": "14"},
            "tokens=14 behind the 3 of the prompt 'ab' need 17 .* has 16; ask for at most tokens=13",
        ),
    ],
)
def test_options_that_do_not_fit_are_named(llama: Path, options: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        sampling.sample(weights.load(llama), ["ab"], options=options)


def test_pictures_are_written_alone_and_in_a_grid(shades: Path, tmp_path: Path) -> None:
    rows = sampling.sample(weights.load(shades), [], count=5, options={"side": "6"})
    table, *pictures, grid = sampling.write(tmp_path / "out", rows)
    told = [json.loads(line) for line in table.read_text().splitlines()]
    assert [row["picture"] for row in told] == [picture.name for picture in pictures]
    for row, picture in zip(rows, pictures, strict=True):
        assert np.array_equal(np.asarray(Image.open(picture)), row["picture"][:, :, 0])  # type: ignore[index]
    whole = np.asarray(Image.open(grid))
    assert whole.shape == (2 * 8 + 2, 3 * 8 + 2, 3)  # three columns, two lines, gaps of two pixels
    assert (whole[10:16, 10:16] == rows[4]["shade"]).all() and (whole[10:16, 18:] == 255).all()
    with pytest.raises(RunError, match="is there already"):
        sampling.write(tmp_path / "out", rows)


def test_the_command_prints_texts_and_writes_pictures(
    llama: Path, shades: Path, tmp_path: Path, millstream: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written = millstream("sample", llama, "--prompt", "[ab]", "--count", "2", "tokens=4", "--output", "texts")
    assert written.code == 0 and written.out.count("[ab]") == 2 and "--- 2 of 2: tokens 4" in written.out, written
    assert len((tmp_path / "texts" / "samples.jsonl").read_text().splitlines()) == 2
    drawn = millstream("sample", shades, "--count", "4", "--seed", "2")
    assert drawn.code == 0 and "look at samples-shades-7/grid.png" in drawn.out
    assert (tmp_path / "samples-shades-7" / "grid.png").is_file()
    assert "samples-shades-7-2" in millstream("sample", shades).out
    for arguments, code, words in (
        ((llama, "tokens"), 2, "is not KEY=VALUE"),
        ((llama, "--output", "texts"), 1, "is there already"),
        ((llama, "depth=3"), 78, "there is no such key"),
    ):
        wrong = millstream("sample", *arguments)
        assert wrong.code == code and words in wrong.err, wrong


def test_a_task_that_generates_nothing_says_who_does(tmp_path: Path) -> None:
    section = {"name": "image_classification", "classes": 2, "channels": 1, "image_size": 12, "architecture": "resnet"}
    section["model"] = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}
    saved(tmp_path / "run", section)
    with pytest.raises(ConfigError, match=r"generates nothing; those that do: .*language_modeling"):
        sampling.sample(weights.load(tmp_path / "run"), [])
