"""Attention, LSTM and a linear recurrence by one task: learnt by heart, resumed, tied, recomputed, exported."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import config as configs
from pipeline.checkpoint.export import export
from pipeline.checkpoint.format import list_checkpoints
from pipeline.checkpoint.weights import load
from pipeline.data import index
from pipeline.data.pack.text import npy
from pipeline.models import exported, generation
from pipeline.prepare import prepare
from pipeline.session import World
from tests import gloo, small_data
from tests.small_session import of_kind, records_of
from tests.tasks.test_language_modeling import GPT2, LENGTH, LLAMA, batch_of, built, task_of, text

__all__ = ["text"]  # a fixture of every test here

LSTM = {"hidden_size": 24, "num_hidden_layers": 2}
MAMBA2 = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 8}
MAMBA2 |= {"chunk_size": 8}
NETWORKS: dict[str, dict[str, Any]] = {"llama": LLAMA, "lstm": LSTM, "mamba2": MAMBA2}
STEPS, MIDDLE = 8, 4  # 128 rows: more than an epoch


@pytest.mark.parametrize(
    ("architecture", "options"),
    [*NETWORKS.items(), ("gpt2", GPT2), ("qwen3", LLAMA | {"num_key_value_heads": 1})],
)
def test_one_batch_is_learnt_by_heart(text: Path, architecture: str, options: dict[str, Any]) -> None:
    """Below 1 % of its first loss within 300 steps."""
    task = task_of(text, architecture=architecture, model=options)
    model, batch = built(task), batch_of(task, text, [0, 1])
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), []
    for _ in range(300):
        loss, _ = task.loss(model, batch)
        losses.append(float(loss.detach()))
        if losses[-1] < 0.01 * losses[0]:
            break
        optimizer.zero_grad()
        (loss / task.weight(batch)).backward()
        optimizer.step()
    assert losses[-1] < 0.01 * losses[0], losses[-1]


@pytest.mark.parametrize("architecture", NETWORKS)
def test_tied_weights_are_one_matrix(text: Path, architecture: str) -> None:
    """Its gradient is the sum of both uses, and it counts once."""
    tied, apart = (
        task_of(text, architecture=architecture, model=NETWORKS[architecture] | {"tie_word_embeddings": tie})
        for tie in (True, False)
    )
    one, two = built(tied), built(apart)
    assert one.get_output_embeddings().weight is one.get_input_embeddings().weight  # type: ignore[operator]
    size = one.get_input_embeddings().weight.numel()  # type: ignore[operator]
    count = [sum(parameter.numel() for parameter in model.parameters()) for model in (one, two)]
    assert count[1] - count[0] == size
    two.load_state_dict(one.state_dict())
    batch = batch_of(tied, text, [0, 1])
    for task, model in ((tied, one), (apart, two)):
        task.loss(model, batch)[0].backward()
    parts = two.get_input_embeddings().weight.grad + two.get_output_embeddings().weight.grad  # type: ignore[operator]
    torch.testing.assert_close(one.get_input_embeddings().weight.grad, parts)  # type: ignore[operator]


@pytest.mark.parametrize("architecture", NETWORKS)
def test_activations_that_are_computed_again_change_nothing(text: Path, architecture: str) -> None:
    """To the bit, with dropout where the network has it."""
    options = NETWORKS[architecture] | ({"dropout": 0.2} if architecture == "lstm" else {})
    task = task_of(text, architecture=architecture, model=options)
    batch, found = batch_of(task, text, [0, 1]), []
    for recompute in (False, True):
        model = built(task).train()
        prepare(model, torch.float32, recompute)
        layers = [each for each in model.modules() if getattr(each, "gradient_checkpointing", False)]
        assert len(layers) >= 2 * recompute and bool(layers) is recompute
        torch.manual_seed(1)
        loss, _ = task.loss(model, batch)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for once, again in zip(*found, strict=True):
        assert torch.equal(once, again)


def test_the_lstm_is_plain_pytorch(text: Path) -> None:
    """Layer by layer by the equations of Hochreiter and Schmidhuber, with a forget gate that begins open."""
    task = task_of(text, architecture="lstm", model=LSTM)
    model: Any = built(task).eval()
    tokens = batch_of(task, text, [0])["tokens"]
    x = model.model.embed_tokens(tokens)[0]  # [length, hidden]
    for layer in model.model.layers:
        lstm, h, c, outputs = layer.lstm, torch.zeros(24), torch.zeros(24), []
        assert (lstm.bias_ih_l0[24:48] == 1).all() and (lstm.bias_hh_l0 == 0).all()
        for step in layer.norm(x):
            gates = lstm.weight_ih_l0 @ step + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ h + lstm.bias_hh_l0
            i, f, g, o = gates.chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        x = x + torch.stack(outputs)
    logits = model.model.norm(x) @ model.model.embed_tokens.weight.T
    torch.testing.assert_close(model(input_ids=tokens).logits[0], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", NETWORKS)
def test_what_is_kept_between_tokens_gives_what_the_whole_row_gives(text: Path, architecture: str) -> None:
    task = task_of(text, architecture=architecture, model=NETWORKS[architecture])
    model = built(task).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5)
        draw = generation.Draw(300, 0.0, None, 1.0)
        kept = generation.write(model, [1, 2, 3], 2, torch.Generator(), tokens=10, draw=draw, end=None)
        tokens = torch.tensor([[1, 2, 3]])
        for _ in range(10):
            logits = model(input_ids=tokens, use_cache=False).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=-1)], dim=1)
    assert kept[0] == kept[1] == tokens[0, 3 : 3 + len(kept[0])].tolist() and len(kept[0]) > 3


def test_flops_of_the_recurrent_are_counted(text: Path) -> None:
    """Of the LSTM exactly its products, forward and twice backward; of the other no fewer than its matrices have."""
    tasks = {name: task_of(text, architecture=name, model=NETWORKS[name]) for name in ("lstm", "mamba2")}
    matrices = {
        name: sum(p.numel() for p in built(task).parameters() if p.ndim == 2 and min(p.shape) > 1)
        for name, task in tasks.items()
    }
    assert tasks["lstm"].flops_per_sample() == 3 * 2 * LENGTH * matrices["lstm"]
    assert 1 <= tasks["mamba2"].flops_per_sample() / (3 * 2 * LENGTH * matrices["mamba2"]) < 2


def cases(folder: Path, zero: dict[str, Any]) -> dict[str, Path]:
    """A configuration for each network, on ragged rows; in two of them a bit has flipped since they were indexed."""
    rows, bad = small_data.rows(folder / "rows"), small_data.rows(folder / "bad")
    with tarfile.open(bad / "shard-003.tar", "w") as tar:
        for key in ("bad-1", "bad-2"):
            content = npy(np.full(17, 200, np.uint16))
            member = tarfile.TarInfo(f"{key}.npy")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (bad / "shards.idx").unlink()
    index.build(bad)
    shard = bad / "shard-003.tar"
    shard.write_bytes(shard.read_bytes().replace(np.full(17, 200, np.uint16).tobytes(), bytes(34)))
    written = {}
    for name in ("lstm", "mamba2"):
        section = {"name": "language_modeling", "tokenizer": str(rows / "tokenizer.json"), "length": 16}
        section |= {"architecture": name, "model": NETWORKS[name]}
        changes: dict[str, Any] = {"steps": STEPS, "zero": zero, "checkpoint": {"every": MIDDLE}}
        changes |= {"data": {"train": str(bad), "evaluate": {"test": str(rows)}, "bad_samples": "substitute"}}
        written[name] = small_data.config(folder / f"{name}-{zero['stage']}.yaml", section, rows, name=name, **changes)
    return written


def run_cases(world: World, paths: dict[str, Path], runs: Path, again: bool = False) -> dict[str, list[float]]:
    """Train each; `again`: then forget the last checkpoint, keeping it aside, and go on from the middle. The losses."""
    found = {}
    for name, path in paths.items():
        records = records_of(world, configs.load(path), runs / name)
        if again:
            last = list_checkpoints(runs / name / "checkpoints")[-1].path
            shutil.move(last, runs / f"{name}-whole" / "checkpoints" / last.name)
            found[f"{name} again"] = losses(records_of(world, configs.load(path), runs / name, attempt=2))
        found[name] = losses(records)
        reasons = sorted(record["reason"] for record in of_kind(records, "substitute"))
        assert len(reasons) == (0 if world.rank else 2), reasons
        assert all(f"bad-{number}.npy" in reason for number, reason in enumerate(reasons, 1)), reasons
        for scored in of_kind(records, "evaluation"):
            assert scored["metrics"]["eval/test/perplexity"] == pytest.approx(
                np.exp(scored["metrics"]["eval/test/loss"])
            )
    return found


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [record["metrics"]["train/loss"] for record in of_kind(records, "step")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """Both networks trained by one process, whole and in two halves: (folder, losses)."""
    folder = tmp_path_factory.mktemp("recurrent")
    for name in ("lstm", "mamba2"):
        (folder / "runs" / f"{name}-whole" / "checkpoints").mkdir(parents=True)
    return folder, gloo.run(run_cases, 1, cases(folder, {"stage": 1}), folder / "runs", True, timeout=240)[0]


@pytest.mark.parametrize("name", ["lstm", "mamba2"])
def test_a_resume_is_bitwise(alone: tuple[Path, dict[str, list[float]]], name: str) -> None:
    folder, found = alone
    whole, again = (list_checkpoints(folder / "runs" / each / "checkpoints")[-1] for each in (f"{name}-whole", name))
    assert whole.step == again.step == STEPS and whole.manifest and again.manifest
    assert whole.manifest.files == again.manifest.files, "weights and optimizer, by their sha256"
    assert found[f"{name} again"] == found[name][MIDDLE:] and found[name][-1] < found[name][0]


@pytest.mark.parametrize("name", ["lstm", "mamba2"])
def test_an_export_opens_and_computes_the_same(
    alone: tuple[Path, dict[str, list[float]]], tmp_path: Path, name: str
) -> None:
    run = alone[0] / "runs" / name
    done = export(run, tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(done.folder, local_files_only=True).eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        own = load(run).module(input_ids=tokens).logits
        assert torch.equal(opened(input_ids=tokens).logits, own)
    page = (done.folder / "README.md").read_text()
    assert ("import pipeline.models.lstm" in page) is (name == "lstm") is bool(exported.needs(opened))
    file = alone[0] / "rows" / "tokenizer.json"
    again = built(task_of(tmp_path, tokenizer=file, architecture=None, model={}, pretrained=done.folder), seed=5)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), opened.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "stage"), [(2, 0), (3, 2), (4, 3)])
def test_other_workers_and_stages_train_alike(
    alone: tuple[Path, dict[str, list[float]]], tmp_path: Path, workers: int, stage: int
) -> None:
    found = gloo.run(run_cases, workers, cases(tmp_path, {"stage": stage}), tmp_path / "runs", timeout=240)[0]
    for name in ("lstm", "mamba2"):
        assert found[name] == pytest.approx(alone[1][name], rel=2e-4), name
