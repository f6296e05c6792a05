"""What a checkpoint says of itself: shapes, where each piece of state lies, digests, and all that a resume compares.

A `Manifest` becomes one JSON file that carries its own sha256; bytes that do not match it are refused. Nothing is
guessed and nothing is repaired here. It gives up compactness: the table of fragments is text, about 100 bytes a row.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.errors import CheckpointError

VERSION = 1
MANIFEST = "manifest.json"
NAME = re.compile(r"(?:\.replaced-)?checkpoint-(\d{8,})")  # of a checkpoint's folder


class FileDigest(NamedTuple):
    """What a file must be: its size in bytes and the sha256 of its content, in hex."""

    bytes: int
    sha256: str


class FragmentPlace(NamedTuple):
    """Where a flat piece of one parameter's state lies: elements [start, start + numel) of the flattened `parameter`.

    `key` is the state ("master", "exp_avg", ...), `tensor` the name inside `file`, `dtype` safetensors' word ("F32").
    """

    file: str
    tensor: str
    parameter: str
    key: str
    start: int
    numel: int
    dtype: str


@dataclass(frozen=True)
class Manifest:
    """All that is known of a checkpoint besides the tensors. Free mappings hold what JSON can (lists, no tuples)."""

    step: int
    attempt: int
    world_size: int
    zero_stage: int
    dtype: str
    parameters: dict[str, tuple[int, ...]]
    """Canonical name to shape, in the model's order; buffers included."""
    fragments: tuple[FragmentPlace, ...]
    files: dict[str, FileDigest]
    aliases: dict[str, str] = field(default_factory=dict)
    """Names of tied parameters to the canonical name under which the tensor is stored."""
    scalars: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    """The network's config.json where it is one of transformers or diffusers, with the name of its class."""
    versions: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    """Threads, processor flags and whatever else ends bitwise equality when it differs on resume."""
    data: dict[str, Any] = field(default_factory=dict)
    """Identity of the data set, fingerprint of the order, recorded exceptions: substitutes, steps that are left out."""
    journal: dict[str, int] = field(default_factory=dict)
    """Attempt and sequence number of the last journal record known durable before the commit."""
    metrics: dict[str, float] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)
    """What the guard has seen of the latest steps, so that it decides after a restart as it would have without."""
    version: int = VERSION

    def to_bytes(self) -> bytes:
        """One JSON object whose first value is the sha256 of the second's text: any flipped bit is found."""
        rows = (f"{json.dumps(entry.name)}: {json.dumps(getattr(self, entry.name))}" for entry in fields(self))
        body = ("{\n" + ",\n".join(rows) + "\n}").encode()
        return _head(body) + body + b"}\n"

    @classmethod
    def from_bytes(cls, content: bytes) -> Manifest:
        """Reads `to_bytes`. Raises ValueError when a byte is not as written, CheckpointError for a newer version."""
        start = len(_head(b""))
        body = content[start:-2]
        if content[:start] != _head(body) or content[-2:] != b"}\n":
            raise ValueError("its content does not match its own sha256")
        raw = json.loads(body)
        if raw["version"] > VERSION:
            raise CheckpointError(
                f"is of format {raw['version']}, written by a newer Millstream; this one reads up to {VERSION}: upgrade"
            )
        raw["parameters"] = {name: tuple(shape) for name, shape in raw["parameters"].items()}
        raw["fragments"] = tuple(FragmentPlace(*row) for row in raw["fragments"])
        raw["files"] = {name: FileDigest(*digest) for name, digest in raw["files"].items()}
        return cls(**raw)


class Damage(NamedTuple):
    """One thing wrong with a checkpoint: which file of it, and how. `path`: its folder, or its place in a store."""

    path: Path | str
    file: str
    kind: Literal["missing", "unreadable", "size", "digest", "manifest", "version"]
    detail: str

    def __str__(self) -> str:
        return f"{self.path}/{self.file} {self.detail}"


def parse(place: Path | str, read: Callable[[], bytes]) -> tuple[Manifest | None, list[Damage]]:
    """The manifest of the checkpoint at `place`, whose bytes `read` gives, and what is wrong with it."""

    def damaged(kind: Literal["missing", "unreadable", "manifest", "version"], detail: str):
        return None, [Damage(place, MANIFEST, kind, detail)]

    try:
        manifest = Manifest.from_bytes(read())
    except FileNotFoundError:
        return damaged("missing", "is missing")
    except OSError as error:
        return damaged("unreadable", f"cannot be read: {error.strerror}")
    except CheckpointError as error:
        return damaged("version", str(error))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return damaged("manifest", f"is damaged: {error}")
    match = NAME.fullmatch(str(place).rpartition("/")[2])
    if match and int(match[1]) != manifest.step:
        return damaged("manifest", f"is of step {manifest.step}: the folder has been renamed")
    strangers = [name for name in manifest.files if Path(name).name != name]
    if strangers:
        return damaged("manifest", f"names a file outside its folder: {strangers[0]}")
    return manifest, []


def _head(body: bytes) -> bytes:
    return b'{"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'",\n"manifest": '
