"""One attempt as a driver lives it, in a process of its own: the journal is written, the W&B sink is fed from it.

    python -m tests.track.attempts FOLDER ATTEMPT BEGIN UNTIL END [key=value of the section track ...]

END says how it ends: done; killed: SIGKILL at once; flushed: once W&B has its rows on the disk. Between its steps it
waits for a line on standard input whenever a file `hold-<step>` lies in FOLDER.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from pipeline.sections import Track
from pipeline.track.journal import Journal
from pipeline.track.wandb import Wandb, segments

PICTURE = "samples/{:08d}/test-0-0.png"


def environment(home: Path) -> dict[str, str]:
    """Without anybody's W&B account, with a home of its own."""
    home.mkdir(exist_ok=True)
    mine = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_") and name != "NETRC"}
    # A W&B that is killed leaves folders in the temporary one.
    return mine | {"HOME": str(home), "TMPDIR": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}


def start(folder: Path, environment: dict[str, str], *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.track.attempts", str(folder), *map(str, arguments)]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment, text=True, cwd=folder, **pipes)


def attempt(folder: Path, environment: dict[str, str], *arguments: object) -> str:
    """Run one to its end: what it printed, `where` and the notices, a line each."""
    process = start(folder, environment, *arguments)
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == (-9 if arguments[3] in ("killed", "flushed") else 0), errors
    assert errors == ""
    return output


def samples(folder: Path, step: int) -> list[dict[str, Any]]:
    """One with a picture, and one whose picture is gone."""
    path = folder / PICTURE.format(step)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), step).save(path)
    names = (f"{step:08d}/test-{number}-0.png" for number in (0, 1))
    return [{"picture": {"picture": name}, "label": 3, "text": "ä <b>"} for name in names]


def live(folder: Path, number: int, begin: int, until: int, end: str, track: Track) -> None:
    (folder / "small" / "train").mkdir(parents=True, exist_ok=True)
    (folder / "small" / "train" / "shards.idx").write_text("{}")
    data = {"train": {"pictures": {"folder": str(folder / "small" / "train"), "weight": 1.0}}}
    config: dict[str, Any] = {"name": "small", "seed": number, "data": data}
    sink = Wandb(track, folder, "small", config, say=lambda line: print(line, flush=True))
    journal = Journal(folder / "journal.jsonl", number)

    def record(kind: str, **fields: Any) -> None:
        journal.write({"kind": kind, **fields})
        sink.write({"attempt": number, "kind": kind, **fields})

    record("attempt", workers=2, code={"commit": "c" * 40, "dirty": False})
    record("restore" if begin else "start", step=begin, data="96 samples")
    for step in range(begin, until):
        if (folder / f"hold-{step}").exists():
            sys.stdin.readline()
        if step % 10 == 5:
            record("node", host="n1.lab", values={"cpu": step / 100})
        record("step", step=step, metrics={"train/loss": step + number / 10, "optim/lr": None})
        if (step + 1) % 10 == 0:
            record("evaluation", step=step + 1, metrics={"eval/test/accuracy": (step + 1) / 100})
            if (step + 1) % 20 == 0 and step < 80:
                record("samples", step=step + 1, sets={"test": samples(folder, step + 1)})
            path = folder / "checkpoints" / f"checkpoint-{step + 1:08d}"
            path.mkdir(parents=True, exist_ok=True)
            (path / "manifest.json").write_text(f'{{"step": {step + 1}}}')
            record("save", step=step + 1, path=path.name, metrics={"checkpoint/bytes": 12})
    if end == "failed":
        record("failure", message="giving up, the same failure 3 times: out of luck", exit_code=1)
    if end in ("done", "failed"):
        record("end", reason="done" if end == "done" else "failed", step=until)
        sink.close()
        print(sink.where)
        return
    if end == "flushed":
        give_up = time.monotonic() + 60
        while segments.held(segments.find(folder)) < until - 2 and time.monotonic() < give_up:
            time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    place, number, begin, until, end = sys.argv[1:6]
    keys = {name: yaml.safe_load(value) for name, value in (each.split("=", 1) for each in sys.argv[6:])}
    live(Path(place), int(number), int(begin), int(until), end, Track.model_validate({"wandb": "offline"} | keys))
