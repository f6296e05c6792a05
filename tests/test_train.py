"""The loop on real engines: the same samples and losses at every number of workers, and the full-batch gradient.

Each world size is one start of plain gloo processes that trains every case in turn.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import config as configs
from pipeline import tasks
from pipeline.data.stream import Stream
from pipeline.optim import learning_rate
from pipeline.randomness import DrawOutsideScope, Randomness
from pipeline.session import World
from pipeline.track import pictures
from tests import gloo, small_data
from tests.small_session import of_kind, records_of

STEPS = 20
RESNET = {
    "name": "image_classification",
    "classes": 4,
    "channels": 1,
    "image_size": 12,
    "architecture": "resnet",
    "model": {
        "embedding_size": 6,
        "hidden_sizes": [6, 8],
        "depths": [1, 1],
        "layer_type": "basic",
        "hidden_act": "gelu",
    },
    "crop": 1,
    "mixup": 0.3,
    "label_smoothing": 0.1,
}
AVERAGE = {"decay": 0.9}
GPT = {
    "name": "language_modeling",
    "length": 16,
    "architecture": "gpt2",
    "model": {"n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One configuration a case: batch norm with mixup, group norm with SGD, a dropout transformer on ragged rows."""
    folder = tmp_path_factory.mktemp("cases")
    images, text = small_data.images(folder / "pictures"), small_data.rows(folder / "text")
    gpt = GPT | {"tokenizer": str(text / "tokenizer.json")}
    sgd = {"name": "sgd", "lr": 0.05, "weight_decay": 1e-3, "schedule": {"warmup": 4}}
    both = {"train": str(images), "evaluate": {"test": str(images)}}
    written: dict[str, Path] = {}
    for name, task, data, changes in (
        ("batch-norm", RESNET, both, {"zero": {"stage": 1}}),
        ("group-norm", RESNET | {"norm": "group"}, both, {"zero": {"stage": 2}, "optim": sgd}),
        ("ragged", gpt, {"train": str(text), "evaluate": {"test": str(text)}}, {"zero": {"stage": 3}, "ema": AVERAGE}),
    ):
        path = folder / f"{name}.yaml"
        small_data.config(
            path,
            task,
            Path("unused"),
            name=name,
            data=data,
            steps=STEPS,
            checkpoint={"every": 100},
            track={"wandb": "off", "samples": 6},
            **changes,
        )
        written[name] = path
    return written


def run_cases(world: World, paths: dict[str, Path], runs: Path) -> dict[str, list[dict[str, Any]]]:
    """Train every case in this process; this rank's records by case."""
    return {name: records_of(world, configs.load(path), runs / name) for name, path in paths.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def by_workers(cases: dict[str, Path], runs: Path) -> dict[int, dict[str, list[dict[str, Any]]]]:
    """Records of rank 0 for 1, 2, 3 (does not divide the 4 micro batches) and 4 workers."""
    return {n: gloo.run(run_cases, n, cases, runs / str(n), timeout=240)[0] for n in (1, 2, 3, 4)}


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("case", ["batch-norm", "group-norm", "ragged"])
def test_workers_change_nothing(
    by_workers: dict[int, dict[str, list[dict[str, Any]]]], case: str, workers: int
) -> None:
    """Recorded samples and learning rates are identical; losses agree within 1e-6 relative (smooth activations, 20
    steps).
    """
    alone, together = (of_kind(by_workers[n][case], "step") for n in (1, workers))
    assert [record["step"] for record in together] == list(range(STEPS))
    assert [record["samples"] for record in together] == [record["samples"] for record in alone]
    assert [r["metrics"]["optim/lr"] for r in together] == [r["metrics"]["optim/lr"] for r in alone]
    losses = np.array([[r["metrics"]["train/loss"] for r in records] for records in (alone, together)])
    assert np.abs(losses[1] / losses[0] - 1).max() < 1e-6
    scores = [of_kind(by_workers[n][case], "evaluation")[-1]["metrics"] for n in (1, workers)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)


@pytest.mark.parametrize("case", ["batch-norm", "ragged"])
def test_loss_is_that_of_the_whole_batch(
    by_workers: dict[int, dict[str, list[dict[str, Any]]]], cases: dict[str, Path], case: str
) -> None:
    """Against plain torch: no DeepSpeed, no ranks, one loop over the step's micro batches and the mean over all of
    its terms.
    """
    config = configs.load(cases[case])
    task = tasks.find(config.task.name).Task(config.task)
    randomness = Randomness(config.seed)
    with randomness.draws("weights"):
        model = task.build_model()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)
    data = Stream(config)
    recorded = [r["metrics"] for r in of_kind(by_workers[2][case], "step")]
    with data.loader(task, 0, 1, 0) as loader:
        for step in range(6):
            batches = loader.step(step)
            terms = sum(task.weight(micro.batch) for micro in batches)
            total = 0.0
            for micro in batches:
                with randomness.draws(step, micro.index):
                    loss, _ = task.loss(model, micro.batch)
                    (loss / terms).backward()
                total += float(loss.detach())
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.optim.schedule, config.optim.lr, step, config.steps)
            optimizer.step()
            optimizer.zero_grad()
            assert recorded[step]["train/loss"] == pytest.approx(total / terms, rel=2e-6)
            assert recorded[step]["train/grad_norm"] == pytest.approx(norm, rel=1e-4)
    data.close()


def test_training_learns(by_workers: dict[int, dict[str, list[dict[str, Any]]]]) -> None:
    """Twenty steps are enough to see the loss fall in every case."""
    for case, records in by_workers[1].items():
        losses = [record["metrics"]["train/loss"] for record in of_kind(records, "step")]
        assert math.isfinite(losses[-1]) and losses[-1] < losses[0], case


@pytest.mark.parametrize("case", ["batch-norm", "ragged"])
def test_the_same_samples_are_shown_at_any_number_of_workers(
    by_workers: dict[int, dict[str, list[dict[str, Any]]]], runs: Path, case: str
) -> None:
    """Six of them, so the last micro batch is cut; pictures lie in the run's folder."""
    [alone], seen = of_kind(by_workers[1][case], "samples"), set()
    assert alone["step"] == STEPS and len(alone["sets"]["test"]) == 6
    for n, records in by_workers.items():
        [record] = of_kind(records[case], "samples")
        for row, first in zip(record["sets"]["test"], alone["sets"]["test"], strict=True):
            assert row == {name: pytest.approx(v, rel=1e-4) if type(v) is float else v for name, v in first.items()}
            if case == "batch-norm":
                path = pictures.find(runs / str(n) / case, row["picture"]["picture"])
                assert path is not None
                seen.add((path.name, path.read_bytes()))
    assert len(seen) == (6 if case == "batch-norm" else 0)


def test_a_moving_average_is_evaluated_under_its_own_name(
    by_workers: dict[int, dict[str, list[dict[str, Any]]]],
) -> None:
    """While the loss falls, the average of older weights has a higher one."""
    [scores] = [record["metrics"] for record in of_kind(by_workers[2]["ragged"], "evaluation")]
    assert scores["eval/test/ema/loss"] > scores["eval/test/loss"]
    [without] = [record["metrics"] for record in of_kind(by_workers[2]["group-norm"], "evaluation")]
    assert not [name for name in without if "ema" in name]


def test_drawing_outside_a_micro_batch_raises() -> None:
    randomness = Randomness(0)
    with randomness.draws(0, 0):
        inside = torch.rand(2)
    with randomness.draws(0, 0):
        assert torch.equal(inside, torch.rand(2))
    torch.rand(1)
    with pytest.raises(DrawOutsideScope, match="outside a micro batch"), randomness.draws(0, 1):
        pass
