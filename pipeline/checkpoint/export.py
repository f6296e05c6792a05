"""A checkpoint -> a folder that the `from_pretrained` of transformers, or diffusers, opens.

    manifest -> export_plan: which tensor goes where -> rank files, once from end to end -> settings -> one rename

Every rank file is read once, in its own order: each piece goes into the file's sha256, is rounded, and is written to
its place in an output file of known size. So memory is a few pieces per thread, whatever the sizes of tensors, ranks
and shards, and no value counts before the digest of its file has been compared. Nothing is there until all of it is.
No process group and no DeepSpeed. What it gives up: the optimizer's state is read too, as digests are of whole files;
networks that are neither's own are refused.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

import torch
from torch import Tensor

from pipeline.checkpoint import disk, format, model_card
from pipeline.checkpoint.export_plan import Plan, Wanted, make_plan
from pipeline.checkpoint.fragments import bytes_of
from pipeline.checkpoint.manifest import FileDigest, Manifest
from pipeline.errors import CheckpointError
from pipeline.models import exported
from pipeline.models.tensor_file import DTYPES, read_header

Dtype = Literal["float32", "bfloat16", "float16"]
Progress = Callable[[str, int, int], None]
PIECE_BYTES = 1 << 23  # a multiple of the size of every element
THREADS = 4
SHARD_BYTES = 5_000_000_000
WATCH_SECONDS = 0.1


@dataclass(frozen=True)
class Exported:
    """What was written. `files`: bytes by name; `opener`: the class of `package` that opens it; `notes`: a line for
    each thing to know.
    """

    folder: Path
    checkpoint: Path
    step: int
    dtype: str
    files: dict[str, int]
    tensors: int
    package: str
    opener: str
    notes: list[str]


def export(
    source: Path,
    folder: Path,
    *,
    dtype: Dtype = "float32",
    ema: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda stage, done, total: None,
) -> Exported:
    """Write the network of a checkpoint, or of a run's newest one, into the new folder `folder`.

    Values are the fp32 masters (`ema`: their running averages) rounded once to `dtype`; what is not trained is rounded
    from what it is. `progress` is given bytes. Raises CheckpointError, with nothing left behind, when `folder` is
    there, a byte of the checkpoint is not as written, or its network is not one that transformers or
    diffusers can open.
    """
    path, manifest = _open(source)
    if folder.exists():
        raise CheckpointError(f"{folder} is there already; name a new folder, or remove this one. Nothing was written.")
    plan = make_plan(path, manifest, getattr(torch, dtype), "ema" if ema else "master", shard_bytes)
    staging = folder.absolute().parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
    try:
        with _explained(folder, plan.bytes):
            staging.parent.mkdir(parents=True, exist_ok=True)
            if plan.bytes > disk.free_bytes(staging.parent):
                raise OSError(errno.ENOSPC, "too little space")
            disk.make_folder(staging)
            _write_tensors(path, manifest, plan, staging, progress)
            opener, notes = model_card.write_beside(plan, path, manifest, staging, folder)
            written = sorted(staging.rglob("*"))
            sizes = {each: each.stat().st_size for each in written if each.is_file()}
            for each in (*written, staging):
                disk.sync(each)
            disk.rename(staging, folder)
            disk.sync(staging.parent)
    except BaseException:  # Ctrl-C too
        disk.discard(staging)
        raise
    files = {each.relative_to(staging).as_posix(): size for each, size in sizes.items()}
    package = exported.package(plan.module)
    return Exported(folder, path, manifest.step, dtype, files, len(plan.outputs), package, opener, notes)


def _open(source: Path) -> tuple[Path, Manifest]:
    """A checkpoint's folder, or the newest checkpoint of a run's; manifest and sizes are checked."""
    if (source / format.MANIFEST).is_file():
        listed = [each for each in format.list_checkpoints(source.absolute().parent) if each.path.name == source.name]
    else:
        listed = format.list_checkpoints(source / "checkpoints") or format.list_checkpoints(source)
    if not listed:
        raise CheckpointError(
            f"{source} is neither a checkpoint nor a run that has one; `millstream checkpoint list RUN` shows them"
        )
    newest = listed[-1]
    if newest.manifest is None or newest.damage:
        _refuse(newest.path, "; ".join(map(str, newest.damage)))
    return newest.path, newest.manifest


def _refuse(path: Path, detail: str) -> NoReturn:
    others = [each.path.name for each in format.list_checkpoints(path.absolute().parent) if each.path != path]
    mend = f"; an older one can be exported by its folder: {', '.join(others)}" if others else ""
    raise CheckpointError(f"not exported, {path.name} is damaged: {detail}. Nothing was written{mend}")


def _write_tensors(path: Path, manifest: Manifest, plan: Plan, staging: Path, progress: Progress) -> None:
    """All output files, from one pass over the rank files."""
    total, done, stop = sum(manifest.files[file].bytes for file in plan.wanted), [0], threading.Event()
    with ExitStack() as stack:
        outputs: dict[str, BinaryIO] = {}
        for file, (head, size) in plan.files.items():
            (staging / file).parent.mkdir(exist_ok=True)
            outputs[file] = stack.enter_context((staging / file).open("xb"))
            outputs[file].write(head)
            outputs[file].truncate(size)
            outputs[file].flush()
        for output in plan.outputs:
            if output.constant is not None:
                _place(outputs[output.file], bytes_of(output.constant.view(-1)), output.begin)
        pool = stack.enter_context(ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)))
        stack.callback(stop.set)  # before the pool waits for its threads
        jobs = [
            pool.submit(_copy, path / file, manifest.files[file], wanted, outputs, stop, done)
            for file, wanted in plan.wanted.items()
        ]
        while wait(jobs, WATCH_SECONDS).not_done and not any(job.done() and job.exception() for job in jobs):
            progress("export", min(done[0], total - 1), total)
        for job in jobs:
            if job.done():
                job.result()
        progress("export", total, total)


def _copy(
    path: Path,
    expected: FileDigest,
    wanted: Mapping[str, Wanted],
    outputs: Mapping[str, BinaryIO],
    stop: threading.Event,
    done: list[int],
) -> None:
    """One rank file from end to end; raises CheckpointError when it is not the file that was written."""
    buffer = memoryview(bytearray(PIECE_BYTES))
    with path.open("rb") as file:
        source = _Hashed(file)
        try:
            places = read_header(source)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            _refuse(path.parent, f"{path.name}: {error}")
        if any(name not in places or places[name].dtype != each.dtype for name, each in wanted.items()):
            _refuse(path.parent, f"{path.name} does not hold what the manifest says")
        for name, place in places.items():
            for begin in range(place.begin, place.end, PIECE_BYTES):
                piece = buffer[: min(PIECE_BYTES, place.end - begin)]
                if begin != source.bytes or not source.fill(piece):
                    _refuse(path.parent, f"{path.name}: its header and its size do not agree")
                if name in wanted:
                    _round(piece, wanted[name], begin - place.begin, outputs)
                done[0] += len(piece)  # for the bar only: a lost count between threads does no harm
                if stop.is_set():
                    return
        if file.read(1) or FileDigest(source.bytes, source.digest.hexdigest()) != expected:
            _refuse(path.parent, f"{path.name} does not match its sha256: bits have flipped or it was overwritten")


class _Hashed:
    """A file, and the sha256 of what was read of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest, self.bytes = file, hashlib.sha256(), 0

    def read(self, count: int) -> bytes:
        content = self._file.read(count)
        self.digest.update(content)
        self.bytes += len(content)
        return content

    def fill(self, view: memoryview) -> bool:
        """False when the file ends first."""
        count = self._file.readinto(view)  # type: ignore[attr-defined]
        self.digest.update(view[:count])
        self.bytes += count
        return count == len(view)


def _round(piece: memoryview, wanted: Wanted, offset: int, outputs: Mapping[str, BinaryIO]) -> None:
    """Elements of one fragment, from byte `offset` of it on, into every output that they are for."""
    dtype = DTYPES[wanted.dtype]
    exact = torch.frombuffer(piece, dtype=dtype)
    for output in wanted.outputs:
        rounded: Tensor = exact.to(output.dtype)
        if output.dtype == torch.float16 and bool((rounded.isinf() & exact.isfinite()).any()):
            raise CheckpointError(
                f"not exported: {output.name} has values beyond 65,504, the largest of float16; use --dtype bfloat16"
            )
        element = wanted.start + offset // dtype.itemsize
        _place(outputs[output.file], bytes_of(rounded), output.begin + element * output.dtype.itemsize)


def _place(file: BinaryIO, content: memoryview, begin: int) -> None:
    while content:
        written = os.pwrite(file.fileno(), content, begin)
        content, begin = content[written:], begin + written


@contextmanager
def _explained(folder: Path, bytes_needed: int) -> Iterator[None]:
    """Turns an OSError into a CheckpointError that says where, how much, and that nothing is left."""
    try:
        yield
    except OSError as error:
        room = f"{bytes_needed / 1e6:,.1f} MB needed, {disk.free_bytes(folder.absolute().parent) / 1e6:,.1f} MB free"
        raise CheckpointError(
            f"not exported to {folder}: {error.strerror or error} ({room}); choose another place, or make room there. "
            "Nothing is left of it."
        ) from error
