"""Where a run writes: can it, is there room for the checkpoints that it keeps, how long does a save take.

    runs, checkpoint.* , parameters -> bytes of one checkpoint x how many stay -> free space, a file written and synced

What it gives up: quotas that the file system does not tell of, and whether a second home has room.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

import psutil

from pipeline.checkpoint import disk
from pipeline.config import Config
from pipeline.doctor.findings import Report

PART = "storage"
TRIED = 8 << 20  # bytes that are written to see how fast it is
SMALL = 1 << 16  # bytes that are written to see whether it can be
SLOW = 60.0  # seconds of one save that are worth a word
MEMORY = ("tmpfs", "ramfs", "devtmpfs")
OFFSET = 5.0  # seconds that a file system's clock may be away from this machine's


def look(config: Config, report: Report, parameters: int | None) -> None:
    """Write a small file where the run will, and count what it will keep. parameters: None when not known."""
    folder = Path(config.runs)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        report.add("error", PART, "runs", f"{there} is a file, not a folder", "name another folder")
        return
    speed = _write(report, there, TRIED if parameters is not None else SMALL)
    if speed is None:
        return
    kind = _kind(there)
    if kind in MEMORY:
        message = f"{folder} lies in memory ({kind}): the run is lost when the machine stops"
        report.add("warning", PART, "runs", message, "name a folder on a disk")
    if parameters is not None:
        _room(config, report, folder, parameters, speed)


def _write(report: Report, there: Path, size: int) -> float | None:
    """Bytes a second of a file that is written, synced and removed; None when it cannot be."""
    probe = there / f".millstream-{secrets.token_hex(6)}"
    content = os.urandom(SMALL)
    try:
        began = time.perf_counter()
        with probe.open("xb") as file:
            for _ in range(size // SMALL):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        speed = size / (time.perf_counter() - began)
        offset = probe.stat().st_mtime - time.time()
        if abs(offset) > OFFSET:
            message = f"the clock of {there} is {offset:+.0f} s away from this machine's"
            report.add("warning", "clock", "runs", message, "set the clocks (NTP)")
        return speed
    except OSError as error:
        message = f"{there} cannot be written to: {error.strerror}"
        report.add("error", PART, "runs", message, "give permission, or name another folder")
        return None
    finally:
        if probe.exists():
            probe.unlink()


def _kind(there: Path) -> str:
    """The file system that a folder lies on."""
    mounts = [part for part in psutil.disk_partitions(all=True) if there.absolute().is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """About, of one checkpoint: fp32 weights, the optimizer's tensors, and the average of the weights if any."""
    from pipeline.optim import OPTIMIZERS

    tensors = 1 + len(OPTIMIZERS[config.optim.name].tensors) + (config.ema is not None)
    return 4 * parameters * tensors


def kept(config: Config) -> int:
    """How many checkpoints lie on the disk at once, at the most: one is being written."""
    every, saves = config.checkpoint.every, config.steps
    if every != "auto":
        saves = -(-config.steps // every)
    always = config.steps // config.checkpoint.keep_every if config.checkpoint.keep_every else 0
    return min(saves, config.checkpoint.keep + config.checkpoint.keep_best + always) + 1


def _room(config: Config, report: Report, folder: Path, parameters: int, speed: float) -> None:
    one, count = checkpoint_bytes(config, parameters), kept(config)
    free, seconds = disk.free_bytes(folder), one / speed
    report.figures["checkpoints"] = {"bytes": one, "kept": count, "free_bytes": free, "seconds": round(seconds, 1)}
    if one * count > free:
        message = (
            f"{count} checkpoints of {one / 1e9:.2f} GB need {one * count / 1e9:,.1f} GB, {free / 1e9:,.1f} are free"
        )
        always = config.checkpoint.keep_every is not None
        mend = f"lower checkpoint.keep{', raise checkpoint.keep_every' if always else ''}, or name another folder"
        report.add("error", PART, "runs" if not always else "checkpoint.keep_every", message, mend)
    if seconds > SLOW:
        message = f"a save of {one / 1e9:.1f} GB takes about {seconds:.0f} s here ({speed / 1e6:.0f} MB/s, one writer)"
        report.add("warning", PART, "runs", message, "a faster disk, or checkpoint.background: true and a larger every")
