"""The commit protocol under flipped bits, truncation, full disks and late writers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest

from pipeline.checkpoint import disk, format
from pipeline.checkpoint.format import FileDigest, Manifest
from pipeline.errors import CheckpointError
from tests.checkpoint.power import no_waiting
from tests.checkpoint.small_checkpoint import found_step, save

__all__ = ["no_waiting"]  # a fixture


def everything(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# --- the values ---


def test_manifest_survives_the_way_to_disk_and_back(tmp_path: Path) -> None:
    path = save(tmp_path, 40, attempt=3)
    found = format.find(tmp_path)
    assert found is not None and (found.step, found.path, found.bad) == (40, path, [])
    manifest = found.manifest
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert manifest.parameters == {"weight": (3, 5), "bias": (3,)} and manifest.fragments[1].key == "master"
    assert list(manifest.parameters) == ["weight", "bias"] and manifest.attempt == 3
    written = json.loads((path / format.MANIFEST).read_text())  # plain JSON for anybody else
    assert written["manifest"]["config"]["optim"]["betas"] == [0.9, 0.999]


def test_write_and_seal_tell_the_same_digest(tmp_path: Path) -> None:
    written = format.write(tmp_path / "file", [b"abc", bytearray(b"def"), memoryview(bytes(9)).cast("B", (3, 3))])
    assert written == format.seal(tmp_path / "file") and written.bytes == 15
    assert (
        format.write(tmp_path / "empty", [])
        == format.seal(tmp_path / "empty")
        == FileDigest(0, hashlib.sha256().hexdigest())
    )


def test_no_checkpoint_is_none_and_other_folders_are_left_alone(tmp_path: Path) -> None:
    assert format.find(tmp_path / "absent") is None and format.list_checkpoints(tmp_path / "absent") == []
    for name in ("checkpoint-40", "checkpoint-00000040.bak", "notes", ".staging-00000010-a9"):
        (tmp_path / name).mkdir()
    assert format.find(tmp_path) is None
    save(tmp_path, 20, attempt=2)
    assert (tmp_path / "notes").is_dir() and (tmp_path / ".staging-00000010-a9").is_dir()  # a newer attempt's


def test_newer_format_is_refused_not_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 10)
    path = save(tmp_path, 20)
    manifest = Manifest.from_bytes((path / format.MANIFEST).read_bytes())
    (path / format.MANIFEST).write_bytes(dataclasses.replace(manifest, version=2).to_bytes())
    with pytest.raises(CheckpointError, match="newer Millstream"):
        format.find(tmp_path)
    assert [damage.kind for damage in format.verify(path)] == ["version"]


# --- damage ---


KINDS = ["rank-00001.safetensors", format.MANIFEST]


@pytest.mark.parametrize("name", KINDS)
def test_every_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    """200 in each kind of file; the one before is loaded, and what is damaged is named."""
    previous, path = save(tmp_path, 10), save(tmp_path, 20)
    original, rng = (path / name).read_bytes(), random.Random(name)
    for bit in rng.sample(range(len(original) * 8), 200):
        flipped = bytearray(original)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(flipped)
        found = format.find(tmp_path)
        assert found is not None and found.path == previous, f"bit {bit} of {name} was not noticed"
        assert [(damage.path, damage.file) for damage in found.bad] == [(path, name)]
    (path / name).write_bytes(original)
    assert found_step(tmp_path) == 20


@pytest.mark.parametrize("name", KINDS)
def test_every_truncation_and_every_missing_file_is_found(tmp_path: Path, name: str) -> None:
    """Cut after each byte; gone; and longer by one byte."""
    save(tmp_path, 10)
    path = save(tmp_path, 20)
    original = (path / name).read_bytes()
    for length in range(len(original)):
        (path / name).write_bytes(original[:length])
        assert [damage.file for damage in format.verify(path)] == [name], f"{name} cut to {length} bytes"
    assert found_step(tmp_path) == 10
    (path / name).unlink()
    assert found_step(tmp_path) == 10 and format.verify(path)[0].kind == "missing"
    (path / name).write_bytes(original + b"\0")
    assert found_step(tmp_path) == 10, f"a byte after the end of {name} was not noticed"


def test_a_thousand_clean_loads_raise_no_alarm(tmp_path: Path, no_waiting: None) -> None:
    """100 checkpoints of many sizes, each found ten times as the newest."""
    rng = random.Random(0)
    for step in range(100):
        save(tmp_path, step, attempt=1 + step // 25, size=rng.randrange(701, 40_000))
        for _ in range(10):
            found = format.find(tmp_path)
            assert found is not None and (found.step, found.bad) == (step, [])
    assert all(not listed.damage and listed.manifest for listed in format.list_checkpoints(tmp_path))


def test_damage_everywhere_is_an_error_and_never_a_fresh_start(tmp_path: Path) -> None:
    for step in (10, 20):
        (save(tmp_path, step) / "rank-00001.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        format.find(tmp_path)
    for word in ("checkpoint-00000010", "checkpoint-00000020", "rank-00001.safetensors has 0 bytes", "--fresh"):
        assert word in str(error.value)


def test_swapped_and_renamed_folders_are_found(tmp_path: Path) -> None:
    first, second = save(tmp_path, 10), save(tmp_path, 20)
    shutil.copy(first / "rank-00000.safetensors", second / "rank-00000.safetensors")  # right size, another step's
    assert found_step(tmp_path) == 10
    shutil.rmtree(second)
    first.rename(tmp_path / "checkpoint-00000030")
    assert "renamed" in format.verify(tmp_path / "checkpoint-00000030")[0].detail


def test_manifest_may_not_name_files_elsewhere(tmp_path: Path) -> None:
    path = save(tmp_path / "root", 10)
    secret = format.write(tmp_path / "secret", [b"x"])
    manifest = Manifest.from_bytes((path / format.MANIFEST).read_bytes())
    (path / format.MANIFEST).write_bytes(dataclasses.replace(manifest, files={"../../secret": secret}).to_bytes())
    assert [damage.kind for damage in format.verify(path)] == ["manifest"]


# --- fencing ---


def test_superseded_attempt_cannot_commit(tmp_path: Path) -> None:
    save(tmp_path, 20, attempt=2)
    before = everything(tmp_path)
    with pytest.raises(CheckpointError, match="superseded by attempt 2"):
        save(tmp_path, 30, attempt=1, newest_attempt=2)
    with pytest.raises(CheckpointError, match="superseded by attempt 2"):
        save(tmp_path, 20, attempt=1)  # it has not heard of attempt 2, but the checkpoint tells
    assert everything(tmp_path) == before and found_step(tmp_path) == 20


def test_an_attempt_that_begins_while_the_disk_is_waited_for_counts(tmp_path: Path) -> None:
    staging = format.stage(tmp_path, 10, 1)
    digest = format.write(staging / "a", [bytes(100)])
    written: list[bool] = []

    def newest() -> int:
        written.append((staging / format.MANIFEST).exists())
        return 2

    with pytest.raises(CheckpointError, match="superseded by attempt 2"):
        format.commit(tmp_path, staging, Manifest(10, 1, 1, 0, "fp32", {}, (), {"a": digest}), newest_attempt=newest)
    assert written == [True] and os.listdir(tmp_path) == []


def test_same_step_is_replaced_by_a_newer_attempt(tmp_path: Path) -> None:
    save(tmp_path, 20, attempt=1)
    save(tmp_path, 20, attempt=2)
    found = format.find(tmp_path)
    assert found is not None and found.manifest.attempt == 2
    assert os.listdir(tmp_path) == ["checkpoint-00000020"]


def test_commit_refuses_what_is_not_there(tmp_path: Path) -> None:
    for harm in (lambda file: file.unlink(), lambda file: file.write_bytes(b"short")):
        staging = format.stage(tmp_path, 10, 1)
        digest = format.write(staging / "a", [bytes(100)])
        harm(staging / "a")
        manifest = Manifest(10, 1, 1, 0, "fp32", {}, (), {"a": digest})
        with pytest.raises(CheckpointError, match=r"step 10 not committed.*/a "):
            format.commit(tmp_path, staging, manifest, newest_attempt=lambda: 1)
        assert os.listdir(tmp_path) == []


# --- disks ---


def test_disk_without_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"disk full \(1,000,000,000,000.0 MB needed, [\d,.]+ MB free\)"):
        format.stage(tmp_path / "root", 10, 1, bytes_needed=10**18)
    assert os.listdir(tmp_path / "root") == []


def test_disk_full_while_writing_leaves_no_partial(tmp_path: Path) -> None:
    save(tmp_path, 10)
    staging = format.stage(tmp_path, 20, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # a real failing write(2) without needing a full disk
    try:
        with pytest.raises(CheckpointError, match=f"{staging}/big: File too large"):
            format.write(staging / "big", [bytes(100_000)] * 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert os.listdir(staging) == [] and found_step(tmp_path) == 10
    with (
        pytest.raises(CheckpointError, match=r"disk full \("),
        disk.explained(tmp_path),
        open("/dev/full", "wb", 0) as full,
    ):
        full.write(b"x")


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=f"checkpoint not written: {tmp_path}/file/root"):
        format.stage(tmp_path / "file" / "root", 10, 1)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if not os.access(closed, os.W_OK):  # root may write everywhere
        with pytest.raises(CheckpointError, match=f"{closed}/.*not writable"):
            format.stage(closed / "checkpoints", 10, 1)
