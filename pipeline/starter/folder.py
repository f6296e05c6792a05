"""A first configuration for a folder of data: what is in it, and a complete YAML for a small network on it.

    folder -> Found (kind, counts, sizes, classes) -> commands to pack it, YAML with every choice and its reason

Folders of images and of sounds by class, text and JSONL are configured before they are packed; shards of images, sounds
or token rows that are there already as they are. The numbers are those of a small first run on a laptop, in round
powers of two. What it gives up: tables, arrays and other tars: pack them, then ask again about what was packed.
"""

from __future__ import annotations

import re
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from pipeline.data.decode import decode
from pipeline.data.pack import corpus, pack
from pipeline.data.pack.folders import class_files
from pipeline.data.reader import open_dataset
from pipeline.data.sound import Audio
from pipeline.data.stats import Stats, stats
from pipeline.errors import ConfigError, DataError
from pipeline.sections import Name
from pipeline.yaml_file import scalar

LOOKED = 200  # files that are opened
SIDES = (32, 48, 64, 96, 128, 160, 192, 224)
IMAGES, SOUNDS = ("jpg", "jpeg", "png", "webp"), ("wav", "flac", "ogg")
HELD_OUT = 0.1
NOTHING = "{}"  # held out


@dataclass
class Found:
    """What is in a folder. lines: of it, for people.  choices: values for the template, by their names in it.

    commands: to be run before `millstream doctor`.
    """

    task: str
    lines: list[str]
    choices: dict[str, object]
    commands: list[str] = field(default_factory=list)


def look(folder: Path, name: str, data: Path) -> Found:
    """What is in `folder`, to be packed into data/<name>. Raises DataError for what cannot be configured yet."""
    packed = folder / "train" if (folder / "train" / "shards.idx").is_file() else folder
    if (packed / "shards.idx").is_file():
        return _shards(packed, folder / "test")
    kind, out = pack.detect(folder), data / name
    command = f"{shlex.join(['millstream', 'data', 'pack', str(folder), str(out)])} --holdout {HELD_OUT}"
    if kind == "images":
        return _images(folder, out, command)
    if kind == "audio":
        return _sounds(folder, out, command)
    if kind == "text":
        return _text(folder, out, command)
    if kind == "tars":
        raise DataError(
            f"{folder} holds tar shards without an index: run `millstream data index {shlex.quote(str(folder))}`, "
            f"then `millstream init {shlex.quote(str(folder))}` again"
        )
    raise DataError(
        f"{folder} holds {pack.CALLED.get(kind, kind)}: pack it first, `{command}`, "
        f"then `millstream init {shlex.quote(str(out))}`"
    )


def name_of(folder: Path) -> str:
    """The folder's name, or the file's without its ending, as the name of a run."""
    whole = folder.resolve()
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", whole.stem if whole.is_file() else whole.name).strip("-._")
    return plain or "run"


def check_name(name: str) -> str:
    """`name` as it is. Raises ConfigError when no run can have it."""
    try:
        return TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise ConfigError(f"--name {name!r} is no name of a run: letters, digits, . _ - and no spaces") from None


def _batches(samples: int, epochs: int) -> dict[str, object]:
    """Batch and steps for so many samples."""
    batch = next((size for size in (64, 32, 16, 8) if samples >= 8 * size), 4)
    steps = max(50, min(5_000, round(epochs * samples / batch, -1) if samples >= batch else 50))
    return {
        "batch": batch,
        "micro": max(4, batch // 4),
        "steps": int(steps),
        "warmup": max(1, int(steps) // 10),
        "every": max(10, int(steps) // 5),
        "epochs": f"{steps * batch / max(1, samples):.1f}",
    }


def _paths(out: Path) -> dict[str, object]:
    return {"train": scalar(out / "train"), "test": f"{{test: {scalar(out / 'test')}}}"}


def _images(folder: Path, out: Path, command: str) -> Found:
    paths = sorted(class_files(folder, "images"))
    classes = Counter(path.parent.name for path in paths)
    if len(classes) < 2:
        raise DataError(f"{folder} has one class folder, {next(iter(classes))}: there is nothing to tell apart")
    sides, modes = [], Counter[str]()
    for path in paths[:: max(1, len(paths) // LOOKED)]:
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
                modes["grey" if image.mode in ("1", "L", "I;16") else "colour"] += 1
        except OSError:
            continue  # `data pack` names it
    if not sides:
        raise DataError(f"no picture in {folder} can be opened, of {len(paths)}")
    side, most = round(statistics.median(sides)), classes.most_common()
    lines = [f"{len(paths):,} pictures in {len(classes)} classes: {_some(classes)}"]
    lines.append(f"shorter side {min(sides)} to {max(sides)} pixels, median {side}; {_shares(modes)}")
    if most[0][1] > 10 * most[-1][1]:
        lines.append(f"uneven: {most[0][1]:,} of {most[0][0]}, {most[-1][1]:,} of {most[-1][0]}")
    choices = _image_choices(len(classes), modes["grey"] > modes["colour"], side)
    return Found(
        "image_classification",
        lines,
        choices | _batches(round(len(paths) * (1 - HELD_OUT)), 20) | _paths(out),
        [command],
    )


def _image_choices(classes: int, grey: bool, side: int) -> dict[str, object]:
    size = next((each for each in SIDES if each >= side), SIDES[-1])
    return {"classes": classes, "channels": 1 if grey else 3, "size": size, "flip": "false" if grey else "true"}


def _sounds(folder: Path, out: Path, command: str) -> Found:
    from pipeline import task_file

    if "audio_classification" not in task_file.names():
        raise DataError(
            f"{folder} holds sounds, and there is no task for sounds: name one of your own, README.md says how"
        )
    paths = sorted(class_files(folder, "audio"))
    classes = Counter(path.parent.name for path in paths)
    if len(classes) < 2:
        raise DataError(f"{folder} has one class folder, {next(iter(classes))}: there is nothing to tell apart")
    looked = paths[:: max(1, len(paths) // LOOKED)]  # `data pack` names those that cannot be read
    heard, told = _heard(folder, (partial(_decoded, path) for path in looked))
    lines = [f"{len(paths):,} sounds in {len(classes)} classes: {_some(classes)}", told]
    choices = {"classes": len(classes), **heard}
    batches = _batches(round(len(paths) * (1 - HELD_OUT)), 20)
    return Found("audio_classification", lines, choices | batches | _paths(out), [command])


def _decoded(path: Path) -> Audio:
    return decode(path.suffix[1:].lower(), path.read_bytes())


def _heard(place: Path, sounds: Iterable[Callable[[], Audio]]) -> tuple[dict[str, object], str]:
    """Rate and seconds to take of sounds, as choices, and what they are, in words. Raises DataError for no one rate."""
    rates, seconds = set[int](), list[float]()
    for read in sounds:
        with suppress(OSError, DataError):
            sound = read()
            rates.add(sound.rate)
            seconds.append(len(sound.samples) / sound.rate)
    if not seconds:
        raise DataError(f"no sound in {place} can be read")
    if len(rates) > 1:
        told = ", ".join(f"{rate} Hz" for rate in sorted(rates))
        raise DataError(f"{place} holds sounds of several rates ({told}), and one is taken; resample them first")
    [rate], middle = rates, statistics.median(seconds)
    longest = sorted(seconds)[int(0.95 * (len(seconds) - 1))]
    choices: dict[str, object] = {"rate": rate, "seconds": max(0.1, round(longest + 0.05, 1))}
    return choices, f"{rate:,} Hz; {min(seconds):.2f} to {max(seconds):.2f} s, median {middle:.2f} s"


def _text(folder: Path, out: Path, command: str) -> Found:
    files = corpus.find_files(folder, corpus.PATTERNS)
    size = sum(path.stat().st_size for path in files)
    endings = Counter(path.suffix.lower() for path in files)
    lines = [f"{len(files):,} {'file' if len(files) == 1 else 'files'} of text, {size / 1e6:,.1f} MB: {_some(endings)}"]
    vocabulary = next(words for least, words in ((2e7, 8192), (2e6, 4096), (2e5, 2048), (0, 512)) if size >= least)
    length = 256 if size >= 2e6 else 128 if size >= 2e5 else 64
    rows = round(size / 3 / length * (1 - HELD_OUT))
    command += f" --kind text --vocabulary {vocabulary} --length {length}"
    choices = {"tokenizer": scalar(out / "train" / "tokenizer.json"), "length": length, "rows": rows}
    batches = _batches(max(rows, 1), 3) | {"batch": 16, "micro": 4}
    steps = int(max(50, min(2_000, round(3 * rows / 16, -1))))
    batches |= {"steps": steps, "warmup": steps // 10, "every": max(10, steps // 5)}
    batches["epochs"] = f"about {steps * 16 / max(1, rows):.1f}"
    return Found("language_modeling", lines, choices | batches | _paths(out), [command])


def _shards(packed: Path, test: Path) -> Found:
    """What was packed before, or indexed."""
    told = stats(packed, looked=LOOKED)
    fields = {each.name for each in told.fields}
    held = f"{{test: {scalar(test)}}}" if (test / "shards.idx").is_file() else NOTHING
    place: dict[str, object] = {"train": scalar(packed), "test": held}
    lines = [
        f"{told.samples:,} samples in {told.shards} shards, {told.bytes / 1e6:,.1f} MB: {', '.join(sorted(fields))}"
    ]
    if "npy" in fields and (packed / "tokenizer.json").is_file():
        from pipeline.data.vocabulary import read_vocabulary

        tokenizer = packed / "tokenizer.json"
        vocabulary = read_vocabulary(tokenizer)
        choices = {"tokenizer": scalar(tokenizer), "length": vocabulary.length or 256, "rows": told.samples}
        lines.append(f"rows of {choices['length']} tokens, of {vocabulary.size:,}")
        batches = _batches(told.samples, 3)
        return Found("language_modeling", lines, choices | batches | place)
    found = told.classes.get("cls", {})
    classes = max(max(found, default=0) + 1, len(told.class_names), 2)
    if found and fields & set(IMAGES):
        side, grey = _pictures(told)
        lines.append(f"{len(found)} classes; shorter side {side} pixels in the middle")
        choices = _image_choices(classes, grey, side)
        return Found("image_classification", lines, choices | _batches(told.samples, 20) | place)
    if found and fields & set(SOUNDS):
        with open_dataset(packed) as dataset:
            looked = range(0, len(dataset), max(1, len(dataset) // LOOKED))
            heard, said = _heard(packed, (lambda n=n: dataset.sample(n).first(*SOUNDS) for n in looked))
        lines.append(f"{len(found)} classes; {said}")
        return Found("audio_classification", lines, {"classes": classes, **heard} | _batches(told.samples, 20) | place)
    raise DataError(
        f"{packed} holds {', '.join(sorted(fields))}: no image or sound with a class and no row of tokens; "
        "write a task of your own, README.md says how"
    )


def _pictures(told: Stats) -> tuple[int, bool]:
    """(median of the shorter side, whether most are grey) of the pictures that were looked into."""
    content = next(each for each in told.contents if each.name in IMAGES)
    sides = [spread.median for name, spread in content.measures.items() if name in ("height", "width")]
    grey = sum(count for kind, count in content.kinds.items() if kind.split()[-1] in ("L", "1", "grey", "GRAY"))
    return round(min(sides, default=224.0)), 2 * grey > content.looked


def _some(counts: Counter[str]) -> str:
    every = counts.most_common()
    told = ", ".join(f"{name} {count:,}" for name, count in every[:5])
    return told + (f" and {len(every) - 5} more" if len(every) > 5 else "")


def _shares(counts: Counter[str]) -> str:
    return " and ".join(f"{count / counts.total():.0%} {name}" for name, count in counts.most_common())
