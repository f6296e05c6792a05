"""The `millstream` command: help, exit codes, messages without tracebacks, data and checkpoints on disk."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import typer.main

from pipeline import cli
from pipeline.config import dump, load, resolve
from tests.checkpoint import small_checkpoint
from tests.small_project import project, written

__all__ = ["project"]  # a fixture for every test here

ROOT = Path(__file__).parents[1]
MILLSTREAM = [sys.executable, "-m", "pipeline"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


class Done(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def millstream(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["millstream", *map(str, arguments)])
        term = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        signal.signal(signal.SIGTERM, term)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Done(int(ended.value.code or 0), out, err)

    return run


def digits(path: Path, rows: int) -> Path:
    """Grey images of 8 x 8 as flat rows, the class in the last column."""
    rng = np.random.default_rng(3)
    pixels, classes = rng.integers(0, 256, (rows, 64)), rng.integers(0, 10, (rows, 1))
    np.save(path, np.concatenate([pixels, classes], axis=1).astype(np.uint8))
    return path


def commands() -> list[list[str]]:
    """Every command and group, as its words."""

    def below(command: object, words: list[str]) -> list[list[str]]:
        inner = getattr(command, "commands", {})
        return [words, *(found for name, each in inner.items() for found in below(each, [*words, name]))]

    return below(typer.main.get_command(cli.app), [])


def test_the_commands_are_these() -> None:
    expected = (
        "checkpoint, checkpoint diff, checkpoint export, checkpoint list, checkpoint prune, checkpoint upload, "
        "checkpoint verify, dashboard, data, data head, data index, data merge, data pack, data preview, data repair, "
        "data send, data simulate, data stats, data verify, doctor, evaluate, init, report, resume, runs, sample, "
        "submit, submit k8s, submit logs, submit ray, submit resume, submit slurm, submit status, submit stop, sweep, "
        "track, track repair, track status, track sync, train, verify-resume"
    )
    assert ", ".join(sorted(" ".join(words) for words in commands())[1:]) == expected


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_help_has_an_example_that_is_right(millstream: Run, words: list[str]) -> None:
    done = millstream(*words, "--help")
    example = re.search(r"Example: millstream (.+)", done.out)
    assert done.code == 0 and example, done.out
    given = example[1].split()
    assert given[: len(words)] == words
    command = typer.main.get_command(cli.app)
    while given and hasattr(command, "commands"):
        command = command.commands[given.pop(0)]  # type: ignore[attr-defined]
    command.make_context("example", given)  # raises on an option or argument that does not exist


def test_version_and_no_arguments(millstream: Run) -> None:
    assert re.fullmatch(r"millstream \d+\.\d+\.\d+\n", millstream("--version").out)
    assert "Commands" in millstream().out


def test_completion_offers_commands_and_keys(project: Path) -> None:
    def offered(line: str) -> str:
        words = {"_MILLSTREAM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
        code = "import sys; sys.argv = ['millstream']; from pipeline.cli import app; app(prog_name='millstream')"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**ENVIRONMENT, **words}
        )
        return done.stdout

    assert "checkpoint" in offered("millstream che")
    assert "optim.lr=" in offered("millstream train good.yaml optim.l")


def test_a_wrong_configuration_lists_its_problems(millstream: Run) -> None:
    done = millstream("train", "good.yaml", "stepz=3", "optim.lr=-1", "--fresh")
    assert done.code == 78 and done.out == ""
    assert done.err == (
        "good.yaml has 2 problems:\n"
        "1. command line: optim.lr: must be more than 0, not -1\n"
        "2. command line: stepz: there is no such key\n"
        "   -> did you mean steps?\n"
    )
    done = millstream("train", "gone.yaml")
    assert done.code == 78 and done.err.startswith("gone.yaml cannot be read: No such file or directory\n")


def test_messages_are_never_read_as_markup(millstream: Run) -> None:
    assert "[bold]x[/bold]" in millstream("data", "pack", "[bold]x[/bold]", "out").err
    assert "[/]" in millstream("train", written("name: '[/]'\n")).err


def test_a_data_set_from_pack_to_verify(millstream: Run, project: Path) -> None:
    source = digits(project / "digits.npy", 120)
    shape = ["--shape", "8x8", "--shard-mb", "0.05", "--threads", "1"]
    done = millstream("data", "pack", source, "made", "--holdout", "20", "--licence", "CC0-1.0", *shape)
    assert (done.code, done.err) == (0, "")
    assert "made/train 100 samples, made/test 20 samples" in done.out
    data = done.out.splitlines()[-1].strip().removeprefix("data: ")
    assert load("good.yaml", [f"data={data}"]).data.evaluate == {"test": Path("made/test")}
    assert "millstream data pack" in (project / "made/train/card.json").read_text()

    again = millstream("data", "pack", source, "made", *shape)
    assert again.code == 1 and "exists already" in again.err

    looked = millstream("data", "preview", "made/train", "--count", "2")
    assert looked.code == 0 and "100 samples" in looked.out and "uint8[8, 8, 1]" in looked.out
    assert millstream("data", "preview", "made/train", "--sheet", "sheet.png").code == 0
    assert (project / "sheet.png").read_bytes().startswith(b"\x89PNG")

    assert "100 samples" in millstream("data", "verify", "made/train").out
    identity = re.search(r"identity (\w+)", looked.out)
    for path in Path("made/train").glob("*.idx"):  # shards.idx too
        path.unlink()
    missing = millstream("data", "verify", "made/train")
    assert missing.code == 1 and "millstream data index made/train" in missing.err
    made = millstream("data", "index", "made/train", "--workers", "1")
    assert made.code == 0 and identity and identity[0] in made.out


def test_images_are_packed_by_their_folders(project: Path) -> None:
    """In a process of its own: what another test has imported hides what a command forgets to."""
    from PIL import Image

    for name in ("cat", "dog"):
        (project / "photos" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), (number, 9, 9)).save(project / "photos" / name / f"{number}.png")
    done = subprocess.run(
        [*MILLSTREAM, "data", "pack", "photos", "made"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "made/train 6 samples" in done.stdout, done.stderr


def test_verify_names_a_flipped_bit(millstream: Run, project: Path) -> None:
    millstream("data", "pack", digits(project / "digits.npy", 40), "made", "--shape", "8x8")
    shard = sorted(Path("made/train").glob("*.tar"))[1]
    content = bytearray(shard.read_bytes())
    content[512 + 60] ^= 4  # inside the first member, behind its header
    shard.write_bytes(content)
    done = millstream("data", "verify", "made/train")
    assert done.code == 1 and shard.name in done.out and "1 damaged" in done.out and "all good" not in done.out


def test_data_sets_are_made_of_others(millstream: Run, project: Path) -> None:
    rows = "".join(f"k{i},{'dog' if i % 2 else 'cat'},row {i}\n" for i in range(40))
    Path("in.csv").write_text("id,label,text\n" + rows)
    columns = ["--field", "cls=label", "--field", "txt=text", "--key", "id"]
    assert millstream("data", "pack", "in.csv", "made", "--holdout", "10", *columns).code == 0
    wrong = millstream("data", "pack", "in.csv", "other", "--field", "cls=lable")
    assert wrong.code == 1 and "no column 'lable'; did you mean 'label'?" in wrong.err
    assert millstream("data", "pack", "in.csv", "other", "--field", "label").code == 2
    Path("keys").write_text("k1\nk2\nk3\n")
    both = millstream("data", "merge", "made/train", "made/test", "both")
    assert both.code == 0 and "both: 40 samples in 8 shards" in both.out
    part = millstream("data", "pack", "both", "part", "--only", "keys", "--no-shuffle")
    assert part.code == 0 and "part/train 3 samples" in part.out
    shown = millstream("data", "head", "both", "k7", "--to", "looked")
    assert shown.code == 0 and "cls: 1 (dog)" in shown.out and Path("looked/k7.txt").read_text() == "row 7"
    good = millstream("data", "repair", "both", "good", "--drop", "keys", "--workers", "1")
    assert good.code == 0 and "left out k1: its key is on" in good.err and "good: 37 samples" in good.out


@pytest.mark.parametrize("wrong", ["8", "8xx8", "x", "8x8x3x1x1"])
def test_a_shape_that_is_none(millstream: Run, project: Path, wrong: str) -> None:
    done = millstream("data", "pack", digits(project / "digits.npy", 4), "made", "--shape", wrong)
    assert done.code in (1, 2) and not Path("made").exists() and wrong.replace("xx", "x")[0] in done.err


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_pack_goes_on(project: Path, stop: signal.Signals) -> None:
    digits(project / "digits.npy", 60_000)
    pack = [*MILLSTREAM, "data", "pack", "digits.npy", "out/many", "--shape", "8x8"]
    process = subprocess.Popen(pack, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    work = project / "out/.many.packing"
    while len(list(work.glob("spool/*.json"))) < 1:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(stop)
    _, err = process.communicate()
    assert process.returncode == 130 and "Traceback" not in err
    command = "millstream data pack digits.npy out/many --shape 8x8"
    kept = f"what is done is kept, and the same command goes on from there: {command}"
    assert err.split("\n") == ["", kept, "", "stopped; no file is half-written", ""]
    assert [path.name for path in (project / "out").iterdir()] == [work.name]
    done = subprocess.run(pack, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "out/many/train 60,000 samples" in done.stdout
    assert [path.name for path in (project / "out").iterdir()] == ["many"]


def test_checkpoints_are_listed_and_verified(millstream: Run, project: Path) -> None:
    (project / "run").mkdir()
    (project / "run" / "config.yaml").write_text(dump(resolve(load("good.yaml"))))
    assert "none yet" in millstream("checkpoint", "list", "run").out
    paths = [small_checkpoint.save(project / "run" / "checkpoints", step) for step in (20, 40)]
    listed = millstream("checkpoint", "list", "run")
    assert listed.code == 0 and re.search(r"^40 .* 3\.0 kB .*train/loss 40\.1 .*good *$", listed.out, re.MULTILINE)
    assert "2 checkpoints" in millstream("checkpoint", "verify", "run").out

    shard = paths[0] / "rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[900] ^= 1
    shard.write_bytes(content)
    done = millstream("checkpoint", "verify", "run")
    assert done.code == 1 and str(shard) in done.out and "1 of 2 checkpoints damaged" in done.out
    (paths[1] / "rank-00000.safetensors").unlink()
    assert "rank-00000.safetensors" in millstream("checkpoint", "list", "run").out


def test_checkpoints_are_pruned_as_asked(millstream: Run, project: Path) -> None:
    changes = ["checkpoint.keep=3", "evaluate.every=10", "guard.rollbacks=0"]
    (project / "run").mkdir()
    (project / "run" / "config.yaml").write_text(dump(resolve(load("good.yaml", changes))))
    assert "none yet" in millstream("checkpoint", "prune", "run").out
    folder = project / "run" / "checkpoints"
    scores = {10: 0.9, 20: 0.1, 30: 0.3, 40: 0.2, 50: 0.5}
    for step, score in scores.items():
        small_checkpoint.save(folder, step, metrics={"eval/test/accuracy": score})
    done = millstream("checkpoint", "prune", "run", "--dry-run")
    assert re.findall(r"^(goes|stays) +(\d+)", done.out, re.MULTILINE) == [
        ("goes", "10"), ("goes", "20"), ("stays", "30"), ("stays", "40"), ("stays", "50")
    ]  # fmt: skip
    assert re.search(r"2 of 5 checkpoints would go, \d\.\d kB would be free; nothing was deleted", done.out)
    assert len(os.listdir(folder)) == 5
    done = millstream("checkpoint", "prune", "run", "--keep", "1", "--best", "test/accuracy:max", "--keep-every", "40")
    assert done.code == 0 and "2 of 5 checkpoints deleted" in done.out
    assert sorted(int(name[-8:]) for name in os.listdir(folder)) == [10, 40, 50]
    assert "nothing to delete" in millstream("checkpoint", "prune", "run").out
    done = millstream("checkpoint", "prune", "run", "--best", "test/accuracy")
    assert done.code == 2 and "test/accuracy:max or test/accuracy:min" in done.err


def test_checkpoints_are_sent_by_hand(millstream: Run, project: Path) -> None:
    (project / "run").mkdir()
    (project / "run" / "config.yaml").write_text(dump(resolve(load("good.yaml", ["checkpoint.keep=3"]))))
    assert "give --url, or set checkpoint.url" in millstream("checkpoint", "upload", "run").err
    folder = project / "run" / "checkpoints"
    for step in (10, 20, 30):
        small_checkpoint.save(folder, step)
    (folder / "checkpoint-00000020" / "rank-00000.safetensors").write_bytes(bytes(1500))
    far = f"file://{project}/far"
    done = millstream("checkpoint", "upload", "run", "--url", far)
    assert done.code == 1 and "step 30: 3.0 kB in" in done.out and "does not match its sha256" in done.out
    small_checkpoint.save(folder, 20, attempt=2)
    done = millstream("checkpoint", "upload", "run", "--url", far)
    assert done.code == 0 and done.out.splitlines()[-1] == f"all is at {far}/run"
    assert sorted(os.listdir(project / "far" / "run")) == sorted(os.listdir(folder))


def test_folders_that_are_no_runs(millstream: Run, project: Path) -> None:
    (project / "runs" / "first").mkdir(parents=True)
    (project / "runs" / "first" / "config.yaml").write_text("")
    for words in (["checkpoint", "list", "runs"], ["checkpoint", "verify", "runs"], ["evaluate", "runs"]):
        done = millstream(*words)
        assert done.code == 1 and "no run folder" in done.err and "runs in it: first" in done.err
    done = millstream("evaluate", "good.yaml")
    assert done.code == 1 and "train it first: millstream train good.yaml" in done.err
