"""A run on its way to a cluster, described once for every kind of cluster, and what a kind of cluster can do with it.

A target is a module of functions (`Target`): jobs.py sends to a Ray head, slurm.py to a Slurm controller,
kubernetes.py to an API server. Rendering is pure: the same configuration and submission give the same text, on whatever
machine, so what leaves can be printed, kept beside the code, and checked before anything is sent.

    configuration, options -> Submission -> render -> lint -> reach -> submit -> id -> status, logs, stop

What it gives up: an id says all that is needed to find the job again, so nothing is kept anywhere but that line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, Protocol

from pipeline.config import Config
from pipeline.problems import Problem

CONFIG = "config.yaml"  # the rendered file that holds Submission.text; every target renders it
SENT = "submitted"  # folder of what was sent: submitted/<name>/


@dataclass(frozen=True)
class Submission:
    """One run as it leaves. All of it may be shown to anybody: secrets are named by file or by Secret, never held.

    `text` is the whole configuration as YAML, every key written out, overrides laid in, every path absolute at the
    target. Retries run the same command on it again, and it goes on: the run's folder follows from `runs` and `name`.
    """

    name: str  # of the run, its folder, its job: letters, digits, . _ -
    source: Path  # the configuration file as it was given
    overrides: tuple[str, ...]  # key=value, as they were given
    text: str
    workers: int  # training processes, 1 or more
    threads: int  # CPU threads per worker
    gpus: int  # GPUs per worker, 0 or 1
    folder: PurePosixPath  # at the target: shared by its nodes; relative paths of the configuration begin there
    image: str | None = None  # container image; None: what is installed at the target
    files: Mapping[str, Path] = field(default_factory=dict)  # code that is sent: name at the target -> file here
    elastic: bool = False  # whether it goes on with fewer workers when some are lost
    sweep: tuple[str, ...] = ()  # instead of `text`, one whole configuration per member, each a run of its own
    where: str | None = None  # address, context or namespace of the target; None: what its own tools take
    options: Mapping[str, str] = field(default_factory=dict)  # the target's own, such as {"partition": "gpu"}


class State(NamedTuple):
    """What became of a job. `word` is the same for every target, `detail` in the target's own words."""

    word: Literal["waiting", "running", "done", "stopped", "failed", "unknown"]
    detail: str = ""

    @property
    def over(self) -> bool:
        return self.word in ("done", "stopped", "failed")


class Target(Protocol):
    """What a target's module offers; each function is of the module, none keeps anything between calls."""

    def render(self, config: Config, run: Submission) -> dict[str, str]:
        """File name -> text of all that leaves, `CONFIG` among them. Reads nothing but its arguments.

        `config` is `run.text` as an object.
        """
        ...

    def lint(self, rendered: Mapping[str, str]) -> list[Problem]:
        """Everything in rendered files that the target would refuse, ignore or regret. Sends nothing.

        A problem's `place` is the file and the key or option in it, `line` that of the file.
        """
        ...

    def reach(self, run: Submission) -> list[str]:
        """Whether the target is there and would take a job from us; what should be known all the same, as lines.

        Raises ConfigError or RunError with the way to mend it. Sends nothing of the run.
        """
        ...

    def submit(self, rendered: Mapping[str, str], run: Submission) -> str:
        """Send it; the id by which the functions below find it from anywhere, such as a URL or context/namespace/name.

        Raises RunError with the way to mend it when the target refuses.
        """
        ...

    def status(self, id: str) -> State:
        """What became of it. Raises RunError when the target cannot be reached."""
        ...

    def logs(self, id: str) -> str:
        """All that the job has said so far."""
        ...

    def stop(self, id: str) -> None:
        """Ask it to finish its step, save, and end, and not to come back. Returns at once; `status` tells the rest."""
        ...
