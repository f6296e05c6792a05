"""The driver around one plain process: going on, starting afresh, refusing, and the exit codes, without Ray."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configs
from pipeline.checkpoint.format import list_checkpoints
from pipeline.cluster import driver, lease
from pipeline.errors import CheckpointError, ConfigError, RunError
from pipeline.run import Run
from pipeline.track import journal
from pipeline.track.page import model
from tests import small_data

TASK = {"name": "tests.poisoned_task"}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    pictures = small_data.images(tmp_path / "pictures")
    data = {"train": str(pictures), "evaluate": {"test": str(pictures)}}
    return small_data.config(tmp_path / "toy.yaml", TASK, pictures, data=data, steps=6, checkpoint={"every": 2})


def train(toy: Path, *changes: str, fresh: bool = False, new_order: bool = False) -> int:
    return driver.run(configs.load(toy, ["cluster.workers=0", *changes]), fresh=fresh, new_order=new_order)


def records(toy: Path, kind: str, run: str = "toy") -> list[dict[str, Any]]:
    path = toy.parent / "runs" / run / "journal.jsonl"
    return [record for record in journal.read(path).records if record["kind"] == kind]


def test_again_goes_on_and_fresh_starts_beside(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = toy.parent / "runs"
    assert train(toy) == driver.DONE
    assert "done: step 6 of 6" in capsys.readouterr().out
    assert train(toy) == driver.DONE
    assert "is finished" in capsys.readouterr().out
    assert train(toy, "steps=8") == driver.DONE
    said = capsys.readouterr().out
    assert "changed since the last attempt: steps" in said and "going on from step 6" in said
    assert "not bitwise: steps 6 -> 8" in said
    before = sorted(path.name for path in (runs / "toy" / "checkpoints").iterdir())
    assert train(toy, fresh=True) == driver.DONE
    assert "training from step 0" in capsys.readouterr().out
    assert sorted(path.name for path in (runs / "toy" / "checkpoints").iterdir()) == before
    assert Run(runs / "toy-2").finished and Run(runs / "toy").curve("train/loss")[0] == list(range(8))


def test_a_run_goes_on_in_its_own_folder_and_is_listed(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(toy, "steps=4") == driver.DONE
    assert train(toy, "steps=4", fresh=True) == driver.DONE
    first, runs = toy.parent / "runs" / "toy", toy.parent / "runs"
    longer = configs.load(first / "config.yaml", ["steps=6"])
    assert driver.run(longer, folder=first) == driver.DONE
    assert "going on from step 4" in capsys.readouterr().out
    assert Run(first).finished and Run(runs / "toy-2").config.steps == 4
    rows = {row["name"]: row for row in model.rows(runs)}
    told = [tuple(rows[name][key] for key in ("state", "last_step", "steps")) for name in ("toy", "toy-2")]
    assert told == [("done", 6, 6), ("done", 4, 4)]
    with lease.take(first):
        row = next(row for row in model.rows(runs) if row["name"] == "toy")
        assert row["state"] == "training" and row["owner"].startswith("process")
    with pytest.raises(RunError, match="holds no runs"):
        model.rows(toy.parent / "pictures")


def test_missing_checkpoints_are_not_a_fresh_start(toy: Path) -> None:
    assert train(toy) == driver.DONE
    shutil.rmtree(toy.parent / "runs" / "toy" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"step 6 was saved there.*--fresh"):
        train(toy)


def test_other_data_is_refused_with_the_difference(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(toy) == driver.DONE
    capsys.readouterr()
    small_data.images(toy.parent / "others", count=50)
    assert train(toy, "steps=8", f"data.train={toy.parent}/others") == driver.GIVE_UP
    said = capsys.readouterr().out
    assert (
        "was trained on other data" in said
        and "data of train" in said
        and "--fresh" in said
        and "Traceback" not in said
    )
    assert Run(toy.parent / "runs" / "toy").config.steps == 6  # a configuration that is refused is not the run's


def test_a_wrong_decoder_is_found_before_anything_starts(toy: Path) -> None:
    with pytest.raises(ConfigError, match="no_such_module"):
        train(toy, "data.decoders={tif: 'no_such_module:read'}")
    assert not (toy.parent / "runs").exists()


def test_a_best_by_what_no_evaluation_tells_ends_the_run(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No checkpoint would ever be kept as the best, and nobody would know. What was trained is saved."""
    assert train(toy, "evaluate.best=test/accurcy", "evaluate.every=5") == ConfigError.exit_code
    said = capsys.readouterr().out
    assert "evaluate.best: 'test/accurcy' is not what an evaluation tells; set it to one of test/loss" in said
    assert [each.step for each in list_checkpoints(toy.parent / "runs" / "toy" / "checkpoints")] == [2, 4, 5]
    assert train(toy, "evaluate.best=test/loss") == driver.DONE
    assert "from step 5" in capsys.readouterr().out


def test_another_order_on_purpose_goes_on_and_is_the_run_s_from_then_on(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(toy) == driver.DONE
    small_data.images(toy.parent / "others", count=50)
    both = f"data.train={{train: {toy.parent}/pictures, others: {toy.parent}/others}}"
    assert train(toy, "steps=8", both) == driver.GIVE_UP
    assert "new source others" in capsys.readouterr().out
    assert train(toy, "steps=8", both, new_order=True) == driver.DONE
    said = capsys.readouterr().out
    assert "going on from step 6; new order from step 6" in said and "Traceback" not in said
    assert train(toy, "steps=10", both) == driver.DONE  # nothing is another any more
    assert "new order" not in capsys.readouterr().out
    assert [record["step"] for record in records(toy, "step")] == list(range(10))


def test_bad_samples_end_the_run_or_are_replaced_and_stay_so(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was decided is replayed after a restart, though the shard has been mended meanwhile."""
    shard = toy.parent / "pictures" / "shard-002.tar"
    good = shard.read_bytes()
    damaged = bytearray(good)
    for place in (600, 4 * 1536 + 600):  # inside two of its pictures
        damaged[place] ^= 8
    shard.write_bytes(damaged)
    steps = "steps=12"
    assert train(toy, steps) == driver.GIVE_UP
    said = capsys.readouterr().out
    assert "are not those that were indexed" in said and "shard-002.tar" in said and "Traceback" not in said
    substitute = [steps, "data.bad_samples=substitute", "data.evaluate={}"]
    assert train(toy, *substitute, "data.max_bad_samples=1", fresh=True) == driver.GIVE_UP
    assert "2 bad samples, data.max_bad_samples is 1" in capsys.readouterr().out
    assert train(toy, *substitute, fresh=True) == driver.DONE
    assert "bad sample replaced" in capsys.readouterr().out
    whole = [(record["step"], record["samples"]) for record in records(toy, "step", "toy-3")]
    replaced = records(toy, "substitute", "toy-3")
    assert [record["source"] for record in replaced] == ["train", "train"]
    assert all("not those that were indexed" in record["reason"] for record in replaced)

    assert train(toy, *substitute, "steps=8", fresh=True) == driver.DONE
    shard.write_bytes(good)
    assert train(toy, *substitute) == driver.DONE
    assert [(record["step"], record["samples"]) for record in records(toy, "step", "toy-4")] == whole
    [*_, saved] = Run(toy.parent / "runs" / "toy-4").checkpoints()
    assert saved.manifest is not None and len(saved.manifest.data["substitutes"]) == 2


def test_a_checkpoint_that_cannot_be_written_costs_only_itself(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(toy, "steps=4") == driver.DONE
    (toy.parent / "runs/toy/checkpoints/.staging-00000006-a2").touch()  # where the second attempt wants a folder
    assert train(toy, "steps=8") == driver.DONE
    said = capsys.readouterr().out
    assert "step      6  checkpoint not written" in said and "Training goes on" in said and "Traceback" not in said
    assert [record["step"] for record in records(toy, "save_failed")] == [6]
    assert [record["step"] for record in records(toy, "save")] == [2, 4, 8]
    assert [listed.step for listed in Run(toy.parent / "runs" / "toy").checkpoints()] == [2, 4, 8]


def test_the_last_checkpoint_must_be_written(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(toy, "steps=4") == driver.DONE
    for attempt in range(2, 6):
        (toy.parent / f"runs/toy/checkpoints/.staging-00000006-a{attempt}").touch()
    assert train(toy, "checkpoint.background=false") == driver.GIVE_UP
    assert "checkpoint not written" in capsys.readouterr().out
    assert [listed.step for listed in Run(toy.parent / "runs" / "toy").checkpoints()] == [2, 4]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(toy) == driver.DONE
    [shard] = (toy.parent / "runs/toy/checkpoints/checkpoint-00000006").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    shard.write_bytes(content)
    assert train(toy, "steps=8") == driver.DONE
    said = capsys.readouterr().out
    assert "damaged, passed over" in said and shard.name in said and "going on from step 4" in said


def test_a_failing_worker_ends_in_a_crash_loop_with_its_traceback(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(toy, "task.name=tests.failing_task", "checkpoint.every=5") == driver.GIVE_UP
    said = capsys.readouterr().out
    assert "the same failure 3 times" in said and "ZeroDivisionError" in said
    assert said.count("(restart") == 2 and "tests/failing_task.py" in said


def test_two_at_once_are_refused(toy: Path) -> None:
    folder = toy.parent / "runs" / "toy"
    with lease.take(folder), pytest.raises(RunError, match="already active"):
        train(toy)
    assert not (folder / "journal.jsonl").exists()


def test_evaluation_of_a_checkpoint_repeats_what_training_said(toy: Path) -> None:
    assert train(toy, "evaluate.every=2") == driver.DONE
    run = Run(toy.parent / "runs" / "toy")
    steps, losses = run.curve("eval/test/loss")
    assert steps == [2, 4, 6]
    assert driver.evaluate(run.folder) == (6, {"eval/test/loss": losses[-1]})
    assert driver.evaluate(run.folder, 4) == (4, {"eval/test/loss": losses[-2]})
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; there are \[2, 4, 6\]"):
        driver.evaluate(run.folder, 3)
