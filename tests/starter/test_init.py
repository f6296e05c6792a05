"""From a folder of raw data to a configuration that is good: looked at, packed as it says, examined."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from typer.testing import CliRunner

from pipeline import cli
from pipeline.config import load
from pipeline.data import index
from pipeline.doctor.examine import examine
from pipeline.errors import ConfigError
from pipeline.sections import Source
from pipeline.track.journal import read
from tests import small_data


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pictures(folder: Path, size: tuple[int, int] = (40, 30), grey: bool = False) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(20):
            shape = size if grey else (*size, 3)
            Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(folder / name / f"{number}.png")


def sounds(folder: Path, rate: int = 8000) -> None:
    """Tones of half a second, higher in the second class."""
    rng = np.random.default_rng(1)
    for name, pitch in (("high", 900), ("low", 300)):
        (folder / name).mkdir(parents=True)
        for number in range(20):
            wave = 0.3 * np.sin(2 * np.pi * pitch * np.arange(rate // 2) / rate) + rng.normal(0, 0.05, rate // 2)
            soundfile.write(folder / name / f"{number}.wav", wave, rate)


def commands(*words: str) -> list[list[str]]:
    """What `init` says to do next."""
    done = CliRunner().invoke(cli.app, ["init", *words])
    assert done.exit_code == 0, done.output
    return [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("  millstream")]


def follow(said: list[str]) -> None:
    done = CliRunner().invoke(cli.app, said[1:])
    assert done.exit_code == 0, done.output


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    pictures(Path("photos"))
    pack, doctor, train = commands("photos")
    follow(pack)
    config = load("photos.yaml")
    assert (config.task.name, getattr(config.task, "classes"), getattr(config.task, "channels")) == (  # noqa: B009
        "image_classification",
        2,
        3,
    )
    report = examine(Path(doctor[-1]), quick=True)
    assert report.of("error", "warning") == [] and train == ["millstream", "train", "photos.yaml"]


def test_a_folder_of_text(tmp_path: Path) -> None:
    Path("prose").mkdir()
    lines = [json.dumps({"text": f"The {n}th of many short stories, which is not long.\n" * 20}) for n in range(80)]
    Path("prose/all.jsonl").write_text("\n".join(lines))
    pack, doctor, _ = commands("prose")
    follow(pack)
    report = examine(Path(doctor[-1]), quick=True)
    assert [finding for finding in report.of("error", "warning") if finding.problem.place != "data.train"] == []


def test_shards_that_are_there(tmp_path: Path) -> None:
    small_data.images(Path("mine"))
    _doctor, _ = commands("mine", "--out", "first.yaml")
    config = load("first.yaml")
    assert getattr(config.task, "classes") == 4 and config.data.evaluate == {}  # noqa: B009


def test_shards_of_sounds_that_are_there(tmp_path: Path) -> None:
    small_data.sounds(tmp_path / "mine")
    doctor, _ = commands(str(tmp_path / "mine"))
    task = load(doctor[-1]).task
    assert (task.name, getattr(task, "classes"), getattr(task, "rate")) == ("audio_classification", 3, 8000)  # noqa: B009
    assert examine(Path(doctor[-1]), quick=True).of("error", "warning") == []


def test_a_home_folder_that_no_shell_has_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_data.images(tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["millstream", "init", "~/mine", "--out=~/first.yaml"])
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main()
    assert load("first.yaml").data.train == {"train": Source(folder=tmp_path / "mine")}


@pytest.mark.parametrize("name", ["Bilder für #1, {neu}", "2024"])
def test_names_of_folders_are_quoted_for_the_shell_and_for_yaml(name: str) -> None:
    pictures(Path(name))
    pack, doctor, _ = commands(name, "--out", "my first.yaml", "--data", "packed, all")
    follow(pack)
    config = load(doctor[-1])
    assert config.data.train == {"train": Source(folder=Path("packed, all", config.name, "train"))} and pack[3] == name
    doctor, _ = commands(str(Path("packed, all", config.name)), "--out", "again.yaml")
    again = load(doctor[-1])
    assert (again.name, again.data) == (config.name, config.data)


def test_a_file_gives_its_name_without_the_ending() -> None:
    Path("story.txt").write_text("Once upon a time.\n" * 2_000)
    pack, doctor, _ = commands("story.txt")
    assert pack[3:5] == ["story.txt", "data/story"] and doctor[-1] == "story.yaml"


@pytest.mark.parametrize(
    ("words", "says"), [(["--name", "my photos"], "no name of a run"), (["--out", "none/a.yaml"], "cannot be written")]
)
def test_what_cannot_be_written_is_said(words: list[str], says: str, tmp_path: Path) -> None:
    pictures(Path("photos"))
    done = CliRunner().invoke(cli.app, ["init", "photos", *words])
    assert isinstance(done.exception, ConfigError) and says in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    pictures(Path("photos"), grey=True)
    Path("photos.yaml").write_text("mine\n")
    done = CliRunner().invoke(cli.app, ["init", "photos"])
    assert done.exit_code != 0 and "not written over" in str(done.exception)
    assert Path("photos.yaml").read_text() == "mine\n"


def test_what_cannot_be_configured_is_said(tmp_path: Path) -> None:
    Path("one/only").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("one/only/a.png")
    small_data.images(Path("tars"))
    for path in Path("tars").glob("*.idx"):
        path.unlink()
    Path("table.csv").write_text("a,b\n1,2\n")
    for folder, says in (("one", "nothing to tell apart"), ("tars", "data index"), ("table.csv", "pack it first")):
        done = CliRunner().invoke(cli.app, ["init", folder])
        assert says in str(done.exception)
    assert index.build(Path("tars")).samples == 96


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["photos", "prose", "clips"])
def test_four_commands_from_a_folder_to_a_run(kind: str, tmp_path: Path) -> None:
    if kind == "photos":
        pictures(Path(kind))
    elif kind == "clips":
        sounds(Path(kind))
    else:
        Path(kind).mkdir()
        lines = [
            json.dumps({"text": f"The {n}th of many short stories, told {n * n} times.\n" * 20}) for n in range(80)
        ]
        Path(kind, "all.jsonl").write_text("\n".join(lines))

    def command(*words: str) -> str:
        done = subprocess.run([sys.executable, "-m", "pipeline", *words], capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    said = [shlex.split(line) for line in command("init", kind).splitlines() if line.startswith("  millstream")]
    assert [words[1] for words in said] == ["data", "doctor", "train"]
    pack, doctor, train = said
    command(*pack[1:])
    assert "good to go" in command(*doctor[1:])
    command(*train[1:], "steps=3", "optim.schedule.warmup=1", "cluster.workers=0")
    records = read(Path("runs") / kind / "journal.jsonl").records
    assert [each["reason"] for each in records if each["kind"] == "end"] == ["done"]
    assert sum(each["kind"] == "step" for each in records) == 3
