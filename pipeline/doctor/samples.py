"""What is in the data sets of a run: are they there, whole, of the kind the task reads, and enough.

    folders -> index opened -> classes and fields over all samples (from the index) -> some samples read, their digests
    compared, and prepared as training would -> epochs of the run

Nothing is read twice and no tar is read whole; `millstream data verify` is what reads every byte. What it gives up: a
bad sample among those that were not looked into.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import task_file
from pipeline.config import Config
from pipeline.data.decode import load_decoders
from pipeline.data.reader import Dataset, Sample
from pipeline.data.stats import stats
from pipeline.data.stream import open_set
from pipeline.doctor.findings import Report
from pipeline.errors import ConfigError, DataError, MillstreamError

LOOKED = 256  # samples of each set that are read and prepared, spread evenly
SECONDS = 2.0  # that this may take, for each set
ODD = 8  # samples that lack a field which others have, looked into besides
SHOWN = 3  # bad samples that are told of
MANY_EPOCHS = 1000
COUNTED = 1_000_000  # samples of a set that is here: up to so many, a start may wait for their classes
PART = "data"


def look(config: Config, report: Report, reading: bool = True) -> list[dict[str, np.ndarray]]:
    """Note what is wrong with the data; some samples as the task prepares them, a micro batch or fewer.

    reading: also read samples; else what the indexes say is all.
    """
    task = made_task(config, report)
    if not decoders(config, report):
        return []
    prepared: list[dict[str, np.ndarray]] = []
    identities: dict[str, str] = {}
    with ExitStack() as stack:
        wrong = {finding.problem.place for finding in report.of("error")}
        for place, folder in places(config):
            if place in wrong:  # it is not there, and that has been said
                continue
            try:
                dataset = open_set(config, folder)
            except DataError as error:
                report.refuse(PART, error, place)
                continue
            stack.callback(dataset.close)
            training = not place.startswith("data.evaluate")
            if reading or (dataset.remote is None and len(dataset) <= COUNTED):
                _contents(config, report, place, dataset)
            if dataset.identity in identities and not training:
                message = f"is what {identities[dataset.identity]} is trained on: the same samples, so it tells nothing"
                report.add("warning", PART, place, message, "hold samples out: `millstream data pack --holdout 0.1`")
            identities.setdefault(dataset.identity, place)
            if reading and task is not None:
                good = _prepare(config, report, place, dataset, _rng(config, task, training), task.prepare)
                prepared += good if training and len(prepared) < config.micro_batch_size else []
    here = reading or not any("://" in str(folder) for _, folder in places(config))
    broken = any(f.level == "error" and f.problem.place.startswith("data") for f in report.findings)
    if here and identities and not broken:
        _order(config, report)
    return prepared[: config.micro_batch_size]


def decoders(config: Config, report: Report) -> bool:
    """Whether those that the configuration names can be imported."""
    try:
        load_decoders(config.data.decoders)
    except ConfigError as error:
        report.refuse(PART, error, "data.decoders")
        return False
    return True


def places(config: Config) -> Iterator[tuple[str, Path | str]]:
    """(key, folder or URL) of every data set."""
    for name, source in config.data.train.items():
        yield ("data.train" if [*config.data.train] == ["train"] else f"data.train.{name}"), source.folder
    for name, folder in config.data.evaluate.items():
        yield f"data.evaluate.{name}", folder


def made_task(config: Config, report: Report) -> Any:
    """The task, or None when it refuses its section."""
    try:
        return task_file.find(config.task.name).Task(config.task)
    except MillstreamError as error:
        report.refuse("task", error, "task.tokenizer" if hasattr(config.task, "tokenizer") else "task")
    except Exception as error:  # anyone's own code
        report.add("error", "task", "task", f"its Task cannot be made: {type(error).__name__}: {error}")
    return None


def _rng(config: Config, task: Any, training: bool) -> np.random.Generator | None:
    """What a task draws its augmentation from, if it does."""
    return np.random.default_rng(config.seed) if training and task.augments else None


def _contents(config: Config, report: Report, place: str, dataset: Dataset) -> None:
    """Classes over all samples, from the index, against those of the task."""
    path = Path(dataset.index.place) / "shards.idx"
    if dataset.remote is None and path.stat().st_mtime > time.time() + 60:
        message = f"{path} is of the future by this machine's clock: one of the two is wrong"
        report.add("warning", "clock", place, message, "set the clock (NTP); times in journal and W&B follow it")
    classes = getattr(config.task, "classes", None)
    try:
        counted = stats(dataset.index.storage, looked=0)
    except DataError as error:
        report.refuse(PART, error, place)
        return
    found = counted.classes.get("cls")
    report.figures[place] = {"samples": counted.samples, "bytes": counted.bytes, "shards": counted.shards}
    if not found or not isinstance(classes, int):
        return
    outside = {label: count for label, count in found.items() if not 0 <= label < classes}
    if outside:
        some = ", ".join(map(str, [*outside][:5])) + (" ..." if len(outside) > 5 else "")
        hint = ": classes are counted from 0" if min(found) > 0 and max(found) == classes else ""
        message = f"labels go from 0 to {classes - 1}, but {sum(outside.values())} samples of {place} have {some}{hint}"
        mend = f"set task.classes to {max(found) + 1}" if min(found) >= 0 else "mend the labels"
        bad = config.data.bad_samples == "substitute" and not place.startswith("data.evaluate")
        report.add("warning" if bad else "error", PART, "task.classes", message, f"{mend}, or pack with other labels")
    elif not place.startswith("data.evaluate"):
        if len(found) == 1:
            message = f"all {counted.samples} samples are of one class, {next(iter(found))}: there is nothing to learn"
            report.add("warning", PART, place, message, "pack the folder above the class folders")
        elif missing := [label for label in range(classes) if label not in found]:
            some = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
            message = f"no sample of {place} has class {some} ({len(missing)} of {classes})"
            report.add("warning", PART, "task.classes", message, f"set task.classes to {max(found) + 1}, or add data")


def _prepare(
    config: Config,
    report: Report,
    place: str,
    dataset: Dataset,
    rng: np.random.Generator | None,
    prepare: Callable[[Sample, np.random.Generator | None], dict[str, np.ndarray]],
) -> list[dict[str, np.ndarray]]:
    """Read and prepare samples spread over the set: of the micro batches that the good ones make, the longest."""
    good, longest, bad, looked, began = [], [], [], 0, time.perf_counter()
    try:
        numbers = _spread(dataset)
    except DataError as error:  # a part of the index
        report.refuse(PART, error, place)
        return []
    for number in numbers:
        looked += 1
        sample = dataset.sample(number)
        try:
            if _of_no_class(config, sample):
                continue  # told of by the index
            good.append(prepare(sample, rng))
            if len(good) == config.micro_batch_size:
                longest, good = max(longest, good, key=_length), []
        except DataError as error:
            bad.append(str(error))
        except Exception as error:  # a task's own code
            bad.append(f"sample {sample.key}: {type(error).__name__}: {error}")
        if time.perf_counter() - began > SECONDS:
            break
    report.figures.setdefault(place, {})["looked"] = looked
    if bad:
        substituted = config.data.bad_samples == "substitute" and not place.startswith("data.evaluate")
        share = f"{len(bad)} of {looked} samples that were looked into are bad"
        if substituted:
            message = f"{share}, and others are substituted for them: {bad[0]}"
            report.add("warning", PART, place, message, "`millstream data repair` writes the set without them")
        else:
            message = f"{share}: " + "\n      ".join(bad[:SHOWN])
            mend = "`millstream data repair` writes the set without them; data.bad_samples: substitute goes on"
            report.add("error", PART, place, message, mend)
    return longest or good


def _length(rows: list[dict[str, np.ndarray]]) -> int:
    """How long the samples of a micro batch are together, where a task says so; of those it fills up, more is kept."""
    return sum(1 + int(row.get("length", 0)) for row in rows)


def _of_no_class(config: Config, sample: Sample) -> bool:
    classes = getattr(config.task, "classes", None)
    if not isinstance(classes, int) or "cls" not in sample:
        return False
    label = sample["cls"]
    return isinstance(label, int) and not 0 <= label < classes


def _spread(dataset: Dataset) -> list[int]:
    """Numbers of samples to look into: evenly, and some that lack a field which others have."""
    count, index = len(dataset), dataset.index
    chosen = dict.fromkeys(np.unique(np.linspace(0, count - 1, min(count, LOOKED)).astype(int)).tolist())
    odd: list[int] = []
    for shard in range(min(len(index.shards), LOOKED)):
        segment = index.segment(shard)
        for name in segment.names:
            lacking = np.flatnonzero(segment.column(name) < 0)[:ODD]
            odd += [int(index.starts[shard]) + row for row in lacking.tolist()]
    return [*dict.fromkeys(odd[:ODD]), *(number for number in chosen if number not in odd[:ODD])]


def _order(config: Config, report: Report) -> None:
    """The order of the run, made as training makes it; how often it goes through each set."""
    from pipeline.data.stream import Stream

    try:
        stream = Stream(config)
    except MillstreamError as error:
        report.refuse(PART, error, "data.train")
        return
    try:
        total = config.steps * config.global_batch_size
        epochs: dict[str, float] = {}
        sizes = dict(zip(config.data.train, map(len, stream.datasets)))
        for name, draws, of in stream.mixture.shares:
            place = "data.train" if [*config.data.train] == ["train"] else f"data.train.{name}"
            epochs[place] = total * draws / of / sizes[name]
            if epochs[place] > MANY_EPOCHS:
                message = f"{config.steps} steps go {epochs[place]:,.0f} epochs through its {sizes[name]:,} samples"
                mend = f"an epoch is {-(-sizes[name] * of // (draws * config.global_batch_size)):,} steps"
                report.add("warning", PART, place, message, mend)
        if config.global_batch_size > sum(sizes.values()):
            message = f"a batch is {config.global_batch_size}, and there are {sum(sizes.values())} samples"
            report.add("warning", PART, "global_batch_size", f"{message}: each stands in it more than once", "lower it")
        if stream.skipped.windows and not any(stream.skipped.window(step) is None for step in range(config.steps)):
            report.add("warning", PART, "data.skip_steps", "leaves out all steps: nothing is trained", "shorten it")
        report.figures["epochs"] = {place: round(value, 2) for place, value in epochs.items()}
        report.figures["window_bytes"] = stream.window_bytes(max(1, config.cluster.workers))
    finally:
        stream.close()
