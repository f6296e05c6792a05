"""Tasks are found by name, need no torch to be found, and have all that the loop asks for."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import task_file, tasks
from pipeline.errors import ConfigError


def test_a_name_is_a_file_in_the_folder() -> None:
    assert tasks.find("image_classification").__name__ == "pipeline.tasks.image_classification"
    assert {"image_classification", "language_modeling"} <= set(task_file.names())


def test_a_wrong_name_gives_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean language_modeling"):
        tasks.find("langauge_modelling")


def test_somebody_elses_task_by_its_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "flowers_and_trees"
    package.mkdir()
    (package / "task.py").write_text("class Config: ...\nclass Task: ...\n")
    (package / "nothing.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert tasks.find("flowers_and_trees.task").Task.__name__ == "Task"
    with pytest.raises(ConfigError, match="class Config and a class Task"):
        tasks.find("flowers_and_trees.nothing")
    with pytest.raises(ConfigError, match="PYTHONPATH"):
        tasks.find("flowers_and_bushes.task")


@pytest.mark.parametrize("name", task_file.names())
def test_each_task_has_what_the_loop_asks_for(name: str) -> None:
    """`kept` is for those that can start from a pretrained folder."""
    module = tasks.find(name)
    task, starts = module.Task, "pretrained" in module.Config.model_fields
    wanted = [method for method in vars(tasks.Task) if not method.startswith("_")]
    assert {"build_model", "prepare", "weight", "loss", "score", "flops_per_sample"} <= set(wanted)
    for method in wanted:
        ours, theirs = inspect.signature(getattr(tasks.Task, method)), inspect.signature(getattr(task, method))
        asked = [each for each in ours.parameters if each != "kept" or starts]
        assert asked == list(theirs.parameters), method


def test_no_task_imports_torch_before_it_trains() -> None:
    modules = ", ".join(f"pipeline.tasks.{name}" for name in task_file.names())
    heavy = "{'torch', 'transformers', 'deepspeed', 'ray', 'tokenizers'}"
    program = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
