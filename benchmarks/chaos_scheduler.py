"""What keeps a run's command going, what is seen of it, and the small disk that it saves to.

    Scheduler   `millstream train`, to be started again when it ends with exit code 75 or by a signal, as a cluster's
                scheduler does. Any other end counts as a step for a person
    Watch       the journal, as it grows

All processes of a command carry its name in their environment, so what outlives it is found.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline import verify_resume
from pipeline.track import journal

ROOT = Path(__file__).parents[1]
MARK = "MILLSTREAM_CHAOS"  # in the environment of every process that a command starts
AGAIN = 75  # the exit code of a run that wants to be started again
TAIL_LINES = 25


class Stuck(RuntimeError):
    """The run does not go on by itself. The message holds the end of its output."""


class Scheduler:
    """One command and what became of it. ends: (Unix seconds, exit code); negative: killed by that signal."""

    def __init__(self, config: Path, environment: dict[str, str]) -> None:
        self.output = config.with_suffix(".log")
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ends: list[tuple[float, int]] = []
        self._config, self._environment = config, environment

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The newest."""
        return self.processes[-1]

    @property
    def manual_steps(self) -> int:
        return sum(code > 0 and code != AGAIN for _, code in self.ends)

    def start(self) -> None:
        """Start the command, in a session of its own, on a Ray cluster of its own."""
        marked = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: str(self._config)}
        marked.pop("RAY_ADDRESS", None)
        with self.output.open("ab") as output:
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "pipeline", "train", str(self._config)],
                    cwd=self._config.parent,
                    env=marked | self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def ended(self) -> int | None:
        """The exit code when the newest process has ended since this was last asked; else None."""
        code = self.process.poll()
        if code is None or len(self.ends) == len(self.processes):
            return None
        self.ends.append((time.time(), code))
        return code

    def tail(self) -> str:
        return "\n".join(self.output.read_text(errors="replace").splitlines()[-TAIL_LINES:])

    def left(self, seconds: float = 20.0) -> list[str]:
        """What is still there some seconds after the end: processes, and folders of Ray clusters."""
        deadline = time.monotonic() + seconds
        while (found := self._left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def close(self) -> None:
        """Kill whatever runs, and wait for what ends by itself once that is gone, such as W&B's service."""
        for process in self.processes:
            verify_resume.end(process)
        self.left()

    def _left(self) -> list[str]:
        found, mark = [], f"{MARK}={self._config}\0".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if mark in path.read_bytes():
                    found.append(f"process {path.parent.name}: {path.with_name('comm').read_text().strip()}")
        folders = Path(tempfile.gettempdir()).glob("millstream-ray-*")
        own = {str(process.pid) for process in self.processes}
        return found + [str(folder) for folder in folders if folder.name.split("-")[2] in own]


class Watch:
    """The journal's records as they come, kept by a thread."""

    def __init__(self, folder: Path) -> None:
        self.records: list[journal.Record] = []
        self.heard = time.monotonic()
        self._path, self._stop = folder / "journal.jsonl", threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watch", daemon=True)
        self._thread.start()

    @property
    def attempt(self) -> int:
        return self._last("attempt", "attempt")

    @property
    def step(self) -> int:
        return self._last("step", "step")

    def since(self, kind: str, at: float, attempt: int = 0) -> bool:
        """Whether there is a record of this kind, not before `at` (Unix seconds), of this attempt or a later one."""
        for record in reversed(self.records):
            if record["kind"] == kind and record["time"] >= at and record["attempt"] >= attempt:
                return True
            if record["time"] < at - 60 or record["attempt"] < attempt:
                break
        return False

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _last(self, kind: str, field: str) -> int:
        return next((record[field] for record in reversed(self.records) if record["kind"] == kind), 0)

    def _follow(self) -> None:
        for record in journal.follow(self._path, self._stop):
            self.records.append(record)
            self.heard = time.monotonic()


@contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own in memory, mounted at `place` for as long as the block lasts."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=False)
