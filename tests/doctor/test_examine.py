"""What `millstream doctor` finds: the entries of the corpus, and the forms in which it says so."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline import cli
from pipeline import config as configs
from pipeline.doctor.examine import before, refuse
from pipeline.doctor.findings import Report, told
from pipeline.problems import InvalidConfig
from tests.doctor import corpus, examined

DEVELOPMENT = [entry for entry in corpus.entries("broken") if entry["id"] not in corpus.held_out()]
FRESH = corpus.entries("fresh")
HELD_OUT = [entry for entry in corpus.entries("broken") if entry["id"] in corpus.held_out()]
GOOD = corpus.entries("good")
SLOW_ALONE = ("disk-too-small", "network-too-large-here", "zero-3", "offload")  # seconds of fake tensors
STEP = ("sees-the-future",)  # only the real step shows it
FEW = random.Random(0).sample([entry for entry in DEVELOPMENT if entry["id"] not in SLOW_ALONE], 20)


def named(entry: dict[str, Any]) -> str:
    return entry["id"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus.make_good(tmp_path_factory.mktemp("good"))


def check(entry: dict[str, Any], good: Path, folder: Path, quick: bool = True) -> None:
    report = examined.run(entry, good, folder / "it", quick=quick)
    said = "\n".join(f"{finding.level} {finding.problem}" for finding in report.findings)
    assert examined.found(entry, report), f"{entry['id']} is not found in:\n{said}"
    assert all(finding.problem.message for finding in report.findings)


@pytest.mark.parametrize("entry", FEW, ids=named)
def test_finds_what_is_broken(entry: dict[str, Any], good: Path, tmp_path: Path) -> None:
    check(entry, good, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("entry", [*DEVELOPMENT, *HELD_OUT, *FRESH], ids=named)
def test_finds_every_entry(entry: dict[str, Any], good: Path, tmp_path: Path) -> None:
    check(entry, good, tmp_path, quick=entry["id"] not in STEP)


@pytest.mark.parametrize("entry", GOOD[:6], ids=named)
def test_leaves_good_runs_alone(entry: dict[str, Any], good: Path, tmp_path: Path) -> None:
    assert examined.alarms(entry, examined.run(entry, good, tmp_path / "it")) == []


@pytest.mark.slow
@pytest.mark.parametrize("entry", GOOD, ids=named)
def test_leaves_every_good_run_alone(entry: dict[str, Any], good: Path, tmp_path: Path) -> None:
    assert examined.alarms(entry, examined.run(entry, good, tmp_path / "it")) == []


@pytest.mark.slow
def test_a_good_run_takes_its_real_step(good: Path, tmp_path: Path) -> None:
    report = examined.run(GOOD[0], good, tmp_path / "it", quick=False)
    assert examined.alarms(GOOD[0], report) == [] and report.figures["step"] == {"sees_ahead": False}


def test_all_mistakes_come_at_once_each_with_its_line(good: Path, tmp_path: Path) -> None:
    entry = {
        "id": "x",
        "base": "images",
        "set": {"task.classes": 3, "optim.lr": 500.0, "evaluate.best": "test/accurcy"},
    }
    report = examined.run(entry, good, tmp_path / "it")
    found = {finding.problem.place: finding.problem for finding in report.findings}
    lines = (tmp_path / "it" / "run.yaml").read_text().splitlines()
    for place in ("task.classes", "optim.lr", "evaluate.best"):
        line = found[place].line
        assert line and lines[line - 1].strip().startswith(place.rpartition(".")[2] + ":")


@pytest.mark.parametrize(
    ("base", "key", "value"), [("words", "task.length", 8), ("images", "task.classes", 3), ("words", None, None)]
)
def test_train_and_submit_ask_it_too(base: str, key: str | None, value: int, good: Path, tmp_path: Path) -> None:
    entry = {"id": "x", "base": base, "set": {key: value} if key else {}}
    config = configs.load(corpus.make(entry, good, tmp_path / "it"))
    said = [finding.problem.place for finding in before(config).of("error")]
    assert set(said) == ({key} if key else set())
    report = examined.run(entry, good, tmp_path / "whole")
    assert set(said) <= {finding.problem.place for finding in report.of("error")}


def test_train_says_its_warnings_and_stops_at_errors(good: Path, tmp_path: Path) -> None:
    set_values = {"optim.lr": 500.0, "cluster.workers": 3}
    path = corpus.make({"id": "x", "base": "images", "set": set_values}, good, tmp_path / "it")
    heard: list[str] = []
    refuse(configs.load(path), heard.append)
    said = "\n".join(heard)
    assert "far too high" in said and "do not divide among 3 workers" in said
    with pytest.raises(InvalidConfig, match="labels go from 0 to 2"):
        refuse(configs.load(path, ["task.classes=3"]), heard.append)


def test_the_command_says_it_to_people_and_programs(good: Path, tmp_path: Path) -> None:
    path = corpus.make({"id": "x", "base": "images", "set": {"task.classes": 3}}, good, tmp_path / "it")
    shown = CliRunner().invoke(cli.app, ["doctor", str(path), "--quick"])
    assert shown.exit_code == 78 and "would fail: 2 errors" in shown.stdout
    told = CliRunner().invoke(cli.app, ["doctor", str(path), "task.classes=4", "--quick", "--json"])
    values = json.loads(told.stdout)
    assert told.exit_code == 0 and not values["fails"] and values["seconds"]["all"] > 0
    assert values["figures"]["epochs"] == {"data.train": pytest.approx(20 * 16 / 96, abs=0.01)}


@pytest.mark.parametrize(
    ("text", "place", "message", "mend"),
    [
        ("task.length: is 3, not 4; set it to 4", "task.length", "is 3, not 4", "set it to 4"),
        ("task.model: no heads", "task.model", "no heads", None),
        ("optimizer: is off", "elsewhere", "optimizer: is off", None),
        ("sample 3 has label 9; mend it", "elsewhere", "sample 3 has label 9", "mend it"),
    ],
)
def test_an_error_of_another_part_keeps_its_place(text: str, place: str, message: str, mend: str | None) -> None:
    problem = told(text, "elsewhere")
    assert (problem.place, problem.message, problem.suggestion) == (place, message, mend)


def test_the_same_is_said_once() -> None:
    report = Report()
    for _ in range(2):
        report.add("error", "data", "data.train", "is gone")
    assert len(report.findings) == 1 and report.fails
