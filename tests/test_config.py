"""A configuration file is read, checked whole, and explained: every mistake at once, with place and mending."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import Config, difference, dump, load, load_resolved, resolve
from pipeline.errors import ConfigError
from pipeline.problems import InvalidConfig, Problem
from tests.small_project import GOOD, problems, project, written

__all__ = ["project"]  # a fixture for every test here


def test_five_mistakes_five_messages_and_no_torch(project: Path) -> None:
    path = written(
        """\
name: five
steps: many
global_batch_size: 100
micro_batch_size: 32
data:
  train: data/trian
task:
  name: image_clasification
optim:
  name: adamw
  lr: 3e-4
  weight_decya: 0.1
"""
    )
    code = f"""
import json, sys
from pipeline.config import load
from pipeline.errors import ConfigError
try:
    load({path!r})
except ConfigError as error:
    found = [[p.place, p.line, p.message, p.suggestion] for p in error.problems]
print(json.dumps([found, [name for name in ("torch", "transformers", "ray", "deepspeed") if name in sys.modules]]))
"""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=project,
        env={"PYTHONPATH": str(root)},
    )
    found, loaded = json.loads(done.stdout)
    assert loaded == []
    assert [(place, line) for place, line, _, _ in found] == [
        ("steps", 2),
        ("micro_batch_size", 4),
        ("data.train", 6),
        ("task.name", 8),
        ("optim.weight_decya", 12),
    ]
    messages, suggestions = [each[2] for each in found], [each[3] for each in found]
    assert messages[0] == "should be a whole number, not 'many'" and suggestions[0] is None
    assert (
        "100" in messages[1] and "32" in messages[1] and "25 or 50" in suggestions[1] and "96 or 128" in suggestions[1]
    )
    assert suggestions[2] == "did you mean data/train?"
    assert suggestions[3] == "did you mean image_classification?"
    assert suggestions[4] == "did you mean weight_decay?"


def test_numbers_and_words_that_yaml_misreads() -> None:
    """PyYAML alone reads 3e-4 as text, a bare `off` as false, a date as a date."""
    plain = yaml.safe_load("[3e-4, off, 2024-05-01]")
    assert plain[0] == "3e-4" and plain[1] is False and not isinstance(plain[2], str)
    named = load("good.yaml", ["name=2024-05-01", "track.group=off", "track.entity='1e5'", "compile=yes"])
    assert (named.name, named.track.group, named.track.entity, named.compile) == ("2024-05-01", "off", "1e5", True)
    assert load(written(dump(named))) == named
    config = load(
        "good.yaml",
        ["track.wandb=off", "task.width=1e1", "data.block_bytes=1e6", "steps=2E+3", "optim.betas=[0.9, 95e-2]"],
    )
    assert load(written(Path("good.yaml").read_text().replace("'3e-4'", "3e-4"))).optim.lr == 3e-4
    assert config.optim.lr == 3e-4 and config.track.wandb == "off"
    assert config.data.block_bytes == 1_000_000 and config.steps == 2000 and config.optim.betas == (0.9, 0.95)


def test_the_same_mistake_in_the_file_has_its_line() -> None:
    path = written(yaml.safe_dump({**GOOD, "optim": {"name": "adamw", "lr": 1, "clip": -1}}, sort_keys=False))
    (problem,) = problems(path=path)
    assert (problem.place, problem.line) == ("optim.clip", Path(path).read_text().splitlines().index("  clip: -1") + 1)
    assert load(path, ["optim.clip=null"]).optim.clip is None  # and the command line mends it


def test_overrides() -> None:
    groups = "optim.groups=[{match: '*.bias'}, {match: 'embed.*', lr_scale: 2}]"
    given = [
        "optim.lr=1e-3",
        "data.evaluate.more=data/test",
        groups,
        "optim.groups.0.lr_scale=0.5",
        "runs=~/x",
        "track.tags=[a, b]",
    ]
    config = load("good.yaml", given)
    assert config.optim.lr == 1e-3 and sorted(config.data.evaluate) == ["more", "test"]
    assert [group.lr_scale for group in config.optim.groups] == [0.5, 2.0]
    assert config.runs == Path.home() / "x" and config.track.tags == ("a", "b")


def test_a_run_is_read_without_its_data() -> None:
    Path("kept.yaml").write_text(dump(resolve(load("good.yaml"))))
    for path in Path("data").rglob("shards.idx"):
        path.unlink()
    assert load_resolved("kept.yaml").steps == 100
    assert len(problems(path="kept.yaml")) == 2


def test_dump_comes_back_equal_and_resolve_makes_paths_absolute() -> None:
    config = load(
        "good.yaml", ["track.wandb=off", "optim.eps=1e-12", "zero.extra={a: {b: 1}}", "task.vocabulary=good.yaml"]
    )
    assert load(written(dump(config))) == config
    absolute = resolve(config)
    assert absolute.data.train["train"].folder == Path.cwd() / "data/train" and absolute.runs == Path.cwd() / "runs"
    assert absolute.data.evaluate == {"test": Path.cwd() / "data/test"}
    assert absolute.task.model_dump()["vocabulary"] == Path.cwd() / "good.yaml"
    assert load(written(dump(absolute))) == absolute == resolve(absolute)


def test_difference_names_dotted_keys() -> None:
    config = load("good.yaml")
    other = load("good.yaml", ["optim.lr=1", "task.width=5", "data.evaluate={}", "cluster.workers=1"])
    assert difference(config, config) == []
    assert difference(config, other) == [
        "data.evaluate.test",
        "task.width",
        "optim.lr",
        "cluster.workers",
        "data.evaluate",
    ]


def test_micro_batches_and_frozen() -> None:
    config = load("good.yaml")
    assert config.micro_batches == 4 and [config.micro_steps(workers) for workers in (1, 2, 3, 4)] == [4, 2, 2, 1]
    with pytest.raises(ValidationError):
        config.optim.lr = 1.0  # type: ignore[misc]


def test_python_callers_meet_the_same_rules() -> None:
    with pytest.raises(ConfigError, match="not a multiple of micro_batch_size 24"):
        Config.model_validate({**GOOD, "micro_batch_size": 24})


def test_config_and_its_errors_travel_between_processes() -> None:
    config = load("good.yaml")
    assert pickle.loads(pickle.dumps(config)) == config
    error = InvalidConfig("a.yaml", [Problem("steps", "is missing", None, "add it")])
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.problems, str(copy), copy.exit_code) == (error.problems, str(error), 78)


def test_every_key_says_what_it_is() -> None:
    def silent(model: type[BaseModel], at: str = "") -> Iterator[str]:
        for name, info in model.model_fields.items():
            section = info.annotation if isinstance(info.annotation, type) else None
            if section and issubclass(section, BaseModel):
                yield from silent(section, f"{at}{name}.")
                yield from [] if section.__doc__ else [f"{at}{name}"]
            elif not info.description:
                yield f"{at}{name}"

    assert list(silent(Config)) == []
