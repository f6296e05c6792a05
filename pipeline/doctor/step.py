"""One real step of the network, shrunken, on a real batch through the real engine, in a process of its own.

    configuration -> the same at one or two layers of little width -> subprocess: plain process, 1 step, evaluation
                                                                   '-> the journal's error, if there is one

So what only running shows is found: an operation that a type of number does not have, a setting of DeepSpeed, a task's
own code; and whether a network that predicts the next token sees what stands behind it. Only networks that are given by
options are shrunk, and only when they are large. What it gives up: more than one worker, and what only a GPU does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import config as configs
from pipeline.config import Config
from pipeline.doctor.findings import Report
from pipeline.errors import MillstreamError

PART = "step"
SECONDS = 120.0
SMALL = 12_000_000  # parameters that are run as they are
LOUD = 10  # times larger weights than fresh ones, by which what a token sees of others shows
DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers")
WIDTH = ("hidden_size", "n_embd", "d_model", "intermediate_size", "ffn_dim", "n_inner", "embedding_size", "head_dim")


def look(config: Config, report: Report, parameters: int | None) -> None:
    """Run the step and note what it dies of."""
    small = shrunken(config, parameters)
    if small is None:
        report.add("note", PART, "step", "no step was run: the network cannot be made small by its options")
        return
    with tempfile.TemporaryDirectory(prefix="millstream-doctor-") as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(configs.dump(small.model_copy(update={"runs": Path(folder) / "runs"})))
        command = [sys.executable, "-m", "pipeline.doctor.step", str(path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MILLSTREAM_KILL": ""}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        try:
            said, complained = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            report.add("warning", PART, "step", f"one step of a small network took more than {SECONDS:.0f} s here")
            return
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    judge(report, process.returncode, said, complained)


def judge(report: Report, code: int, said: str, complained: str) -> None:
    """Note what the process said: its last line, or what it died of."""
    last = said.strip().rpartition("\n")[2]
    if code or not last.startswith("{"):
        tail = " ".join(complained.strip().split("\n")[-1:]) or f"exit code {code}"
        report.add("error", PART, "step", f"one real step of it ends with: {tail}")
        return
    found: Mapping[str, Any] = json.loads(last)
    report.figures["step"] = found
    if found.get("error"):
        report.refuse(PART, MillstreamError(found["error"]), found.get("place", "task"))
    if found.get("sees_ahead"):
        message = "a token's prediction changes with what stands behind it: it would learn to copy the future"
        report.add(
            "error", PART, "task.architecture", message, "a causal network; for BERT and its kin is_decoder: true"
        )


def shrunken(config: Config, parameters: int | None) -> Config | None:
    """The same run for one step of a small network in one process; None when there is no way to a small one."""
    sections = {
        "steps": 1,
        "global_batch_size": config.micro_batch_size,
        "track": config.track.model_copy(update={"wandb": "off", "health_every": None, "samples": 0}),
        "optim": config.optim.model_copy(
            update={
                "schedule": config.optim.schedule.model_copy(update={"name": "constant", "warmup": 0, "decay": None})
            }
        ),
        "checkpoint": config.checkpoint.model_copy(
            update={"every": 1, "url": None, "keep_every": None, "keep_best": 0}
        ),
        "cluster": config.cluster.model_copy(update={"workers": 0, "min_workers": None, "address": None, "gpu": None}),
        "data": config.data.model_copy(
            update={"evaluate": {}, "lanes": None, "processes": 0, "threads": 0, "skip_steps": ()}
        ),
        "evaluate": config.evaluate.model_copy(update={"every": None, "best": None}),
        "compile": False,
    }
    small = config.model_copy(update=sections)
    if parameters is not None and parameters <= SMALL:
        return small
    for options in _smaller(config):
        task = config.task.model_copy(update={"model": options})
        if (count := _parameters(task)) is not None and count <= 8 * SMALL:
            return small.model_copy(update={"task": task})
    return None


def _smaller(config: Config) -> Iterator[dict[str, Any]]:
    """Options of the same architecture, from those that change least to those that change most."""
    options = getattr(config.task, "model", None)
    if not isinstance(options, dict) or getattr(config.task, "pretrained", None) is not None:
        return
    shallow = {**options, **{name: 1 for name in DEPTH if name in options}}
    if "depths" in shallow:
        shallow["depths"] = [1 for _ in shallow["depths"]]
    yield shallow
    for factor in (4, 16, 64):
        narrow = {**shallow, **{name: max(1, shallow[name] // factor) for name in WIDTH if name in shallow}}
        if "hidden_sizes" in narrow:
            narrow["hidden_sizes"] = [max(8, size // factor) for size in narrow["hidden_sizes"]]
        yield narrow
        heads = {name: 1 for name in ("num_attention_heads", "num_key_value_heads", "n_head") if name in narrow}
        yield {**narrow, **heads}


def _parameters(task: Any) -> int | None:
    import torch

    from pipeline import task_file

    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = task_file.find(task.name).Task(task).build_model()
        return sum(parameter.numel() for parameter in model.parameters())
    except Exception:  # these sizes do not fit each other; the next may
        return None


def run(path: Path) -> dict[str, Any]:
    """Train the one step of a configuration in this process: {"error": ..., "place": ...} or its figures."""
    from pipeline.cluster import worker
    from pipeline.cluster.board import Board

    config = configs.load_resolved(path)
    folder = Path(config.runs) / config.name
    folder.mkdir(parents=True)
    board = Board(folder / "journal.jsonl", 1)
    try:
        worker.run(config, folder, 1, board.deliver)
        return {"sees_ahead": _sees_ahead(config)}
    except MillstreamError as error:
        return {"error": str(error), "place": "task"}
    except Exception as error:
        return {"error": f"one real step of it ends with {type(error).__name__}: {error}", "place": "step"}
    finally:
        board.close()


def _sees_ahead(config: Config) -> bool:
    """Whether the loss of the first half of a row of tokens changes with the tokens of the second half."""
    import torch

    from pipeline import tasks

    task = tasks.find(config.task.name).Task(config.task)
    length, size = getattr(config.task, "length", 0), getattr(getattr(task, "vocabulary", None), "size", 0)
    if not isinstance(length, int) or length < 4 or not size:
        return False
    torch.manual_seed(0)
    model = task.build_model().eval()
    if any(parameter.is_meta for parameter in model.parameters()):
        return False
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(LOUD)
    first = torch.randint(0, size, (1, length))
    second = first.clone()
    half = length // 2
    second[:, half:] = (second[:, half:] + 1) % size
    labels = torch.full((1, length), -100)
    labels[:, : half - 1] = first[:, 1:half]
    with torch.no_grad():
        one, other = (
            float(task.loss(model, {"tokens": tokens, "labels": labels, "bytes": torch.ones(1)})[0])
            for tokens in (first, second)
        )
    return abs(one - other) > 1e-4 * abs(one)


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]))))
