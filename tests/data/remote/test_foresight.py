"""Pieces that are let go of and needed again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipeline.config import load_resolved
from pipeline.data.remote.fetching import Fetching
from pipeline.data.stream import Stream
from tests.data.file_server import FileServer
from tests.data.remote.test_simulate import RUN, Texts, folder, has_all

__all__ = ["folder"]  # a fixture
PATIENCE_SECONDS = 60.0


def test_a_piece_that_is_needed_again_while_it_is_let_go_of_comes(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Letting go takes so long here that whoever looks ahead has all the time to ask for the piece again."""
    release = Fetching.release

    def slowly(self: Fetching, piece: int, next_use: float | None = None) -> None:
        time.sleep(0.05)
        release(self, piece, next_use)

    monkeypatch.setattr(Fetching, "release", slowly)
    with FileServer(folder) as server:
        (tmp_path / "run.yaml").write_text(RUN.format(place=server.url, cache=tmp_path / "cache"))
        stream = Stream(load_resolved(tmp_path / "run.yaml"))
        with stream.loader(Texts(), 0, 2, 0) as loader:
            for step in range(8):
                loader.step(step)
                give_up = time.monotonic() + PATIENCE_SECONDS
                while not has_all(stream, loader):
                    assert time.monotonic() < give_up, f"step {step}: a piece that was asked for does not come"
                    time.sleep(0.01)
        stream.close()
