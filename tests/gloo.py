"""Runs a function in N plain processes joined by gloo: `run(function, 2, argument)` -> what each rank returned.

The function is found again in the children by file and name, so it stands at the top level of its test file. Its first
argument is the `World`. Arguments and results travel by pickle. Children die with the test: on time-out, on a rank's
failure, and when the test process itself is killed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GRACE_SECONDS = 10.0  # what the others get once one rank has failed, to say what they saw


class RankFailed(AssertionError):
    """A rank raised, was killed, or did not end in time. The message holds the end of every rank's output."""


def run(
    function: Callable[..., Any], workers: int, *args: Any, timeout: float = 120, env: Mapping[str, str] | None = None
) -> list[Any]:
    """`function(world, *args)` in `workers` processes; the results by rank. Raises RankFailed with their output."""
    source = inspect.getsourcefile(function)
    assert source is not None
    with tempfile.TemporaryDirectory(prefix="gloo-") as folder:
        work = Path(folder)
        (work / "call").write_bytes(pickle.dumps((source, function.__qualname__, args)))
        processes = [_start(work, rank, workers, env or {}) for rank in range(workers)]
        try:
            _wait(processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        codes = [process.returncode for process in processes]
        if any(codes):
            tails = (f"--- rank {r}, exit {c} ---\n{_tail(work / f'out-{r}')}" for r, c in enumerate(codes))
            raise RankFailed(
                f"{function.__name__} on {workers} ranks (exit -9: killed, or out of time)\n" + "\n".join(tails)
            )
        return [pickle.loads((work / f"result-{rank}").read_bytes()) for rank in range(workers)]


def _start(work: Path, rank: int, workers: int, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers), "OMP_NUM_THREADS": "1"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "PYTHONPATH": str(ROOT), **env}
    if sys.platform == "linux":
        variables["GLOO_SOCKET_IFNAME"] = "lo"  # the host's name may not resolve
    with (work / f"out-{rank}").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, __file__, str(work)],
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(processes: list[subprocess.Popen[bytes]], deadline: float) -> None:
    """Until all have ended, or the deadline, which one failure brings near."""
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.returncode for process in processes):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.05)


def _tail(path: Path, characters: int = 4000) -> str:
    return path.read_text(errors="replace")[-characters:]


def _child(work: Path) -> None:
    """Body of one rank."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan when the test process is killed
    import torch
    import torch.distributed as dist

    from pipeline.session import World

    torch.set_num_threads(1)
    rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=dist.FileStore(str(work / "store"), workers), rank=rank, world_size=workers)
    source, name, args = pickle.loads((work / "call").read_bytes())
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[Path(source).stem] = module
    spec.loader.exec_module(module)
    result = getattr(module, name)(World.join(timeout_seconds=60), *args)
    (work / f"result-{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
