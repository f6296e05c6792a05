"""A second home of a run's checkpoints: any store that fsspec knows, such as s3://bucket/folder.

    <url>/<run>/checkpoint-00000040/{rank-00000.safetensors, ..., manifest.json}

A store has no rename, so the manifest is the commit: `put` sends the files first, compares their sizes, and creates the
manifest last and exclusively; a folder without a valid one does not exist. `fetch` brings a checkpoint back through the
same staging, digests and rename as a save. Every error of a store comes out as a CheckpointError that names the URL.

Credentials and endpoints come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ..., FSSPEC_S3_...), never
from the configuration. What it gives up: an upload that was cut begins its file again; parts of it that a store keeps
are left to the store's own rules of expiry. Two runs of one name in one place are told apart by their attempts only.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.checkpoint import disk, format
from pipeline.checkpoint.format import MANIFEST, Damage, FileDigest, Manifest, checkpoint_name
from pipeline.errors import CheckpointError
from pipeline.object_store import file_system, said

CHUNK_BYTES = 16 << 20
_LOCAL = {"file", "local", "memory"}  # what makes folders and knows no buckets


class Absent(CheckpointError):
    """What was asked for is not there."""


class Refused(CheckpointError):
    """This checkpoint will never be sent, however often it is tried: it is damaged, or another one has its place."""


class Remote:
    """The checkpoints of one run in a store. Threads may share it."""

    def __init__(self, url: str, run: str) -> None:
        self.url = f"{url.rstrip('/')}/{run}"
        self._sent: set[tuple[str, FileDigest]] = set()  # so that a retry does not send again what has arrived

    def steps(self, given_up: Callable[[Manifest | None], bool] | None = None) -> list[int]:
        """Steps of all checkpoints that have a manifest, in order; without those that were `given_up`."""
        there = sorted(step for step, files in self.folders().items() if MANIFEST in files)
        return [step for step in there if not (given_up and given_up(self._parsed(step)))]

    def folders(self) -> dict[int, set[str]]:
        """Step -> names of the files, of all checkpoint folders, unfinished ones included."""
        found: dict[int, set[str]] = {}
        with self._explained():
            self._store.invalidate_cache()
            try:
                paths = self._store.find(self._root)
            except FileNotFoundError:
                paths = []
            if not paths and not self._is_local and not self._store.exists(self._root.split("/")[0]):
                raise CheckpointError(f"{self.url}: there is no bucket {self._root.split('/')[0]}: make it first")
        for path in paths:
            folder, _, name = path.rpartition("/")
            if match := re.fullmatch(r"checkpoint-(\d{8,})", folder.rpartition("/")[2]):
                found.setdefault(int(match[1]), set()).add(name)
        return found

    def manifest(self, step: int) -> bytes | None:
        """The bytes of a manifest; None when there is none."""
        try:
            return b"".join(self._chunks(f"{checkpoint_name(step)}/{MANIFEST}"))
        except Absent:
            return None

    def _parsed(self, step: int) -> Manifest | None:
        content = self.manifest(step) or b""
        return format.parse(f"{self.url}/{checkpoint_name(step)}", lambda: content)[0]

    def put(self, checkpoint: Path) -> int:
        """Send a local checkpoint, the manifest last; its bytes, 0 when all was there already.

        One of an older attempt is replaced. Raises Refused when this one is damaged or a newer attempt has put its
        own; CheckpointError for what a retry may mend.
        """
        try:
            content = (checkpoint / MANIFEST).read_bytes()
            manifest = Manifest.from_bytes(content)
            theirs = self.manifest(manifest.step)
            if theirs == content:
                return 0
            if theirs is not None:
                self._make_way(manifest, theirs)
            for file, digest in manifest.files.items():
                self._put_file(checkpoint / file, f"{checkpoint.name}/{file}", digest)
        except (FileNotFoundError, ValueError) as error:
            raise Refused(f"{checkpoint} is not sent: {error}") from error
        with self._explained():
            try:
                self._create(f"{checkpoint.name}/{MANIFEST}", content)
            except FileExistsError:
                if self.manifest(manifest.step) != content:
                    raise Refused(
                        f"{self.url}/{checkpoint.name} is another process's: give this run another name"
                    ) from None
        return sum(digest.bytes for digest in manifest.files.values())

    def fetch(self, step: int, root: Path) -> tuple[Manifest | None, list[Damage]]:
        """Bring a checkpoint into the folder `root`: its manifest, and what is wrong with it; then nothing is changed.

        Raises CheckpointError when the store fails on the way, or the disk.
        """
        name = checkpoint_name(step)
        place, content = f"{self.url}/{name}", self.manifest(step)
        manifest, damage = format.parse(place, lambda: content or b"")
        if manifest is None:
            return None, damage
        total = sum(digest.bytes for digest in manifest.files.values())
        staging = format.stage(root, step, manifest.attempt, total)
        try:
            for file, digest in manifest.files.items():
                if format.write(staging / file, self._chunks(f"{name}/{file}")) != digest:
                    damage.append(Damage(place, file, "digest", "does not match its sha256"))
                    break
            else:
                format.write(staging / MANIFEST, [content or b""])
                format.adopt(staging, root / name)
        except Absent:
            damage.append(Damage(place, MANIFEST, "missing", "names a file that is missing"))
        finally:
            format.discard(staging)
        return manifest, damage

    def delete(self, step: int) -> None:
        """Delete a checkpoint or what there is of it, the manifest first."""
        name = checkpoint_name(step)
        with self._explained():
            if self._store.exists(f"{self._root}/{name}/{MANIFEST}"):
                self._remove(f"{name}/{MANIFEST}")
            for path in self._store.find(f"{self._root}/{name}"):
                self._remove(path.removeprefix(f"{self._root}/"))
            if self._is_local and self._store.isdir(f"{self._root}/{name}"):
                self._store.rmdir(f"{self._root}/{name}")

    def _make_way(self, manifest: Manifest, theirs: bytes) -> None:
        """Take back the manifest of an older attempt, or a torn one, before its files are replaced."""
        place = f"{self.url}/{checkpoint_name(manifest.step)}"
        other, _ = format.parse(place, lambda: theirs)
        if other is not None and other.attempt >= manifest.attempt:
            raise Refused(
                f"{place} holds another checkpoint, of attempt {other.attempt}; this one is of attempt "
                f"{manifest.attempt}. Delete it there when it is not wanted, or give this run another name."
            )
        with self._explained():
            self._remove(f"{checkpoint_name(manifest.step)}/{MANIFEST}")

    def _put_file(self, file: Path, name: str, digest: FileDigest) -> None:
        """Send one file and compare its size there; nothing is done when that has been done and it is still there."""
        if (name, digest) in self._sent and self._size(name) == digest.bytes:
            return
        if disk.digest_of(file) != digest:
            raise Refused(f"{file} does not match its sha256, so it is not sent")
        with self._explained():
            self._send(file, name)
        if (found := self._size(name)) != digest.bytes:
            raise CheckpointError(f"{self.url}/{name} has {found} bytes after {digest.bytes} were sent")
        self._sent.add((name, digest))

    def _size(self, name: str) -> int | None:
        """Bytes of a file there; None when there is none."""
        try:
            with self._explained():
                self._store.invalidate_cache()
                return self._store.info(f"{self._root}/{name}")["size"]
        except Absent:
            return None

    def _chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a file, piece by piece. Raises Absent."""
        size = self._size(name)
        if size is None:
            raise Absent(f"{self.url}/{name} is missing")
        for start in range(0, size, CHUNK_BYTES):
            with self._explained():
                chunk = self._store.cat_file(f"{self._root}/{name}", start=start, end=min(start + CHUNK_BYTES, size))
            yield chunk

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        return file_system(self.url)

    @property
    def _store(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]

    @property
    def _is_local(self) -> bool:
        names = self._store.protocol
        return bool(_LOCAL & ({names} if isinstance(names, str) else {*names}))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns whatever a store raises into a CheckpointError that says where and what to do."""
        try:
            yield
        except CheckpointError:
            raise
        except FileNotFoundError as error:
            raise Absent(f"{self.url}: not there: {error}") from error
        except Exception as error:  # each store has errors of its own, many of them no OSError
            raise CheckpointError(f"{self.url}: {said(error)}") from error

    # --- every change in the store is one of these ---

    def _send(self, file: Path, name: str) -> None:
        self._store.put_file(str(file), f"{self._root}/{name}")

    def _create(self, name: str, content: bytes) -> None:
        """Raises FileExistsError when there is one; a store that knows no exclusive creation is asked first."""
        place = f"{self._root}/{name}"
        try:
            self._store.pipe_file(place, content, mode="create")
        except (TypeError, NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.EINVAL):
                raise
            if self._store.exists(place):
                raise FileExistsError(place) from None
            self._store.pipe_file(place, content)

    def _remove(self, name: str) -> None:
        self._store.rm_file(f"{self._root}/{name}")
