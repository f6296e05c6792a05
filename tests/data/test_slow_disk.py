"""A shard on a disk that is really slow: a loop device whose reads the kernel throttles (cgroup v1, blkio)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.pack.writer import Packing, silent, write_split
from tests.data.small_loader import npy

pytestmark = pytest.mark.root

BYTES_PER_SECOND = 400_000
THROTTLES = Path("/sys/fs/cgroup/blkio")

READER = """
import json, sys
from tests.data import small_loader
from pipeline.data.reader import open_dataset
found, gather = [], (lambda samples: {"x": samples.array("npy")}) if sys.argv[2] == "gather" else None
prepare = lambda sample, rng: {"x": sample["npy"]}
with open_dataset(sys.argv[1]) as data:
    with small_loader.loader(data, prepare, micro_batch=2, micro_batches=2, gather=gather, samples=102) as batches:
        for step in range(25):
            batches.step(step)
            found += batches.slow_shards()
print(json.dumps(found))
"""


def ran(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Path, str]]:
    """Where an empty file system of 16 MB is mounted, a cgroup in which it is slow, and its device."""
    if not (THROTTLES / "blkio.throttle.read_bps_device").exists():
        pytest.skip("reads are throttled by cgroup v1 here")
    image, place = tmp_path / "image", tmp_path / "disk"
    image.write_bytes(b"")
    os.truncate(image, 16 * 2**20)
    place.mkdir()
    ran("mkfs.ext4", "-q", str(image))
    with ExitStack() as stack:
        device = ran("losetup", "--find", "--show", str(image))
        stack.callback(ran, "losetup", "--detach", device)
        ran("blockdev", "--setra", "64", device)  # 32 kB: a shard of a megabyte would be read ahead at once
        ran("mount", device, str(place))
        stack.callback(ran, "umount", str(place))
        group = THROTTLES / f"millstream-test-{os.getpid()}"
        group.mkdir()
        stack.callback(group.rmdir)
        number = os.stat(device).st_rdev
        throttle = f"{os.major(number)}:{os.minor(number)} {BYTES_PER_SECOND}"
        (group / "blkio.throttle.read_bps_device").write_text(throttle)
        yield place, group, device


@pytest.mark.parametrize("way", ["gather", "one by one"])
def test_a_shard_on_a_slow_disk_is_named_with_it(tmp_path: Path, disk: tuple[Path, Path, str], way: str) -> None:
    place, group, device = disk
    draw, folder = np.random.default_rng(1), tmp_path / "train"
    samples = ((f"s{i:04d}", {"npy": npy(draw.integers(0, 9, 4000))}) for i in range(102))
    write_split(folder, samples, 102, 1_200_000, Packing(min_shards=3), silent)
    shard = sorted(folder.glob("*.tar"))[1]
    shutil.move(shard, place / shard.name)
    shard.symlink_to(place / shard.name)
    ran("umount", str(place))  # nothing of it stays in memory
    ran("mount", device, str(place))
    command = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", sys.executable, "-c", READER]
    done = subprocess.run([*command, str(folder), way], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    [[named, rate, others, message]] = json.loads(done.stdout)
    assert named == str(shard) and rate * 10 <= others
    assert f"shard {shard} on ext4 at {place} ({device}) is read at" in message
