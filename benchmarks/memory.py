"""The memory that `millstream doctor` predicts for a step, beside what a real DeepSpeed step takes, for 20 models.

    configuration of a case -> doctor: bytes of weights, masters, optimizer, gradients, buckets, activations
                           '-> a process of its own: build, 2 steps under torch's profiler -> bytes of live storages

Measured are the most bytes alive at once in the second step, by the allocations that torch's profiler saw since before
the network was built; RSS is what the process has grown by at the end of it. CPU, one worker. The prediction has no
constants that were fitted, so its error is stated over all that were measured. A model whose activations the doctor
does not know is named and has no row. What it gives up: what a GPU's allocator adds, and more than one worker.

    python benchmarks/memory.py --save
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report
import yaml
from doctor import small_set

ROOT = Path(__file__).parents[1]
STEPS = 2
UNET = {
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
DIT = {"num_attention_heads": 4, "attention_head_dim": 32, "patch_size": 4, "norm_num_groups": 8}


def llama(width: int, layers: int) -> dict[str, Any]:
    options = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    return {"task.architecture": "llama", "task.model": {**options, "num_attention_heads": 4}}


def resnet(layer: str, *sizes: int) -> dict[str, Any]:
    options = {"layer_type": layer, "embedding_size": sizes[0], "hidden_sizes": [*sizes], "depths": [1] * len(sizes)}
    return {"task.architecture": "resnet", "task.model": options}


def convnet(**options: Any) -> dict[str, Any]:
    return {"task.architecture": None, "task.model": {}, "task.convnet": options, "task.image_size": 28}


def vit(width: int, layers: int) -> dict[str, Any]:
    options = {"patch_size": 7, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4}
    return {"task.model": {**options, "intermediate_size": 4 * width}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {  # a shipped configuration, and what is changed of it
    "resnet basic, 4 x 64, ZeRO 1": ("digits", {**resnet("basic", 64, 64, 128, 256), "zero.stage": 1}),
    "resnet basic as shipped, ZeRO 2": ("digits", {}),
    "resnet bottleneck, bf16": ("digits", {**resnet("bottleneck", 64, 128, 256, 512), "precision.dtype": "bf16"}),
    "plain convnet, 20 layers, ZeRO 0": ("digits", {**convnet(depth=20, residual=False), "zero.stage": 0}),
    "residual convnet, 32 layers, wide": ("digits", {**convnet(depth=32, width=32)}),
    "vit as shipped": ("mnist", {}),
    "vit 256, SGD": ("mnist", {**vit(256, 4), "optim.name": "sgd"}),
    "vit 384, bf16, ZeRO 3": ("mnist", {**vit(384, 4), "precision.dtype": "bf16", "zero.stage": 3}),
    "llama as shipped, bf16": ("stdlib", {}),
    "llama 384, fp32, ZeRO 0": ("stdlib", {**llama(384, 4), "precision.dtype": "fp32", "zero.stage": 0}),
    "llama 256, recomputed, average": (
        "stdlib",
        {**llama(256, 6), "activation_checkpointing": True, "ema": {"decay": 0.99}},
    ),
    "lstm as shipped, bf16": ("stdlib-lstm", {}),
    "lstm 256, fp32": ("stdlib-lstm", {"task.model.hidden_size": 256, "precision.dtype": "fp32"}),
    "mamba2, 2 layers, bf16": ("stdlib-mamba", {"task.model.num_hidden_layers": 2}),
    "audio lstm as shipped": ("speech", {}),
    "audio gru 384, ZeRO 2": ("speech", {"task.model": {"cell": "gru", "width": 384, "layers": 3}, "zero.stage": 2}),
    "diffusion unet as shipped, average": ("diffusion-digits", {}),
    "diffusion unet 64, ZeRO 0": (
        "diffusion-digits",
        {"task.model": {**UNET, "block_out_channels": [64, 128]}, "zero.stage": 0, "ema": None},
    ),
    "diffusion dit 128": ("diffusion-digits", {"task.architecture": "dit", "task.model": {**DIT, "num_layers": 4}}),
    "diffusion dit 256, bf16, ZeRO 3": (
        "diffusion-digits",
        {
            "task.architecture": "dit",
            "task.model": {**DIT, "attention_head_dim": 64, "num_layers": 6},
            "precision.dtype": "bf16",
            "zero.stage": 3,
            "ema": None,
        },
    ),
}


def write(name: str, path: Path) -> None:
    """The configuration of a case; its data are below the working directory."""
    base, changes = CASES[name]
    tree = yaml.safe_load((ROOT / "configs" / f"{base}.yaml").read_text())
    for place, value in changes.items():
        *above, last = place.split(".")
        inside = tree
        for key in above:
            inside = inside.setdefault(key, {})
        inside[last] = value
    if tree.get("ema", {}) is None:
        tree["evaluate"] = {}
    tree["cluster"] = {"workers": 0}
    tree["track"] = {"wandb": "off", "health_every": None}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))


def child(path: Path) -> dict[str, Any]:
    """Bytes, in this process: predicted by part, measured at the peak, RSS."""
    import psutil
    from torch.profiler import ProfilerActivity, profile, record_function

    from pipeline import config as configs
    from pipeline import learner
    from pipeline.data.stream import Stream
    from pipeline.doctor import memory, network, samples
    from pipeline.doctor.findings import Report
    from pipeline.guard import Judge
    from pipeline.randomness import Randomness
    from pipeline.session import Session, World
    from pipeline.train import gradients

    config, told = configs.load(path), Report()
    looked = network.look(config, told, samples.look(config, told))
    if told.fails or looked is None or looked.activations is None:
        raise SystemExit(f"the doctor says: {[str(each.problem) for each in told.findings]}")
    need = memory.need(config, looked, 1)

    session = Session(World.join(), path.parent / "run", 1, lambda *said: False)
    learner.setup(config)
    randomness, data, judge = Randomness(config.seed), Stream(config), Judge(config.guard, 0)
    before = psutil.Process().memory_info().rss
    rss = 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        learnt = learner.build(config, session, randomness)
        loader = session.owned.enter_context(data.loader(learnt.task, 0, 1, 0, [0]))
        for step in range(STEPS):
            with record_function(f"step {step} measured"):
                batches = loader.step(step)
                terms = sum(learnt.task.weight(micro.batch) for micro in batches)
                gradients(session, learnt, judge, randomness, step, batches, terms)
                learnt.engine.step(config.optim.lr)
        rss = psutil.Process().memory_info().rss - before
    trace = path.parent / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    (span,) = [e for e in events if e.get("name") == f"step {STEPS - 1} measured" and e.get("ph") == "X"]
    totals = live(events, span["ts"], span["ts"] + span["dur"])
    session.close()
    parts = {"parameters": looked.parameters, **need._asdict()}
    return {"predicted": need.total, "measured": max(totals), "left": totals[-1], "rss": rss, "parts": parts}


def live(events: list[dict[str, Any]], first: float, last: float) -> list[int]:
    """Bytes that are alive after each event of the allocator between two times.

    Gloo's threads let tensors go too, of which the profiler hears nothing, so that its own total only rises. An address
    that is given out again has been let go.
    """
    sizes: dict[int, int] = {}
    now, found = 0, []
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        now -= sizes.pop(address, 0)
        if size > 0:
            sizes[address] = size
            now += size
        if first <= event["ts"] <= last:
            found.append(now)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", help="cases that have this in their names")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no further case is begun after so many")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="where launch/example-data has packed")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.child)))
        return
    load_before, rows, errors, began = os.getloadavg()[0], [], [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="millstream-memory-") as folder:
        work = Path(folder)
        for name in ("digits", "mnist", "stdlib", "speech"):
            for part, count in (("train", 512), ("test", 32)):
                if (given.data / name / part).is_dir():
                    small_set(given.data / name / part, work / "data" / name / part, count)
        names = list(CASES)
        for number, name in enumerate(name for turn in range(4) for name in names[turn::4]):  # families take turns
            if (given.only and given.only not in name) or time.monotonic() - began > given.seconds:
                continue
            path = work / f"case-{number}" / "run.yaml"
            path.parent.mkdir()
            write(name, path)
            command = [sys.executable, str(Path(__file__).resolve()), "--child", str(path)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
            if done.returncode:
                print(f"{name}: {done.stderr[-1500:]}", file=sys.stderr)
                continue
            found = json.loads(done.stdout.strip().rpartition("\n")[2])
            error = found["predicted"] / found["measured"] - 1
            errors.append(error)
            sizes = {part: f"{size / 1e6:.1f}" for part, size in found["parts"].items() if size}
            cells = [f"{found[key] / 1e6:.1f}" for key in ("predicted", "measured", "left", "rss")]
            rows.append([name, *cells, f"{error:+.1%}", ", ".join(f"{part} {size}" for part, size in sizes.items())])
            print(rows[-1], file=sys.stderr, flush=True)
    known = [row[0] for row in rows]
    absolute = [abs(error) for error in errors]
    facts = [
        f"{len(errors)} of {len(CASES)} models measured; error of the prediction: "
        f"median {statistics.median(absolute):.1%}, largest {max(absolute):.1%}",
        *(
            [f"Not measured, or not predicted: {', '.join(n for n in CASES if n not in known)}"]
            * (len(rows) < len(CASES))
        ),
        "No constant was fitted, so there is no half set aside",
        "MB (10^6 bytes); left: at the end of the step. Parts are what is predicted; parameters in millions",
    ]
    header = ["model", "predicted", "measured", "left", "RSS grown", "error", "parts"]
    text = report.page("Memory predicted and measured", facts, report.table(header, rows), load_before)
    print(text)
    if given.save:
        print(f"saved to {report.save('memory', text)}")


if __name__ == "__main__":
    main()
