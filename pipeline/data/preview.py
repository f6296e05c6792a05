"""A look into a data set: a summary for the terminal, and samples as one picture or one page (drawn by sheet.py).

A few samples, spread evenly, stand for all; classes are counted by the card where there is one, else over at most
`COUNTED` samples. Text is read with the tokenizer beside the shards. What it gives up: it checks nothing, that is what
`millstream data verify` is for.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import sheet
from pipeline.data.pack.tokenizer import load_tokenizer
from pipeline.data.reader import Dataset, Sample, open_dataset
from pipeline.data.sheet import Shown, Sound
from pipeline.data.sound import Audio
from pipeline.data.storage import Storage, beside, is_url
from pipeline.errors import DataError
from pipeline.whole_file import put

COUNTED = 100_000  # samples whose class is read when no card tells,
COUNTED_REMOTE = 200  # and of a URL, where each is fetched
LOOK_BYTES = 1 << 18  # of a URL: bytes around a sample that are fetched with it
PAGE_CHARACTERS = 20_000  # of one sample's text on a page
PICTURES = ("jpg", "jpeg", "jpe", "png", "webp")


def preview(folder: Path | str, count: int = 4) -> str:
    """What is in a data set, as text: size, card, classes, and `count` samples with their fields. Raises DataError."""
    with open_dataset(folder, block_bytes=LOOK_BYTES if is_url(folder) else None) as dataset:
        storage = dataset.index.storage
        samples = _spread(dataset, max(count, 16))
        parts = [_size(dataset), *_card(storage), *_classes(dataset), *_shapes(samples)]
        show = _Show(storage)
        for sample in _spread(dataset, count):
            parts += ["", f"sample {sample.number}, {sample.key}"]
            parts += [f"  {field}: {show.field(sample, field)}" for field in sample.fields]
    return "\n".join(parts)


def describe(storage: Storage, sample: Sample) -> list[str]:
    """A line for each field of one sample."""
    show = _Show(storage)
    return [f"{field}: {show.field(sample, field)}" for field in sample.fields]


def write_sheet(folder: Path | str, out: Path | str, count: int = 64) -> None:
    """Write `count` samples, spread evenly, as one file: a picture (.png, images only) or a page (.html).

    Raises DataError for another ending, a picture of samples that hold none, and what cannot be written.
    """
    out = Path(out)
    suffix = out.suffix.lower()
    if suffix not in (".png", ".html"):
        raise DataError(f"{out.name}: a sheet is a .png or a .html file; name it so")
    with open_dataset(folder, block_bytes=LOOK_BYTES if is_url(folder) else None) as dataset:
        samples, show = _spread(dataset, count), _Show(dataset.index.storage)
        shown = [show.sample(sample) for sample in samples]
        if suffix == ".html":
            facts = [_size(dataset), *_card(dataset.index.storage), *_classes(dataset)]
            name = str(folder).rstrip("/").rpartition("/")[2] if is_url(folder) else Path(folder).resolve().name
            _put(out, sheet.page(name, facts, shown).encode())
        elif any(sample.pictures for sample in shown):
            drawn = io.BytesIO()
            sheet.draw(shown).save(drawn, "png")
            _put(out, drawn.getbuffer())
        else:
            raise DataError(
                f"{folder} holds no pictures but {', '.join(samples[0].fields)}; write a .html page instead"
            )


def _put(out: Path, content: bytes | memoryview) -> None:
    try:
        put(out, [content])
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); name another file") from error


class _Show:
    """How the fields of one data set read: with its class names and its tokenizer, if it has them."""

    def __init__(self, storage: Storage) -> None:
        self.classes = _read_json(storage, "classes.json") or []
        self.tokenizer = None
        if (content := beside(storage, "tokenizer.json")) is not None:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "tokenizer.json").write_bytes(content)
                self.tokenizer = load_tokenizer(Path(folder))

    def sample(self, sample: Sample) -> Shown:
        """What a sheet shows of a sample: all pictures, all sounds, and in words the rest."""
        title = f"{sample.number}: {self.class_name(sample['cls'])}" if "cls" in sample else f"{sample.number}"
        pictures, sounds, words = [], [], []
        for field in sample.fields:
            kind, value = field.rpartition(".")[2], sample[field]
            if kind in PICTURES:
                pictures.append(value)
            elif isinstance(value, Audio):
                sounds.append(Sound(value, kind, sample.raw(field)))
            elif isinstance(value, str):
                words.append(value)
            elif field != "cls":
                words.append(f"{field}: {self.field(sample, field)}")
        tokens = self.text(sample["npy"]) if "npy" in sample else None
        text = "\n".join(words) if tokens is None else tokens
        return Shown(title, sample.key, pictures, sounds, _short(text, PAGE_CHARACTERS))

    def field(self, sample: Sample, field: str, characters: int = 300) -> str:
        """One line on one field."""
        value = sample[field]
        if field == "cls":
            return self.class_name(value)
        if isinstance(value, Audio):
            return f"{sheet.sound_line(value)}, {len(sample.raw(field)):,} bytes"
        if isinstance(value, np.ndarray):
            text = self.text(value) if field == "npy" else None
            if field == "mask.npy" and "npy" in sample and value.shape == sample["npy"].shape:
                text = self.text(sample["npy"][value != 0])
            what = f"{value.dtype}[{', '.join(map(str, value.shape))}]"
            if text is not None:
                return f"{what} {'learnt: ' * (field != 'npy')}{_short(text, characters)!r}"
            if not value.size:
                return what
            ends = f", {value.min():g} to {value.max():g}" if np.issubdtype(value.dtype, np.number) else ""
            return f"{what}{ends}, {len(sample.raw(field)):,} bytes"
        return f"{len(value)} bytes" if isinstance(value, bytes) else repr(_short(str(value), characters))

    def class_name(self, value: int) -> str:
        """The number of a class and its name, if it has one of its own."""
        name = str(self.classes[value]) if 0 <= value < len(self.classes) else ""
        return f"{value} ({name})" if name and name != str(value) else str(value)

    def text(self, tokens: np.ndarray) -> str | None:
        """What a row of tokens says, None when there is no tokenizer or these are no tokens."""
        if self.tokenizer is None or tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            return None
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def _spread(dataset: Dataset, count: int) -> list[Sample]:
    """At most `count` samples, at even distances from the first to the last."""
    numbers = np.unique(np.linspace(0, len(dataset) - 1, min(max(count, 1), len(dataset))).astype(int))
    if dataset.remote is not None:
        dataset.remote.ask_all(numbers)
    return [dataset.sample(int(number)) for number in numbers]


def _size(dataset: Dataset) -> str:
    index = dataset.index
    return (
        f"{index.place}: {index.samples:,} samples in {len(index.shards)} shards, {index.bytes / 1e6:,.1f} MB, "
        f"identity {index.identity[:12]}"
    )


def _card(storage: Storage) -> list[str]:
    card = _read_json(storage, "card.json")
    if not card:
        return []
    licence = f", licence {card['licence']}" if card.get("licence") else ""
    lines = [f"packed from {card['source']} as {card['kind']}, split {card['split']}{licence}"]
    if card["kind"] == "text":
        keys = ("files", "documents", "tokens", "bytes", "rows", "length", "vocab_size")
        lines.append(", ".join(f"{key.replace('_', ' ')} {card[key]:,}" for key in keys))
        if card.get("xz_bytes"):
            lines.append(f"xz -9 of this text: {8 * card['xz_bytes'] / card['bytes']:.3f} bits per byte")
    return lines + [f"warning: {warning}" for warning in card.get("warnings", [])]


def _classes(dataset: Dataset) -> list[str]:
    """The balance of the classes: how many there are, the largest, the smallest."""
    card = _read_json(dataset.index.storage, "card.json") or {}
    if "classes" in card:
        counts, note = Counter(card["classes"]), ""
    elif "cls" in dataset.sample(0):
        show = _Show(dataset.index.storage)
        samples = _spread(dataset, COUNTED if dataset.remote is None else COUNTED_REMOTE)
        counts = Counter(show.class_name(sample["cls"]) for sample in samples if "cls" in sample)
        note = f" (of {len(samples):,} samples)" if len(samples) < len(dataset) else ""
    else:
        return []
    ranked = [f"{name}: {number:,}" for name, number in counts.most_common()]
    listed = ranked if len(ranked) <= 12 else [*ranked[:6], "...", *ranked[-5:]]
    return [f"{len(counts)} classes, samples of each{note}: {', '.join(listed)}"]


def _shapes(samples: Sequence[Sample]) -> list[str]:
    """One line per field: in how many samples of those looked at, and with which shapes."""
    shapes: dict[str, Counter[str]] = {}
    for sample in samples:
        for field in sample.fields:
            value = sample[field]
            shapes.setdefault(field, Counter())[_shape(value)] += 1
    lines = []
    for field, counts in shapes.items():
        common = ", ".join(f"{number} x {what}" for what, number in counts.most_common(4))
        more = f" and {len(counts) - 4} more" if len(counts) > 4 else ""
        lines.append(f"field {field}, {len(samples)} samples looked at: {common}{more}")
    return lines


def _shape(value: Any) -> str:
    if isinstance(value, Audio):
        return f"sound at {sheet.sound_kind(value)}"
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


def _short(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 3] + "..."


def _read_json(storage: Storage, name: str) -> Any:
    """The JSON in a file beside the shards, None when there is no such file; DataError when it cannot be read."""
    content = beside(storage, name)
    try:
        return None if content is None else json.loads(content)
    except ValueError as error:
        what = f"{storage.place}/{name} is not readable JSON ({error})"
        raise DataError(f"{what}; remove it, or pack the data set again") from error
