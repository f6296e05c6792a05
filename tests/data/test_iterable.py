"""A data set in other loops: torch's own, transformers' Trainer, Lightning; each goes on exactly where it was."""

from __future__ import annotations

import itertools
import json
import textwrap
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import pipeline
from pipeline.data.reader import Dataset, Sample
from pipeline.errors import ConfigError, DataError
from tests import small_data

README = Path(__file__).parents[2] / "README.md"
SAMPLES, BATCH = 97, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.images(tmp_path_factory.mktemp("iterable") / "images", SAMPLES)


@pytest.fixture
def dataset(folder: Path) -> Dataset:
    return pipeline.open_dataset(folder)


def numbered(sample: Sample, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    pixels = sample["png"].astype(np.float32).ravel() / 255
    drawn = np.asarray(0 if rng is None else rng.random(), np.float32)
    return {"x": pixels, "labels": np.asarray(sample["cls"]), "number": np.asarray(sample.number), "drawn": drawn}


def numbers(batches: Any, count: int) -> list[list[int]]:
    return [batch["number"].tolist() for batch in islice(batches, count)]


def test_every_sample_once_an_epoch_and_goes_on_anywhere(dataset: Dataset) -> None:
    whole = numbers(dataset.loader(BATCH, prepare=numbered), 40)
    flat = [number for batch in whole for number in batch]
    assert sorted(flat[:SAMPLES]) == sorted(flat[SAMPLES : 2 * SAMPLES]) == list(range(SAMPLES))
    assert flat[:SAMPLES] != flat[SAMPLES : 2 * SAMPLES] != sorted(flat[:SAMPLES])
    loader = dataset.loader(BATCH, prepare=numbered, threads=2)
    assert numbers(loader, 7) == whole[:7]
    state = json.loads(json.dumps(loader.state_dict()))
    again = dataset.loader(BATCH, prepare=numbered)
    again.load_state_dict(state)
    assert numbers(again, 5) == whole[7:12] and numbers(again, 3) == whole[12:15] and again.step == 15


def test_another_world_size_shares_the_same_batches(dataset: Dataset) -> None:
    whole = numbers(dataset.loader(BATCH, prepare=numbered), 10)
    for world_size in (2, 3):
        ranks = [
            numbers(dataset.loader(BATCH, prepare=numbered, rank=rank, world_size=world_size), 10)
            for rank in range(world_size)
        ]
        assert [[*chain.from_iterable(parts)] for parts in zip(*ranks)] == whole


def test_batches_are_kept_and_end_where_they_shall(dataset: Dataset) -> None:
    loader = dataset.loader(BATCH, prepare=numbered, steps=9)
    assert len(loader) == 9
    kept = list(loader)
    copies = [batch["x"].clone() for batch in kept]
    assert len(kept) == 9 and list(loader) == []
    assert all(torch.equal(batch["x"], copy) for batch, copy in zip(kept, copies))
    assert not torch.equal(kept[0]["x"], kept[1]["x"])
    plain = next(iter(dataset.loader(4)))
    assert plain["png"].shape == (4, 12, 12, 1) and plain["cls"].dtype == torch.int64


def test_augmentation_follows_from_the_sample(dataset: Dataset) -> None:
    whole = [batch["drawn"] for batch in dataset.loader(BATCH, prepare=numbered, augment=True, steps=20)]
    later = dataset.loader(BATCH, prepare=numbered, augment=True, steps=20, threads=3)
    later.step = 13
    assert all(torch.equal(a, b["drawn"]) for a, b in zip(whole[13:], later, strict=True))
    assert len({float(value) for drawn in whole for value in drawn}) > 200


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_dataloader(dataset: Dataset, workers: int) -> None:
    whole = numbers(dataset.loader(BATCH, prepare=numbered), 11)
    loader = dataset.loader(BATCH, prepare=numbered, steps=11)
    loader.step = 3
    context = "fork" if workers else None
    assert (
        numbers(DataLoader(loader, batch_size=None, num_workers=workers, multiprocessing_context=context), 99)
        == whole[3:]
    )


def test_what_cannot_be(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="5 ranks cannot share a batch of 12"):
        dataset.loader(BATCH, world_size=5)
    with pytest.raises(ConfigError, match="no rank 2 among 2"):
        dataset.loader(BATCH, rank=2, world_size=2)
    other = pipeline.open_dataset(small_data.images(tmp_path / "other", 50))
    with pytest.raises(DataError, match="of other data, or of another order"):
        other.loader(BATCH).load_state_dict(dataset.loader(BATCH).state_dict())
    with pytest.raises(DataError, match="seed"):
        dataset.loader(BATCH, seed=1).load_state_dict(dataset.loader(BATCH).state_dict())


class Linear(torch.nn.Module):
    """Classifies, and notes which samples it saw."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(144, 4)
        self.seen: list[list[int]] = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor, number: torch.Tensor, drawn: Any) -> dict[str, Any]:
        self.seen.append(number.tolist())
        logits = self.layer(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_in_transformers_trainer(dataset: Dataset, tmp_path: Path) -> None:
    """Stopped after step 4 of 9 and gone on: the same samples, the same weights."""
    import transformers

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(self.train_dataset, batch_size=None)  # type: ignore[arg-type]

    class GoOn(transformers.TrainerCallback):
        """Begins the loader at the Trainer's own step, and stops after another one."""

        def __init__(self, loader: Any, steps: int) -> None:
            self.loader, self.steps = loader, steps

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.loader.step = state.global_step * args.gradient_accumulation_steps

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = control.should_training_stop or state.global_step >= self.steps

    def train(name: str, steps: int, resume: bool = False) -> Linear:
        model, loader = Linear(), dataset.loader(BATCH, prepare=numbered)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=9,
            save_steps=4,
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            ignore_data_skip=True,  # the loader begins at the step itself
            seed=0,
        )
        trainer = Trainer(model=model, args=arguments, callbacks=[GoOn(loader, steps)], train_dataset=loader)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole, first, second = train("whole", 9), train("parts", 4), train("parts", 9, resume=True)
    assert whole.seen == numbers(dataset.loader(BATCH, prepare=numbered), 9) == first.seen + second.seen
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters()))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_examples_of_the_readme_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, with smaller numbers; what each adds to is made here."""
    lightning = pytest.importorskip("lightning")
    import transformers

    section = README.read_text().partition("## In another loop\n")[2].partition("\n## ")[0]
    code = textwrap.dedent("\n".join(line for line in section.splitlines() if line.startswith("    ") or not line))
    assert code.count("photos.loader(256, ") == 3
    monkeypatch.chdir(tmp_path)
    for name in ("CUDA_VISIBLE_DEVICES", "WANDB_MODE"):
        monkeypatch.setenv(name, "disabled" if name == "WANDB_MODE" else "")
    (tmp_path / "data/photos").mkdir(parents=True)
    (tmp_path / "data/photos/train").symlink_to(folder)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Linear()

        def training_step(self, batch: dict[str, torch.Tensor], at: int) -> torch.Tensor:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    model, module = Linear(), Module()
    names: dict[str, Any] = {"pipeline": pipeline, "torch": torch, "itertools": itertools, "transformers": transformers}
    names |= {"lightning": lightning, "prepare": numbered, "model": model, "module": module}
    exec(code.replace("256", str(BATCH)).replace("1000", "9"), names)
    with pipeline.open_dataset(folder) as dataset:
        expected = numbers(dataset.loader(BATCH, prepare=numbered), 10)
    assert names["state"]["step"] == 9 and model.seen == module.net.seen == expected[:9]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # Lightning: advice, and a torch of before
def test_in_lightning(dataset: Dataset, tmp_path: Path) -> None:
    """Lightning keeps the loader's own state in its checkpoint; stopped after step 4 of 9 and gone on."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Linear()

        def training_step(self, batch: dict[str, torch.Tensor], at: int) -> torch.Tensor:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train(steps: int, resume: Path | None = None) -> tuple[Linear, Any]:
        module = Module()
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(tmp_path),
        )
        loader = dataset.loader(BATCH, prepare=numbered, steps=9)
        trainer.fit(module, train_dataloaders=loader, ckpt_path=resume)
        return module.net, trainer

    whole, _ = train(9)
    first, trainer = train(4)
    trainer.save_checkpoint(tmp_path / "at-4.ckpt")
    second, _ = train(9, tmp_path / "at-4.ckpt")
    assert whole.seen == numbers(dataset.loader(BATCH, prepare=numbered), 9) == first.seen + second.seen
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters()))
