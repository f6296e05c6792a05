"""Rules that no key can break alone: numbers that must fit each other, and folders that must be there.

Each rule reads what it needs from `Known` and returns the problems it finds. A rule that needs a value which is missing
or wrong says nothing: that value has a problem of its own already.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline import store_rules
from pipeline.problems import Problem, nearest


class Unread(LookupError):
    """A rule asked for a value that is missing or wrong."""


class Known:
    """The values of a configuration that can be read, by dotted key."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getitem__(self, place: str) -> Any:
        value: Any = self._values
        for part in place.split("."):
            if not isinstance(value, dict) or part not in value:
                raise Unread(place)
            value = value[part]
        return value


Rule = Callable[[Known], list[Problem]]


def numbers(known: Known) -> list[Problem]:
    """Problems of values against each other; looks at nothing outside the configuration."""
    rules = [_batch_split, _workers, _fewest_workers, _lanes, _cache, _schedule, _optimizer, _precision, _offload]
    return _apply([*rules, _retention, _best, _evaluation], known)


def folders(known: Known) -> list[Problem]:
    """Problems on disk: data folders missing or not indexed, files that the task names missing."""
    return _apply([_train_folders, _evaluation_folders, _task_paths, _second_home], known)


def _apply(rules: Iterable[Rule], known: Known) -> list[Problem]:
    problems: list[Problem] = []
    for rule in rules:
        try:
            problems += rule(known)
        except Unread:
            continue
    return problems


def _batch_split(known: Known) -> list[Problem]:
    batch, micro = known["global_batch_size"], known["micro_batch_size"]
    if batch % micro == 0:
        return []
    workers = _workers_or_one(known)  # what is suggested here should not be refused by the next rule
    micros = _around(micro, [size for size in _divisors(batch) if batch // size >= workers])
    batches = sorted({max(count, workers) * micro for count in (batch // micro, batch // micro + 1)})
    message = f"global_batch_size {batch} is not a multiple of micro_batch_size {micro}"
    mends = [f"micro_batch_size to {_either(micros)}"] * bool(micros) + [f"global_batch_size to {_either(batches)}"]
    return [Problem("micro_batch_size", message, suggestion=f"set {', or '.join(mends)}")]


def _workers(known: Known) -> list[Problem]:
    batch, micro, workers = known["global_batch_size"], known["micro_batch_size"], known["cluster.workers"]
    if batch % micro or workers <= batch // micro:
        return []
    count = batch // micro
    message = f"{workers} workers share {count} micro batch{'es' if count > 1 else ''} per step ({batch} / {micro})"
    message += ", and each needs one"
    smaller = [size for size in _divisors(batch) if batch // size >= workers]
    mends = [f"cluster.workers to at most {count}", f"global_batch_size to {workers * micro}"]
    if smaller:
        mends.insert(1, f"micro_batch_size to {smaller[-1]}")
    return [Problem("cluster.workers", message, suggestion=f"set {', or '.join(mends)}")]


def _fewest_workers(known: Known) -> list[Problem]:
    fewest, workers = known["cluster.min_workers"], known["cluster.workers"]
    if fewest is None or fewest <= workers:
        return []
    message = f"{fewest} is more than cluster.workers, {workers}, the most that are ever taken"
    return [Problem("cluster.min_workers", message, suggestion=f"set it to at most {workers}, or leave it out")]


def _lanes(known: Known) -> list[Problem]:
    lanes, batch = known["data.lanes"], known["global_batch_size"]
    if lanes is None or batch % lanes == 0:
        return []
    message = f"{lanes} lanes do not divide global_batch_size {batch} evenly"
    mend = f"set it to {_either(_around(lanes, _divisors(batch)))}, or leave it out (one lane per micro batch)"
    return [Problem("data.lanes", message, suggestion=mend)]


def _cache(known: Known) -> list[Problem]:
    """What one worker reads from at a time must fit; what all of a node do is seen when they have begun."""
    sources = known["data.train"].values()  # as sections, or as plain values
    if not any("://" in str(source["folder"] if isinstance(source, dict) else source.folder) for source in sources):
        return []
    size, blocks, block = known["data.cache_bytes"], known["data.shuffle_blocks"], known["data.block_bytes"] or 4 << 20
    lanes = known["data.lanes"] or max(1, known["global_batch_size"] // known["micro_batch_size"])
    window = -(-lanes // _workers_or_one(known)) * max(2, -(-blocks // lanes)) * block
    if size >= window:
        return []
    message = f"{size / 1e6:,.1f} MB, and one worker's windows over the shards are {window / 1e6:,.1f} MB"
    return [Problem("data.cache_bytes", message, suggestion=f"set it to {2 * window} or more")]


def _schedule(known: Known) -> list[Problem]:
    name, warmup, decay = (known[f"optim.schedule.{key}"] for key in ("name", "warmup", "decay"))
    problems = []
    if name == "wsd" and decay is None:
        mend = "add `decay: ...`, the steps of its last, falling part (often a tenth of the run)"
        problems.append(Problem("optim.schedule", "wsd needs to know when to fall", suggestion=mend))
    if name != "wsd" and decay is not None:
        mend = "leave it out, or set optim.schedule.name to wsd"
        problems.append(Problem("optim.schedule.decay", f"is not read by the {name} schedule", suggestion=mend))
    length, steps = warmup + (decay or 0 if name == "wsd" else 0), known["steps"]
    if length > steps:
        parts = f"warmup {warmup}" + (f" + decay {decay}" if length > warmup else "")
        mend = f"set steps to at least {length}, or shorten the schedule"
        problems.append(Problem("optim.schedule", f"{parts} is longer than the {steps} steps", suggestion=mend))
    return problems


def _optimizer(known: Known) -> list[Problem]:
    name, nesterov, momentum, clip = (known[f"optim.{key}"] for key in ("name", "nesterov", "momentum", "clip"))
    muon, stage, offload = name == "muon", known["zero.stage"], known["zero.offload_optimizer"]
    wrong = [  # muon.py says why
        (name == "sgd" and nesterov and not momentum, "optim.nesterov", "needs momentum", "set optim.momentum above 0"),
        (muon and stage in (1, 2), "zero.stage", "no checkpoint can hold muon's momentum there", "set it to 0 or 3"),
        (muon and clip is not None, "optim.clip", "with muon it would cut steps, not gradients", "set it to null"),
        (muon and offload is not None, "zero.offload_optimizer", "muon steps where the weights are", "leave it out"),
    ]
    return [Problem(place, message, suggestion=mend) for applies, place, message, mend in wrong if applies]


def _precision(known: Known) -> list[Problem]:
    if known["precision.dtype"] == "fp16" and known["cluster.gpu"] is False:
        mend = "set it to bf16 or fp32, or leave cluster.gpu out"
        return [Problem("precision.dtype", "fp16 needs a GPU, and cluster.gpu is false", suggestion=mend)]
    return []


def _offload(known: Known) -> list[Problem]:
    if known["zero.offload_optimizer"] is not None and known["zero.stage"] == 0:
        mend = "set zero.stage to 1, 2 or 3, or leave zero.offload_optimizer out"
        return [
            Problem("zero.offload_optimizer", "stage 0 keeps the optimizer's state with the weights", suggestion=mend)
        ]
    return []


def _retention(known: Known) -> list[Problem]:
    every, keep_every = known["checkpoint.every"], known["checkpoint.keep_every"]
    if keep_every is not None and every == "auto":
        message = "with checkpoint.every: auto nobody knows beforehand which steps are saved"
        return [
            Problem("checkpoint.keep_every", message, suggestion="leave it out, or set checkpoint.every to a number")
        ]
    if keep_every is None or keep_every % every == 0:
        return []
    message = f"{keep_every} is not a multiple of checkpoint.every {every}, so most of these steps are never saved"
    multiples = [size for size in (keep_every // every * every, (keep_every // every + 1) * every) if size]
    return [Problem("checkpoint.keep_every", message, suggestion=f"set it to {_either(multiples)}")]


def _best(known: Known) -> list[Problem]:
    """The best checkpoints are known only if some are scored: at a step that is both saved and evaluated."""
    place, every, scored = "checkpoint.keep_best", known["checkpoint.every"], known["evaluate.every"]
    if not known[place]:
        return []
    if known["evaluate.best"] is None:
        mend = "set evaluate.best to set/metric, such as test/accuracy"
        return [Problem(place, "best by what? evaluate.best is empty", suggestion=mend)]
    if every == "auto":
        message = "with checkpoint.every: auto nobody knows whether a step that is evaluated is saved"
        return [Problem(place, message, suggestion="set checkpoint.every to a number")]
    if scored is None:
        mend = f"set evaluate.every to {every}, as checkpoint.every"
        return [Problem(place, "only the last step is evaluated, so there is none to choose from", suggestion=mend)]
    both = math.lcm(every, scored)
    if both > known["steps"]:
        message = f"no checkpoint before the last is evaluated: saved every {every} steps, evaluated every {scored}"
        return [Problem(place, message, suggestion=f"set evaluate.every to {every}, as checkpoint.every")]
    return []


def _evaluation(known: Known) -> list[Problem]:
    sets, every, best = sorted(known["data.evaluate"]), known["evaluate.every"], known["evaluate.best"]
    problems = []
    if every is not None and not sets:
        mend = "add `evaluate: {test: FOLDER}` to data, or leave evaluate.every out"
        problems.append(
            Problem("evaluate.every", "there is nothing to evaluate: data.evaluate is empty", suggestion=mend)
        )
    if best is not None:
        name, slash, metric = best.partition("/")
        mend = nearest(best, [f"{known_set}/{metric}" for known_set in sets])
        mend = mend or (
            f"the sets are: {', '.join(sets)}" if sets else "name a folder in data.evaluate, or leave it out"
        )
        if not slash or not metric:
            example = f"{sets[0] if sets else 'test'}/{name}"
            problems.append(Problem("evaluate.best", f"{best!r} is not set/metric", suggestion=f"such as {example}"))
        elif name not in sets:
            problems.append(Problem("evaluate.best", f"{name!r} is not a set of data.evaluate", suggestion=mend))
    return problems


def _train_folders(known: Known) -> list[Problem]:
    sources = known["data.train"]
    return [
        problem
        for name, source in sources.items()
        for problem in _folder("data.train" if [*sources] == ["train"] else f"data.train.{name}", source.folder)
    ]


def _evaluation_folders(known: Known) -> list[Problem]:
    return [
        problem for name, path in known["data.evaluate"].items() for problem in _folder(f"data.evaluate.{name}", path)
    ]


def _task_paths(known: Known) -> list[Problem]:
    """Whatever a task's own Config has as a path (a tokenizer, a pretrained folder) must be there.

    A run that has begun reads its checkpoints, and no pretrained folder any more.
    """
    paths = {f"task.{key}": value for key, value in known["task"].items() if isinstance(value, Path)}
    if paths.get("task.pretrained") and (known["runs"] / known["name"] / "config.yaml").is_file():
        del paths["task.pretrained"]
    return [_missing(place, path, "check the path") for place, path in paths.items() if not path.exists()]


def _second_home(known: Known) -> list[Problem]:
    """The store must be of a kind that fsspec knows, and its package installed; whether it answers is seen later."""
    url = known["checkpoint.url"]
    return [] if url is None else store_rules.kind("checkpoint.url", url)


def _missing(place: str, path: Path, mend: str) -> Problem:
    message = f"there is no {path}" + ("" if path.is_absolute() else f" in {os.getcwd()}")
    hint = f"variables are not replaced here: write it out, or as {place}=... for a shell" if "$" in str(path) else None
    return Problem(place, message, suggestion=hint or nearest(str(path), map(str, path.parent.glob("*"))) or mend)


def _folder(place: str, folder: Path | str) -> list[Problem]:
    if isinstance(folder, str) and not folder.startswith("file://"):
        return store_rules.data_set(place, folder)
    folder = Path(str(folder).removeprefix("file://"))
    if not folder.is_dir():
        return [_missing(place, folder, f"make it with {_pack(folder)}")]
    if (folder / "shards.idx").is_file():
        return []
    if any(folder.glob("*.tar")):
        old = ", only one of an older Millstream (index.json)" if (folder / "index.json").is_file() else ""
        message = f"the shards in {folder} have no index{old}"
        return [Problem(place, message, suggestion=f"run `millstream data index {folder}`")]
    mend = f"name a folder of packed shards; raw files are packed with {_pack(folder)}"
    return [Problem(place, f"{folder} holds neither shards.idx nor tar shards", suggestion=mend)]


def _pack(folder: Path) -> str:
    """The command that makes `folder`; packing writes OUT/train and OUT/test."""
    if folder.name in ("train", "test"):
        return f"`millstream data pack SOURCE {folder.parent}`"
    return "`millstream data pack SOURCE OUT`, which makes OUT/train"


def _workers_or_one(known: Known) -> int:
    with suppress(Unread):
        return max(1, known["cluster.workers"])
    return 1


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, int(number**0.5) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _around(value: int, choices: list[int]) -> list[int]:
    """The nearest choice below and the nearest above."""
    return [*[size for size in choices if size <= value][-1:], *[size for size in choices if size > value][:1]]


def _either(values: list[int]) -> str:
    return " or ".join(map(str, values))
