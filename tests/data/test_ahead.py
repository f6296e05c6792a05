"""Decoder processes: the same batches, and none that outlives its loader, its parent or a kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data.reader import Dataset, open_dataset
from tests.data.small_loader import content, loader, noisy, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("ahead") / "train")


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Iterator[Dataset]:
    with open_dataset(folder) as dataset:
        yield dataset


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


def test_processes_prepare_the_same_and_end_with_the_loader(dataset: Dataset) -> None:
    with loader(dataset, noisy, seed=5) as batches:
        expected = [[content(micro) for micro in batches.step(step)] for step in range(6)]
    with loader(dataset, noisy, seed=5, processes=2, prefetch=5) as batches:
        assert [[content(micro) for micro in batches.step(step)] for step in range(6)] == expected


def test_a_killed_decoder_process_is_said_and_hangs_nothing(dataset: Dataset) -> None:
    with loader(dataset, processes=1) as batches:
        batches.step(0)
        [child] = multiprocessing.active_children()
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="decoder process ended unasked"):
            for step in range(1, 50):
                batches.step(step)


def test_decoder_processes_end_when_their_parent_is_killed(folder: Path) -> None:
    code = (
        "import multiprocessing, sys, time; from pathlib import Path; from tests.data.small_loader import loader; "
        "from pipeline.data.reader import open_dataset\n"
        "if __name__ == '__main__':\n"
        f"    batches = loader(open_dataset(Path({str(folder)!r})), processes=2); batches.step(0)\n"
        "    print(*(child.pid for child in multiprocessing.active_children()), flush=True); time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert len(children) == 2
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline, "decoder processes outlive their parent"
        time.sleep(0.1)
