"""What a step's time is worth, by hand; no GPU is here, so the names of some are made up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import config as configs
from pipeline.throughput import Throughput, peak
from tests import small_data
from tests.test_train import RESNET

MEMORY = 3e9, 0.0


def test_samples_tokens_memory_and_utilization(tmp_path: Path) -> None:
    path = small_data.config(tmp_path / "toy.yaml", RESNET, small_data.images(tmp_path / "pictures"))
    config = configs.load(path, ["track.peak_flops=2e12"])
    task: Any = SimpleNamespace(flops_per_sample=lambda: 1e10, unit="tokens")
    world: Any = SimpleNamespace(rank=0, world_size=2, device=torch.device("cpu"))
    found = Throughput(config, task, world).metrics(0.5, 4096.0, *MEMORY)
    samples = config.global_batch_size / 0.5
    assert found == {
        "throughput/samples_per_second": samples,
        "throughput/tokens_per_second": 8192.0,
        "throughput/mfu": pytest.approx(1e10 * samples / (2 * 2e12)),
        "memory/host_gb": 3.0,
    }


def test_a_peak_that_is_not_known_is_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small_data.config(tmp_path / "toy.yaml", RESNET, small_data.images(tmp_path / "pictures"))
    world: Any = SimpleNamespace(rank=0, world_size=2, device=torch.device("cpu"))
    unknown = Throughput(configs.load(path), SimpleNamespace(), world)  # type: ignore[arg-type]
    assert set(unknown.metrics(0.5, 1.0, *MEMORY)) == {"throughput/samples_per_second", "memory/host_gb"}
    assert unknown.notes == []
    for name, flops in {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "Some GPU": None}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak(torch.device("cuda"), "bf16") == flops and peak(torch.device("cuda"), "fp32") is None
