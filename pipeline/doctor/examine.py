"""Everything that would fail, not fit, starve or never learn, found on one machine before a run leaves it.

    file -> configuration -> data -> network -> memory, storage -> surroundings -> target -> one real step -> Report

Each part is what `train` or `submit` does itself, asked beforehand; nothing here knows a rule of its own that another
place has. `before` is the part of it that both of them ask: what asks nobody and reads no samples.
What it gives up: the real step when something else fails already.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline import config as configs
from pipeline.config import Config
from pipeline.doctor import samples
from pipeline.doctor.findings import Report
from pipeline.errors import MillstreamError
from pipeline.problems import InvalidConfig, nearest

SMALLER_IS_BETTER = ("loss", "bits_per_byte", "perplexity", "error")
HIGH = {"sgd": 100.0, "adadelta": 100.0}  # learning rates above which nothing is known to learn; others: 1


@dataclass(frozen=True)
class Target:
    """Where a run goes. where: address or context; folder, image, options: as `submit` takes them.

    device: name of its GPUs, where their memory is to count.  world_size: instead of cluster.workers.
    """

    kind: str = "local"
    world_size: int | None = None
    device: str | None = None
    folder: Path | None = None
    image: str | None = None
    where: str | None = None
    options: dict[str, str] = field(default_factory=dict)


def examine(
    path: Path,
    overrides: Iterable[str] = (),
    target: Target | None = None,
    *,
    quick: bool = False,
    progress: Callable[[str], None] = lambda part: None,
) -> Report:
    """Find all. quick: without the real step; progress is told each part as it begins."""
    target, report, overrides = target or Target(), Report(), tuple(overrides)
    progress("configuration")
    with report.timed("configuration"):
        config = _configuration(path, overrides, report)
    if config is None:
        return report
    world_size = target.world_size or max(1, config.cluster.workers)
    with report.timed("configuration"):
        _numbers(config, report, world_size)
        _deepspeed(config, report, world_size)
    progress("data")
    with report.timed("data"):
        looked = samples.look(config, report)
    progress("network")
    with report.timed("network"):
        network = _network(config, report, looked, world_size, target)
    progress("storage, surroundings")
    with report.timed("storage"):
        if target.kind == "local" or (target.folder or Path.cwd()).is_dir():
            from pipeline.doctor import places

            places.look(config, report, network.trained if network else None)
    with report.timed("surroundings"):
        from pipeline.doctor import surroundings

        surroundings.look(config, report, target.kind, world_size)
    if target.kind != "local":
        progress(f"what leaves for {target.kind}")
        with report.timed("target"):
            _target(path, overrides, config, report, target, world_size, network)
    if not quick and not report.fails:
        progress("one real step")
        with report.timed("step"):
            from pipeline.doctor import step

            step.look(config, report, network.parameters if network else None)
    return report


def before(config: Config) -> Report:
    """What `train` and `submit` ask before anything is paid for: all that asks nobody and reads no samples.

    The batch at the number of workers and numbers by which nothing is learnt; decoders, the task (its tokenizer and
    what was packed by it, its own code), shards and their index, samples of no class by it, enough of them for the
    steps; whether the run can be written; versions, W&B's mode, secrets.
    """
    from pipeline.doctor import places, surroundings

    report, workers = Report(), max(1, config.cluster.workers)
    _numbers(config, report, workers)
    samples.look(config, report, reading=False)
    places.look(config, report, None)
    surroundings.look(config, report, None, workers)
    return report


def refuse(config: Config, say: Callable[[str], None]) -> None:
    """Ask `before`; `say` hears each warning. Raises InvalidConfig with all errors."""
    report = before(config)
    if report.fails:
        raise InvalidConfig(f"run {config.name}", [finding.problem for finding in report.of("error")])
    for finding in report.of("warning"):
        say(f"warning: {finding.problem}")


def _configuration(path: Path, overrides: tuple[str, ...], report: Report) -> Config | None:
    try:
        found = configs.check(path, overrides)
    except InvalidConfig as error:
        for problem in error.problems:
            report.put("error", "configuration", problem)
        return None
    report.source = found.source
    for problem in found.problems:
        report.put("error", "configuration", problem)
    return found.config or found.elsewhere


def _numbers(config: Config, report: Report, world_size: int) -> None:
    """The batch at the world size, and numbers by which nothing is learnt."""
    part, micros = "configuration", config.micro_batches
    if world_size > micros:
        message = f"{world_size} workers share {micros} micro batches a step, and each needs one"
        mend = f"global_batch_size {world_size * config.micro_batch_size}, or at most {micros} workers"
        report.add(
            "error", part, "cluster.workers" if world_size == config.cluster.workers else "world size", message, mend
        )
    elif micros % world_size:
        most = config.micro_steps(world_size)
        idle = 1 - micros / (most * world_size)
        message = f"{micros} micro batches do not divide among {world_size} workers: {idle:.0%} of them idle each step"
        fits = next(size for size in range(world_size, 0, -1) if micros % size == 0)
        mend = f"{fits} workers, or global_batch_size {most * world_size * config.micro_batch_size}"
        report.add("warning", part, "world size", message, mend)
    for key in (key for key, value in config.zero.extra.items() if value == "auto"):
        message = f"`{key}: auto` means nothing to DeepSpeed by itself: its default is taken"
        report.add("warning", part, f"zero.extra.{key}", message, "leave it out, or give a number")
    schedule, optim = config.optim.schedule, config.optim
    if schedule.warmup >= config.steps and config.steps > 1:
        message = f"the warm-up of {schedule.warmup} steps is the whole run: the learning rate only rises"
        report.add("warning", part, "optim.schedule.warmup", message, "a tenth of the steps is usual")
    if optim.lr > HIGH.get(optim.name, 1.0):
        message = f"{optim.lr:g} is far too high for {optim.name}: nothing is known to learn at it"
        report.add("warning", part, "optim.lr", message, "1e-4 to 1e-2 is usual")
    best = (config.evaluate.best or "").partition("/")[2]
    if config.evaluate.mode == "max" and best.rpartition("/")[2] in SMALLER_IS_BETTER:
        message = f"the largest {best} is kept as the best, and smaller is better"
        report.add("warning", part, "evaluate.mode", message, "evaluate.mode: min")


def _deepspeed(config: Config, report: Report, world_size: int) -> None:
    """DeepSpeed's own keys, by itself; to import it takes seconds."""
    if not config.zero.extra:
        return
    from pipeline.zero import deepspeed_config

    set_before = "DS_ACCELERATOR" in os.environ
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else its search for one is told on the terminal
    try:
        deepspeed_config(config, min(world_size, config.micro_batches))
    except MillstreamError as error:
        report.refuse("configuration", error, "zero.extra")
    finally:
        if not set_before:
            del os.environ["DS_ACCELERATOR"]  # the real step looks for itself


def _network(config: Config, report: Report, looked: list[Any], world_size: int, target: Target) -> Any:
    """The network and its memory, against the device's where that is known."""
    from pipeline.doctor import memory, network

    found = network.look(config, report, looked)
    known = memory.device(report, target.device)
    if found is None:
        return None
    report.figures["network"] = dataclasses.asdict(found)
    if known is None and target.device is None and target.kind == "local":
        known = memory.here(config)
    on_gpu = known is not None and known[0] != "this machine"
    memory.judge(config, report, found, world_size, known, on_gpu)
    _best(config, report, found.metrics)
    return found


def _best(config: Config, report: Report, metrics: tuple[str, ...]) -> None:
    """evaluate.best against what the task tells of an evaluation."""
    metric = (config.evaluate.best or "").partition("/")[2].removeprefix("ema/")
    if metric and metrics and metric not in metrics:
        message = f"{metric!r} is no metric of this task: {', '.join(metrics)}"
        report.add("error", "network", "evaluate.best", message, nearest(metric, metrics) or f"such as {metrics[0]}")


def _target(
    path: Path,
    overrides: tuple[str, ...],
    config: Config,
    report: Report,
    target: Target,
    world_size: int,
    network: Any,
) -> None:
    """Render what `submit` would send, and read it over as it does."""
    from pipeline.submit import submit

    request = submit.Request(
        target=target.kind,
        config=path,
        overrides=overrides,
        folder=target.folder,
        image=target.image,
        where=target.where,
        own_code=target.kind != "k8s",
        users_code=target.kind != "k8s",
        options=target.options,
    )
    try:
        plan = submit.prepare(request)
    except InvalidConfig as error:
        for problem in error.problems:
            report.put("error", "target", problem)
        return
    except MillstreamError as error:
        report.refuse("target", error, "image" if target.image is None and target.kind == "k8s" else "target")
        return
    for problem in plan.problems:
        report.put("error", "target", problem)
    for problem in plan.warnings:
        report.put("warning", "target", problem)
    for note in plan.notes:
        report.add("note", "target", "target", note)
    pods = target.options.get("nodes", "1")
    if target.kind == "k8s" and pods.isdigit() and int(pods) and config.cluster.workers % int(pods):
        message = f"{config.cluster.workers} workers do not share {pods} pods evenly: some have fewer, and wait"
        report.add("warning", "target", "-o nodes", message, "a number of pods that divides cluster.workers")
    if target.kind == "k8s" and network is not None and "rayjob.yaml" in plan.rendered:
        _pods(config, report, plan.rendered["rayjob.yaml"], world_size, network)


def _pods(config: Config, report: Report, rendered: str, world_size: int, network: Any) -> None:
    """The memory of a worker pod against that of the workers in it."""
    from pipeline.doctor import memory, surroundings

    group = yaml.safe_load(rendered)["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    container = group["template"]["spec"]["containers"][0]
    have = surroundings.size(str(container["resources"]["limits"]["memory"]))
    if have is None or config.cluster.gpu:
        return
    workers = -(-world_size // max(1, int(group.get("replicas", 1))))
    memory.judge(config, report, network, world_size, (f"a pod of {have / 1e9:.0f} GB", have // workers), False)
