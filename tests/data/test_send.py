"""A data set at a URL is whole or absent: killed on the way, beside something else, with the server away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from pipeline import object_store
from pipeline.data import index, send
from pipeline.data.root import ROOT
from pipeline.data.send import SENDING
from pipeline.errors import DataError
from tests.checkpoint.object_store import BUCKET, ObjectStore
from tests.small_tars import contents, samples, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 40), ("test", 2)):
        (tmp_path / "set" / split).mkdir(parents=True)
        for number in range(count):
            write_tar(tmp_path / "set" / split / f"{number:02d}.tar", samples(3, 3 * number))
        index.build(tmp_path / "set" / split)
        (tmp_path / "set" / split / "classes.json").write_text("[]")
    return tmp_path / "set"


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_on_the_way_it_goes_on(folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    command = [sys.executable, "-m", "pipeline", "data", "send", str(folder), f"file://{there}", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while len(list(there.glob("train/*.tar"))) < 5:
        assert process.poll() is None
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (there / SENDING).exists() and not list(there.rglob(ROOT))
    kept = {path: path.stat().st_mtime_ns for path in there.glob("t*/*.idx")}
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and f"{there}" in done.stdout and "sent " in done.stdout, done.stderr
    assert files(there) == files(folder)
    again = [path for path, modified in kept.items() if path.stat().st_mtime_ns != modified]
    assert len(again) <= 1 < len(kept)  # the one that was on its way
    assert send.send(folder, f"file://{there}") == (0, 0)
    assert contents(there / "train") == contents(folder / "train")


def test_to_a_new_folder_by_its_relative_path(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    send.send(folder / "train", "new/there")
    assert contents(tmp_path / "new/there") == contents(folder / "train")


def test_what_is_there_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    send.send(folder / "train", f"file://{there}")
    before = files(there)
    with pytest.raises(DataError, match="holds something else already"):
        send.send(folder / "test", f"file://{there}")
    (there / ROOT).unlink()
    with pytest.raises(DataError, match="holds something else already"):
        send.send(folder / "train", f"file://{there}")
    assert files(there) == {name: data for name, data in before.items() if name != ROOT}
    with pytest.raises(DataError, match="no index of shards"):
        send.send(tmp_path, f"file://{tmp_path}/other")
    with pytest.raises(DataError, match="nothing://x"):
        send.send(folder, "nothing://x/y")


def test_below_a_file_it_is_refused_at_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"Not a directory.*; choose another folder$") as error:
        send.send(folder, str(tmp_path / "file" / "there"))
    assert "tried" not in str(error.value)


@pytest.mark.slow
def test_to_a_store_that_goes_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore()
    store.start()
    try:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        opened = partial(object_store.open_store, pauses=())  # s3fs tries again by itself
        monkeypatch.setattr(send, "open_store", opened)
        url = f"s3://{BUCKET}/photos"
        assert send.send(folder, url).files == len(files(folder))
        assert send.send(folder, url) == (0, 0)
        with pytest.raises(DataError, match="holds something else already"):
            send.send(folder / "test", url)
    finally:
        store.kill()
    with pytest.raises(DataError, match=rf"s3://{BUCKET}/photos: .*the same command goes on"):
        send.send(folder, url)
