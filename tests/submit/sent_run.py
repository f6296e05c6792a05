"""A run that is slow enough to be disturbed, sent by the command line from a folder of its own, and looked at from
here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.run import Run
from tests import small_data
from tests.test_train import RESNET

ROOT = Path(__file__).parents[2]
STEPS = 40
CANARY = "canary-71c0e5aa24d9"  # in the environment of who sends; must be nowhere else
CANARIES = {
    "WANDB_API_KEY": f"{CANARY}-wandb{'0' * 40}",  # W&B takes no short one
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}-aws",
    "HF_TOKEN": f"{CANARY}-hf",
}
PATIENCE_SECONDS = 900

# A task of the user's own. While the file is there a step takes 3 s on two workers: long enough to be disturbed.
TASK = """
import os
import time
from pipeline.tasks import image_classification

class Config(image_classification.Config):
    slow: str

class Task(image_classification.Task):
    def loss(self, model, batch):
        time.sleep(1.5 if os.path.exists(self.config.slow) else 0.02)
        return super().loss(model, batch)
"""
Say = Callable[..., str]


def project(folder: Path, steps: int = STEPS) -> Path:
    """toy.yaml with its data and a task of its own in `folder`; its steps are slow while the file `slow` is there."""
    small_data.images(folder / "pictures")
    (folder / "house").mkdir()
    (folder / "house/slow_task.py").write_text(TASK)
    task = {**RESNET, "name": "house.slow_task", "slow": str(folder / "slow")}
    return small_data.config(folder / "toy.yaml", task, Path("pictures"), runs="runs", steps=steps)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", *words]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, **CANARIES, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **more}


def wait_for(what: Callable[[], bool], why: Callable[[], str]) -> None:
    """Until `what` holds. Fails with what `why` tells after some minutes."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not what():
        assert time.monotonic() < give_up, why()
        time.sleep(0.2)


def steps(run: Path, attempt: int = 1) -> list[int]:
    """Steps that the journal has of this attempt and later ones."""
    records = Run(run).records() if run.exists() else []
    return [record["step"] for record in records if record["kind"] == "step" and record["attempt"] >= attempt]


def state(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by file and name."""
    files = sorted((run / "checkpoints" / f"checkpoint-{step:08d}").glob("*.safetensors"))
    assert files, f"{run} has no checkpoint of step {step}"
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def undisturbed(folder: Path, *overrides: str) -> Path:
    """The same run, trained on this machine without a break; its folder."""
    words = command("train", "toy.yaml", "name=quiet", *overrides)
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs/quiet"


def where_it_stands(*secrets: str, folders: tuple[Path, ...]) -> list[str]:
    """Files below `folders`, and command lines of processes, that hold one of the secrets."""
    found = []
    for path in (Path(parent, name) for folder in folders for parent, _, names in os.walk(folder) for name in names):
        with suppress(FileNotFoundError):  # it has just been removed
            if path.is_file() and any(secret.encode() in path.read_bytes() for secret in secrets):
                found.append(str(path))
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if any(secret.encode() in line for secret in secrets):
            found.append(line.decode(errors="replace"))
    return found
