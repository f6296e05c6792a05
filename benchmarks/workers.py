"""Local worker processes joined by torch.distributed, as a benchmark needs them: no Ray, no torchrun.

    start(function, 2, ...) -> Workers -> .say / .hear while they run -> .end() -> what each rank returned

Every rank calls `function(world, line, *args)`; `line` is its end of a pipe to the parent. All output goes to a file
each, whose end is shown when a rank fails. No rank outlives the parent, nor the block of `with`.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

GRACE_SECONDS = 5.0  # what the other ranks get once one has failed, to say what they saw
TAIL_CHARACTERS = 1500


class WorkersFailed(RuntimeError):
    """A rank raised, was killed, or was silent for too long. The message holds the end of every rank's output."""


class Workers:
    """Processes of one process group, all calling the same function. Use it with `with`."""

    def __init__(self, function: Callable[..., Any], workers: int, *args: Any) -> None:
        self.name = getattr(function, "__name__", "workers")
        self.folder = Path(tempfile.mkdtemp(prefix="millstream-workers-"))
        spawn = multiprocessing.get_context("spawn")
        self.lines: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(workers):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=_rank, args=(function, rank, workers, str(self.folder), theirs, args), daemon=True
            )
            process.start()
            theirs.close()
            self.lines.append(ours)
            self.processes.append(process)

    def say(self, message: Any) -> None:
        """Send `message` to every rank."""
        for line in self.lines:
            try:
                line.send(message)
            except OSError as error:
                raise self._failed("a rank has gone") from error

    def hear(self, timeout: float = 600.0) -> list[Any]:
        """The next message of every rank, by rank. Raises WorkersFailed."""
        heard: dict[int, Any] = {}
        deadline, failed = time.monotonic() + timeout, False
        while len(heard) < len(self.lines):
            open_lines = {line: rank for rank, line in enumerate(self.lines) if rank not in heard}
            ready = wait(list(open_lines), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._failed("one rank failed" if failed else f"no answer within {timeout:.0f} s")
            for line in ready:
                assert isinstance(line, Connection)
                rank = open_lines[line]
                try:
                    kind, value = line.recv()
                except (EOFError, OSError):
                    kind, value = "failed", "ended without a word"
                if kind == "failed":
                    failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
                    with self._output(rank).open("a") as output:
                        output.write(f"\n{value}")
                    if len(open_lines) == 1:
                        raise self._failed("a rank failed")
                heard[rank] = value
        if failed:
            raise self._failed("a rank failed")
        return [heard[rank] for rank in range(len(self.lines))]

    def end(self, timeout: float = 600.0) -> list[Any]:
        """What the function returned on every rank. Raises WorkersFailed."""
        results = self.hear(timeout)
        for process in self.processes:
            process.join(GRACE_SECONDS)
        return results

    def close(self) -> None:
        """Kill what is left, and remove the folder."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _output(self, rank: int) -> Path:
        return self.folder / f"output-{rank}"

    def _failed(self, why: str) -> WorkersFailed:
        tails = []
        for rank in range(len(self.lines)):
            text = self._output(rank).read_text(errors="replace") if self._output(rank).exists() else ""
            tails.append(f"--- rank {rank} ---\n{text[-TAIL_CHARACTERS:].strip()}")
        return WorkersFailed("\n".join([f"{self.name}: {why}", *tails]))


def run(function: Callable[..., Any], workers: int, *args: Any, timeout: float = 600.0) -> list[Any]:
    """`function(world, line, *args)` on all ranks of `workers` processes; the results by rank. Raises WorkersFailed."""
    with Workers(function, workers, *args) as started:
        return started.end(timeout)


def _rank(
    function: Callable[..., Any], rank: int, workers: int, folder: str, line: Connection, args: tuple[Any, ...]
) -> None:
    """Body of one rank."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan when the parent is killed
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name may not resolve
    output = os.open(Path(folder) / f"output-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    try:
        import torch
        import torch.distributed as dist

        from pipeline.session import World

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(rank % torch.cuda.device_count())
        store = dist.FileStore(str(Path(folder) / "store"), workers)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=workers)
        result = function(World.join(timeout_seconds=120), line, *args)
        dist.destroy_process_group()
    except BaseException:
        line.send(("failed", traceback.format_exc()))
        os._exit(1)
    line.send(("result", result))
    line.close()
    sys.stdout.flush()
    os._exit(0)  # threads of libraries may hang at exit; all that counts has been said
