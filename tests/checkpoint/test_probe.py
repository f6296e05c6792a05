"""Machines that do not see the same checkpoint folder are found at the start, on all ranks, with the fix."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from pipeline.checkpoint import probe
from pipeline.errors import CheckpointError, ConfigError
from pipeline.session import World
from tests import gloo


def said(world: World, folder: Path) -> str:
    try:
        probe.require_shared(world, folder, patience_seconds=0.3)
    except (ConfigError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    return "shared"


def on_two(world: World, root: Path) -> dict[str, str]:
    own = root / f"disk-{world.rank}" / "runs" / "toy" / "checkpoints"
    (root / "file").touch()
    return {
        "shared": said(world, root / "both" / "checkpoints"),
        "apart": said(world, own),
        "nowhere": said(world, root / "file" / "checkpoints"),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    root = tmp_path_factory.mktemp("probe")
    return root, gloo.run(on_two, 2, root)


def test_a_shared_folder_is_fine_and_left_as_it_was(two: tuple[Path, list[dict[str, str]]]) -> None:
    root, ranks = two
    assert [rank["shared"] for rank in ranks] == ["shared", "shared"]
    assert os.listdir(root / "both" / "checkpoints") == []


def test_folders_of_their_own_are_refused_with_the_fix(two: tuple[Path, list[dict[str, str]]]) -> None:
    root, ranks = two
    for rank in ranks:
        message = rank["apart"]
        assert message.startswith("ConfigError: not all machines see the run's checkpoint folder")
        assert f"wrote into {root}/disk-0/runs/toy/checkpoints" in message
        assert f"not to be seen on {socket.gethostname()} ({root}/disk-1/runs/toy/checkpoints)" in message
        assert "Put `runs` into a folder that all machines share" in message
    assert os.listdir(root / "disk-0" / "runs" / "toy" / "checkpoints") == []


def test_a_folder_that_cannot_be_made_is_told_on_all_ranks(two: tuple[Path, list[dict[str, str]]]) -> None:
    for rank in two[1]:
        assert rank["nowhere"].startswith("CheckpointError: checkpoint not written: ") and "/file/" in rank["nowhere"]
