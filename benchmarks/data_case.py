"""One loader measured in a process of its own: batches per second of wall and of processor, after a warm-up.

    python benchmarks/data_case.py '{"group": "tokens", "name": "litdata", ...}'     prints one line of JSON

Processor time is that of this process with all its threads and of all its descendants, so neither workers nor
helper threads are free. data.py starts these, in turn, and kills what is left of a process group.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from data_content import LENGTH, MEMBER_ROWS

FOLDERS = {  # group -> kind of content that it reads
    "tokens": "tokens",
    "packed": "packed",
    "images64": "images64",
    "images224": "images256",
    "bytes64": "images64",
    "bytes256": "images256",
}
SHAPES = {  # group -> of one sample in a batch
    "tokens": (LENGTH,),
    "packed": (MEMBER_ROWS, LENGTH),
    "images64": (64, 64, 3),
    "images224": (224, 224, 3),
}
MODULES = {  # name -> where its CASES are; what is not here is Millstream's
    "webdataset": "data_peers",
    "webdataset, equal decoder": "data_peers",
    "webdataset, rows": "data_peers",
    "DataLoader": "data_peers",
    "mosaicml-streaming": "data_streaming",
    "mosaicml-streaming, Pillow": "data_streaming",
    "litdata": "data_streaming",
    "decode only": "data_limits",
    "decode + crop": "data_limits",
    "np.memmap gather": "data_limits",
}
CLOSE_SECONDS = 5.0  # that a loader gets to put its things away
TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")


def batches(group: str, name: str, folder: Path, batch: int, workers: int) -> Generator[Any, None, None]:
    """What this loader gives, for ever."""
    if name in MODULES:
        return importlib.import_module(MODULES[name]).CASES[name][group](folder, batch, workers)
    ours = importlib.import_module("data_ours")
    function: Callable[..., Any] = ours.raw_bytes if group.startswith("bytes") else getattr(ours, group)
    return function(folder, batch, workers)


def samples(group: str, batch: Any) -> int:
    """How many samples a batch holds (packed: rows). Raises ValueError when it is not what the group promises."""
    if group.startswith("bytes"):
        if not all(isinstance(data, bytes | memoryview) for data in batch[:1]):
            raise ValueError(f"{group}: a batch of {type(batch[0])}, not of bytes")
        return len(batch)
    if isinstance(batch, list):  # a limit: each in an array of its own
        shape, kind = (len(batch), *batch[0].shape), batch[0].dtype
    else:
        shape, kind = tuple(batch.shape), batch.dtype
    expected = "uint16" if group in ("tokens", "packed") else "uint8"
    plain = group == "images64" or not isinstance(batch, list)
    if (plain and shape[-len(SHAPES[group]) :] != SHAPES[group]) or str(kind).removeprefix("torch.") != expected:
        if group == "packed" and shape[1:] == SHAPES["tokens"]:
            return shape[0]
        raise ValueError(f"{group}: a batch of {kind}{list(shape)}, not of {expected}{list(SHAPES[group])} each")
    return shape[0] * (MEMBER_ROWS if group == "packed" else 1)


def processor_seconds() -> float:
    """Of this process and all its descendants, dead and living."""
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system + sum(map(_of, _descendants()))


def _descendants() -> list[int]:
    """The processes below this one, as Linux lists them."""
    found, new = [], [os.getpid()]
    while new:
        lists = (path for pid in new for path in Path(f"/proc/{pid}/task").glob("*/children"))
        new = [int(pid) for path in lists for pid in path.read_text().split()]
        found += new
    return found


def _of(pid: int) -> float:
    """Seconds of one process and of its ended children; 0 when it has just ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields[11:15])) * TICK_SECONDS


def measure(counts: Iterator[int], warmup: float, seconds: float) -> dict[str, float]:
    """Samples, wall seconds and processor seconds, once `warmup` seconds have gone by since the first batch."""
    next(counts)
    began = time.perf_counter()
    while time.perf_counter() - began < warmup:
        next(counts)
    total, processor, began = 0, processor_seconds(), time.perf_counter()
    while (wall := time.perf_counter() - began) < seconds:
        total += next(counts)
    return {"samples": total, "wall": wall, "processor": processor_seconds() - processor}


def main() -> int:
    plan = json.loads(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan when the driver is killed
    torch.set_num_threads(1)  # as a worker of a run has it
    source: Generator[Any, None, None] | None = None
    data, group = Path(plan["data"]), plan["group"]
    if group in ("resume", "index"):
        ours = importlib.import_module("data_ours")
        if group == "resume":
            result = {"seconds": ours.first_batch(data / plan["kind"], plan["batch"], plan["step"])}
        else:
            result = measure(ours.index_members(data / plan["kind"]), plan["warmup"], plan["seconds"])
    else:
        folder = data / FOLDERS[group]
        source = batches(group, plan["name"], folder, plan["batch"], plan["workers"])
        gc.collect()
        result = measure((samples(group, batch) for batch in source), plan["warmup"], plan["seconds"])
    print(json.dumps(result), flush=True)
    threading.Timer(CLOSE_SECONDS, os._exit, [0]).start()  # workers may hang at the end; all that counts has been said
    if source is not None:
        source.close()
    os._exit(0)


if __name__ == "__main__":
    main()
