"""The corpus of `millstream doctor`: broken.yaml and good.yaml, and how an entry becomes files and an environment.

Every entry is a change of one of two good inputs: `images` (grey squares in 4 classes, a small ResNet) and `words`
(rows of 16 tokens, a small Llama), both with held-out data. Which third of the broken ones was set aside before any
detector was written is drawn by `draw` and stands in held_out.txt.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.data import index
from tests import small_data

HERE = Path(__file__).parent
GONE, SEED, HELD_OUT = "GONE", 20261126, HERE / "held_out.txt"

WORDS = {
    "name": "language_modeling",
    "tokenizer": "{data}/words/tokenizer.json",
    "length": 16,
    "architecture": "llama",
    "model": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}
IMAGES = {
    "name": "image_classification",
    "classes": 4,
    "channels": 1,
    "image_size": 12,
    "architecture": "resnet",
    "model": {"layer_type": "basic", "embedding_size": 4, "hidden_sizes": [4, 4], "depths": [1, 1]},
}
GOOD: dict[str, dict[str, Any]] = {
    base: {
        "name": base,
        "seed": 0,
        "steps": 20,
        "global_batch_size": 16,
        "micro_batch_size": 4,
        "runs": "{data}/runs",
        "data": {"train": f"{{data}}/{base}"} | ({"evaluate": {"test": "{data}/test"}} if base == "images" else {}),
        "task": task,
        "optim": {"name": "adamw", "lr": 0.001, "schedule": {"warmup": 4}},
        "checkpoint": {"every": 5},
        "track": {"wandb": "off"},
        "cluster": {"workers": 2},
    }
    | ({"evaluate": {"every": 5, "best": "test/accuracy"}} if base == "images" else {})
    for base, task in (("words", WORDS), ("images", IMAGES))
}


def entries(name: str) -> list[dict[str, Any]]:
    """Those of broken.yaml, fresh.yaml or good.yaml."""
    return yaml.safe_load((HERE / f"{name}.yaml").read_text())


def draw() -> list[str]:
    """The third of the broken entries that is set aside, by the seed."""
    names = sorted(entry["id"] for entry in entries("broken"))
    return sorted(random.Random(SEED).sample(names, len(names) // 3))


def held_out() -> set[str]:
    """Those that were set aside, as they were drawn before the detectors were written."""
    return set(HELD_OUT.read_text().split())


def make_good(folder: Path) -> Path:
    """Both data sets, to be copied for each entry."""
    small_data.images(folder / "images")
    small_data.images(folder / "test", count=40)
    small_data.rows(folder / "words")
    small_data.rows(folder / "held_out", count=48)
    for name in ("words", "held_out"):
        (folder / name / "text.json").write_text(json.dumps({"length": 16, "vocab_size": 257, "eot_id": 0}))
    return folder


def make(entry: dict[str, Any], good: Path, folder: Path) -> Path:
    """The files of an entry in `folder`, from the data in `good`; its configuration."""
    shutil.copytree(good, folder / "data")
    data = folder / "data"
    for action in entry.get("data", []):
        ((name, given),) = action.items()
        ACTIONS[name](data, given)
    path = folder / "run.yaml"
    if "file" in entry:
        path.write_text(entry["file"])
        return path
    values = json.loads(json.dumps(GOOD[entry["base"]]))
    for place, value in entry.get("set", {}).items():
        _set(values, place.split("."), value)
    at_target = "folder" in entry.get("args", {})  # relative paths begin there; here, in the working directory
    text = yaml.safe_dump(values, sort_keys=False).replace("{data}", "data" if at_target else str(data))
    if "text" in entry:
        old, new = entry["text"]
        assert old in text, f"{entry['id']}: {old!r} is not in its file"
        text = text.replace(old, new)
    path.write_text(text)
    return path


def pretend(versions: dict[str, str], folder: Path) -> Path:
    """A folder that, first on the path, makes packages show other versions than they have."""
    for name, version in versions.items():
        shown = folder / f"{name}-{version}.dist-info"
        shown.mkdir(parents=True)
        (shown / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
    if value == GONE:
        values.pop(path[-1], None)
    else:
        values[path[-1]] = value


def _delete(data: Path, name: str) -> None:
    shutil.rmtree(data / name) if (data / name).is_dir() else (data / name).unlink()


def _write(data: Path, given: list[str]) -> None:
    path = data / given[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(given[1])


def _truncate(data: Path, name: str) -> None:
    content = (data / name).read_bytes()
    (data / name).write_bytes(content[: len(content) // 2])


def _flip(data: Path, name: str) -> None:
    """One bit of the first member's content in a tar (which begins after a header of 512 bytes), or of any file."""
    content = bytearray((data / name).read_bytes())
    content[512 + 60 if name.endswith(".tar") else len(content) // 2] ^= 4
    (data / name).write_bytes(content)


def _link(data: Path, given: list[str]) -> None:
    (data / given[0]).unlink()
    (data / given[0]).symlink_to(given[1])


def _future(data: Path, name: str) -> None:
    later = time.time() + 9e6
    os.utime(data / name, (later, later))


def _json(data: Path, given: list[Any]) -> None:
    path, values = data / given[0], json.loads((data / given[0]).read_text())
    path.write_text(json.dumps(values | {given[1]: given[2]}))


def _vocabulary(data: Path, given: list[Any]) -> None:
    """A tokenizer that has only the first tokens of its own, and a text.json that says so."""
    path, size = data / given[0], given[1]
    values = json.loads(path.read_text())
    values["model"]["vocab"] = {token: n for token, n in values["model"]["vocab"].items() if n < size}
    path.write_text(json.dumps(values))
    _json(path.parent, ["text.json", "vocab_size", size])


def _pretrained(data: Path, given: list[Any]) -> None:
    """A small ResNet as transformers writes one: [folder, channels, classes]."""
    import transformers

    name, channels = given[:2]
    classes = given[2] if len(given) > 2 else 4
    options = {**IMAGES["model"], "num_channels": channels, "num_labels": classes}  # pyright: ignore[reportGeneralTypeIssues]
    transformers.ResNetForImageClassification(transformers.ResNetConfig(**options)).save_pretrained(data / name)


def _lose_tensors(data: Path, name: str) -> None:
    """Every second tensor of a pretrained folder."""
    from safetensors.torch import load_file, save_file

    path = data / name / "model.safetensors"
    save_file({key: value for n, (key, value) in enumerate(sorted(load_file(path).items())) if n % 2}, path)


def _rewrite(data: Path, given: dict[str, Any]) -> None:
    """Change a field of every sample, or of `only` some, and index the tars again."""
    folder, changed = data / given["folder"], {f"{number:05d}" for number in given.get("only", range(10_000))}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as old:
            members = [(member.name, old.extractfile(member).read()) for member in old]  # type: ignore[union-attr]
        with tarfile.open(path, "w") as new:
            for name, content in members:
                key, _, field = name.partition(".")
                if key in changed and field == given["field"]:
                    if given.get("drop"):
                        continue
                    field, content = given.get("rename", field), _changed(content, given)
                member = tarfile.TarInfo(f"{key}.{field}")
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))
    index.build(folder)


def _changed(content: bytes, given: dict[str, Any]) -> bytes:
    if "text" in given:
        return given["text"].encode()
    if "cut" in given:
        return content[: given["cut"]]
    if "plus" in given:
        return str(int(content) + given["plus"]).encode()
    if "rows" not in given:
        return content
    row = np.load(io.BytesIO(content))
    kinds: dict[str, Callable[[], np.ndarray]] = {
        "square": lambda: np.stack([row, row]),
        "fractions": lambda: row.astype(np.float32),
        "long": lambda: np.concatenate([row, row]),
        "one": lambda: row[:1],
        "beyond": lambda: row + np.uint16(30_000),
        "objects": lambda: np.array([row, "x"], dtype=object),
    }
    out = io.BytesIO()
    np.save(out, kinds[given["rows"]](), allow_pickle=True)
    return out.getvalue()


ACTIONS: dict[str, Callable[[Path, Any], object]] = {
    "delete": _delete,
    "write": _write,
    "truncate": _truncate,
    "flip": _flip,
    "link": _link,
    "copy": lambda data, given: shutil.copyfile(data / given[0], data / given[1]),
    "rename": lambda data, given: (data / given[0]).rename(data / given[1]),
    "future": _future,
    "json": _json,
    "vocabulary": _vocabulary,
    "pretrained": _pretrained,
    "lose_tensors": _lose_tensors,
    "rewrite": _rewrite,
    "reindex": lambda data, name: index.build(data / name),
}
