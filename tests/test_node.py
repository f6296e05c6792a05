"""How a host is doing, as it is recorded: by one worker of it, from real numbers. NVIDIA's tool is a stand-in."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import node
from pipeline.session import Session, World


def records_of(folder: Path, local_rank: int) -> list[dict[str, Any]]:
    """What a worker has recorded once it has looked at its host, or would have."""
    records: list[dict[str, Any]] = []
    world = World(local_rank, 2, local_rank, torch.device("cpu"), None)  # type: ignore[arg-type]
    session = Session(world, folder, 1, lambda rank, new, where: bool(records.extend(new)))
    try:
        session.owned.enter_context(node.watched(session))
        give_up = time.monotonic() + (60 if local_rank == 0 else 0.5)
        while not records and time.monotonic() < give_up:
            time.sleep(0.02)
            session.flush()
    finally:
        session.close()
    return records


def test_one_worker_of_a_host_says_how_it_is_doing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "FIRST_SECONDS", 0.2)
    monkeypatch.setenv("PATH", str(tmp_path))  # without nvidia-smi
    record, *_ = records_of(tmp_path, 0)
    assert record["kind"] == "node" and record["host"] == os.uname().nodename
    values = record["values"]
    assert set(values) == {"cpu", "memory", "memory_bytes", "disk", "disk_free_bytes"}
    assert all(0 <= values[name] <= 1 for name in ("cpu", "memory", "disk"))
    disk = os.statvfs(tmp_path)
    assert values["disk_free_bytes"] == pytest.approx(disk.f_bavail * disk.f_frsize, rel=0.05)
    assert records_of(tmp_path, 1) == []


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        ("0, 35, 1024, 4096\n1, [N/A], 2048, 4096\n", {"gpu0": 0.35, "gpu0_memory": 0.25, "gpu1_memory": 0.5}),
        ("NVIDIA-SMI has failed\n", {}),
    ],
)
def test_gpus_as_far_as_they_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, seen: dict[str, float]
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{said}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    values = node.look(tmp_path)
    assert {name: value for name, value in values.items() if name.startswith("gpu")} == seen


def test_a_host_s_name_makes_one_level_of_a_metric() -> None:
    told = node.metrics({"host": "n1.lab/x", "values": {"cpu": 0.5}})
    assert told == {"system/n1_lab_x/cpu": 0.5}
