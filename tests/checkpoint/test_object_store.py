"""Uploads to a real S3 server on loopback that is killed, stopped or refuses; and an uploader that is killed itself."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import format, uploads
from pipeline.checkpoint.format import checkpoint_name
from pipeline.checkpoint.remote import Absent, Remote
from pipeline.checkpoint.retention import Retention
from pipeline.checkpoint.uploads import Outbox, Uploader
from pipeline.errors import CheckpointError
from tests.checkpoint.object_store import BUCKET, ObjectStore
from tests.checkpoint.small_checkpoint import save

LIMIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    found = ObjectStore()
    found.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        yield found
    found.kill()


@pytest.fixture
def home(server: ObjectStore, tmp_path: Path) -> Remote:
    return Remote(f"s3://{BUCKET}/{tmp_path.name}", "run")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


class Sending:
    """An uploader and what it has recorded."""

    def __init__(self, root: Path, home: Remote, keep: int = 2) -> None:
        self.records: list[dict[str, Any]] = []
        self.uploader = Uploader(Outbox(root, home, Retention(keep)), self._record)

    def _record(self, kind: str, **fields: Any) -> None:
        self.records.append({"kind": kind, **fields})

    def kinds(self, kind: str) -> list[Any]:
        return [record["step"] for record in self.records if record["kind"] == kind]


@pytest.fixture
def sending(root: Path, home: Remote, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Sending]]:
    """Starts uploaders that do not pause for long."""
    monkeypatch.setattr(uploads, "FIRST_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(uploads, "LONGEST_PAUSE_SECONDS", 0.2)
    started: list[Sending] = []

    def start() -> Sending:
        started.append(Sending(root, home))
        return started[-1]

    yield start
    for each in started:
        each.uploader.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come to this"
        time.sleep(0.02)


def whole(home: Remote, work: Path) -> list[int]:
    """Steps of what is there, after every byte has been fetched and compared."""
    shutil.rmtree(work, ignore_errors=True)
    steps = home.steps()
    assert [home.fetch(step, work)[1] for step in steps] == [[]] * len(steps)
    return steps


def test_checkpoints_arrive_and_come_back(root: Path, home: Remote, sending: Callable[[], Sending]) -> None:
    sent = sending()
    for step in (10, 20, 30):
        save(root, step)
        sent.uploader.wake()
        until(lambda step=step: step in sent.kinds("upload"))
    assert sent.uploader.finish(LIMIT_SECONDS) == []
    assert sent.kinds("upload") == [10, 20, 30] and sent.kinds("upload_failed") == []
    assert all(record["bytes"] == 3000 and record["url"] == home.url for record in sent.records)
    assert home.steps() == [20, 30]
    shutil.rmtree(root)
    found = format.find(root, home=home)
    assert found is not None and found.step == 30 and format.verify(found.path) == []


def test_a_manifest_is_created_once(root: Path, home: Remote) -> None:
    path = save(root, 10)
    home.put(path)
    with pytest.raises(FileExistsError):
        home._create(f"{path.name}/{format.MANIFEST}", b"another process's")
    assert home.manifest(10) == (path / format.MANIFEST).read_bytes()


def test_a_refusing_store_is_told_once_and_nothing_is_lost(
    root: Path, home: Remote, server: ObjectStore, sending: Callable[[], Sending]
) -> None:
    server.refuse(True)
    try:
        with pytest.raises(CheckpointError, match=r"access refused(.|\n)*credentials(.|\n)*cannot be told"):
            format.find(root, home=home)
        save(root, 10)
        found = format.find(root, home=home)
        assert found is not None and found.step == 10
        assert "access refused" in found.notes[0] and "only those in" in found.notes[0]
        sent = sending()
        for step in (20, 30):
            save(root, step)
            sent.uploader.wake()
        until(lambda: sent.kinds("upload_failed") != [])
        assert sent.uploader.finish(0.5) == [20, 30]
        [failed] = [record for record in sent.records if record["kind"] == "upload_failed"]
        [pending] = [record for record in sent.records if record["kind"] == "upload_pending"]
        assert "access refused" in failed["message"] and "tried again" in failed["message"]
        assert pending["steps"] == [20, 30] and f"checkpoint upload {root.parent}" in pending["message"]
        assert "access refused" in pending["message"]
    finally:
        server.refuse(False)
    assert sent.uploader.finish(LIMIT_SECONDS) == [] and home.steps() == [20, 30]


def test_a_bucket_that_is_not_there_is_named(root: Path, server: ObjectStore) -> None:
    with pytest.raises(CheckpointError, match="there is no bucket absent: make it first"):
        Remote("s3://absent/x", "run").steps()
    with pytest.raises(Absent, match="bucket does not exist"):
        Remote("s3://absent/x", "run").put(save(root, 10))


def test_a_store_that_does_not_answer_is_waited_for(
    root: Path, home: Remote, server: ObjectStore, sending: Callable[[], Sending], tmp_path: Path
) -> None:
    sent = sending()
    save(root, 10)
    sent.uploader.wake()
    until(lambda: sent.kinds("upload") == [10])
    server.stop()
    try:
        save(root, 20)
        assert sent.uploader.finish(0.5) == [20]
    finally:
        server.resume()
    assert sent.uploader.finish(LIMIT_SECONDS) == [] and whole(home, tmp_path / "work") == [10, 20]


def test_a_killed_store_gets_everything_again(
    root: Path, home: Remote, server: ObjectStore, sending: Callable[[], Sending], tmp_path: Path
) -> None:
    """It comes back empty, so what had arrived is pending again: that follows from facts, not from memory."""
    sent = sending()
    for step in (10, 20):
        save(root, step)
        sent.uploader.wake()
        until(lambda step=step: step in sent.kinds("upload"))
    server.kill()
    save(root, 30)
    sent.uploader.wake()
    until(lambda: sent.kinds("upload_failed") == [30])
    server.start()
    assert sent.uploader.finish(LIMIT_SECONDS) == []
    assert whole(home, tmp_path / "work") == [20, 30] and sent.kinds("upload_failed") == [30]


def test_an_uploader_that_is_killed_leaves_only_what_is_whole(root: Path, home: Remote, tmp_path: Path) -> None:
    """A process that saves and sends without pause is killed at many moments; another one finishes the work."""
    code = (
        "import sys; from pathlib import Path\n"
        "from pipeline.checkpoint.remote import Remote; from pipeline.checkpoint.uploads import Outbox\n"
        "from pipeline.checkpoint.retention import Retention\n"
        "from tests.checkpoint.small_checkpoint import save\n"
        "root, url, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])\n"
        "outbox = Outbox(root, Remote(url, 'run'), Retention(keep=2)); outbox.pending(); print('ready', flush=True)\n"
        "while True: step += 1; save(root, step, size=60_000); print(step, flush=True); list(outbox.send())\n"
    )
    rng, step = random.Random(0), 0
    for _ in range(4):
        command = [sys.executable, "-c", code, str(root), home.url.rpartition("/")[0], str(step)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for _ in range(rng.randrange(1, 4)):
            step = int(process.stdout.readline())
        time.sleep(rng.random() * 0.1)
        process.kill()
        step = max([step, *map(int, process.stdout.read().split())])
        process.stdout.close()
        process.wait()
        there = whole(home, tmp_path / "work")
        assert not there or there[-1] >= step - 2
    outbox = Outbox(root, home, Retention(keep=2))
    list(outbox.send())
    newest = [each.step for each in format.list_checkpoints(root)][-2:]
    assert whole(home, tmp_path / "work") == newest and outbox.waiting() == []
    assert {checkpoint_name(step) for step in newest} <= {*os.listdir(root)}
