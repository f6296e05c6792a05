"""What the time of a step is worth: samples and terms a second, memory, and the share of the device's peak (MFU).

Model FLOPs utilization (Chowdhery et al. 2022, arXiv 2204.02311, appendix B) is what the model needs for the samples of
a step, however it is computed, over what the devices could do in the time. A device whose peak is not known has none:
it is not guessed, and `track.peak_flops` can say it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import torch

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.session import World
    from pipeline.tasks import Task

# FLOP/s of dense products in bf16 and fp16, by part of the device's name; the first that fits counts. As torchtitan
# (torchtitan/tools/utils.py) has them from NVIDIA's data sheets.
PEAKS = {
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2.25e15,
    "A100": 312e12,
    "L40S": 362e12,
}


class Throughput:
    """Of the steps of one attempt; rank 0 tells.  flops: of one sample.  peak: FLOP/s of a device.  None: not known."""

    def __init__(self, config: Config, task: Task, world: World) -> None:
        self._samples, self._unit, self._device = config.global_batch_size, getattr(task, "unit", None), world.device
        self.peak = config.track.peak_flops or peak(world.device, config.precision.dtype)
        self.flops = task.flops_per_sample() if self.peak is not None and world.rank == 0 else None
        self._could = (self.peak or 0.0) * world.world_size
        self._process = psutil.Process()

    @property
    def notes(self) -> list[str]:
        """What the utilization is made of, for people."""
        if self.flops is None:
            return []
        return [f"MFU: {self.flops:.4g} FLOPs a sample, of {self.peak:.4g} FLOP/s a device"]

    def memory(self) -> tuple[float, float]:
        """Bytes that this worker holds on its host, and the most that it has held on its GPU."""
        on_gpu = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0
        return float(self._process.memory_info().rss), float(on_gpu)

    def metrics(self, seconds: float, terms: float, host_bytes: float, gpu_bytes: float) -> dict[str, float]:
        """Of a step of `seconds` whose loss had `terms`. host_bytes, gpu_bytes: of the worker that holds the most."""
        found = {"throughput/samples_per_second": self._samples / seconds, "memory/host_gb": float(host_bytes) / 1e9}
        if gpu_bytes:
            found["memory/gpu_gb"] = float(gpu_bytes) / 1e9
        if self._unit:
            found[f"throughput/{self._unit}_per_second"] = terms / seconds
        if self.flops is not None:
            found["throughput/mfu"] = self.flops * self._samples / seconds / self._could
        return found


def peak(device: torch.device, dtype: str) -> float | None:
    """FLOP/s of a device in a precision; None when it is not known."""
    if device.type != "cuda" or dtype == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for model, flops in PEAKS.items() if model in name), None)
