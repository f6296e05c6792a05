"""A scan that was killed goes on where it was, and never believes what it noted of a tar that has changed since."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.data import index as indexer
from pipeline.data import notes
from pipeline.data.index import build, open_index, segment_path
from pipeline.data.parallel import processes
from pipeline.errors import DataError
from tests.small_tars import samples, write_tar

SLOW = """
import os, sys, time
from pathlib import Path
from pipeline.data import index
for shard in index.scan(Path(sys.argv[1])):
    print(shard.name, flush=True)
    if shard.name == sys.argv[2]:
        time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six shards that are old enough for their times to tell when they change."""
    for number in range(6):
        write_tar(tmp_path / f"{number}.tar", samples(5, 5 * number))
    time.sleep(1.1)  # longer than notes.SETTLED_NS
    return tmp_path


def kill_after(folder: Path, last: str) -> None:
    """Scan in a process of its own, and SIGKILL it when it has written the segment of `last`."""
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(folder), last], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while process.stdout.readline().strip() != last:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def written(folder: Path) -> dict[str, int]:
    """When each segment was put in its place: another inode is another writing."""
    return {path.name: path.stat().st_ino for path in folder.glob("*.tar.idx")}


def test_a_killed_scan_goes_on(folder: Path):
    kill_after(folder, "3.tar")
    assert indexer.unfinished(folder) >= 3 and not (folder / "shards.idx").exists()
    before = written(folder)
    table = [*indexer.scan(folder)]
    assert {name: inode for name, inode in written(folder).items() if name in before and name != "3.tar.idx"} == {
        name: inode for name, inode in before.items() if name != "3.tar.idx"
    }
    assert indexer.commit(folder, table).samples == 30
    assert not (folder / notes.NAME).exists()
    root = (folder / "shards.idx").read_bytes()
    build(folder)
    assert (folder / "shards.idx").read_bytes() == root


def test_what_changed_since_is_scanned_again(folder: Path):
    """Bytes, times, the segment, the note itself: each is noticed."""
    kill_after(folder, "5.tar")
    before = written(folder)
    tar = folder / "0.tar"
    times = tar.stat()
    tar.write_bytes(tar.read_bytes().replace(b"sample 3", b"sample x"))  # the same size, and the times set back
    os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))
    segment = segment_path(folder / "1.tar")
    segment.write_bytes(segment.read_bytes()[:-1] + b"x")
    segment_path(folder / "2.tar").unlink()
    lines = (folder / notes.NAME).read_text().splitlines()
    torn = [line[:-9] if '"3.tar"' in line else line for line in lines if line]
    (folder / notes.NAME).write_text("\n".join(["{}", *torn]) + "\n")
    resumed = indexer.commit(folder, indexer.scan(folder))
    again = {name for name, inode in written(folder).items() if inode != before.get(name)}
    assert {"0.tar.idx", "1.tar.idx", "2.tar.idx", "3.tar.idx"} <= again and "4.tar.idx" not in again
    assert build(folder).identity == resumed.identity


def test_a_young_tar_is_not_believed(tmp_path: Path):
    write_tar(tmp_path / "a.tar", samples(3))
    scanning = indexer.scan(tmp_path)
    next(scanning)
    assert indexer.unfinished(tmp_path) == 0


def test_a_scan_locks_its_folder(folder: Path):
    first = indexer.scan(folder)
    next(first)
    with pytest.raises(DataError, match="is being indexed already"):
        next(indexer.scan(folder))
    first.close()
    assert build(folder).samples == 30


def test_a_bad_tar_stops_the_scan_and_the_rest_is_kept(folder: Path):
    good = (folder / "4.tar").read_bytes()
    (folder / "4.tar").write_bytes(good[:600])
    with pytest.raises(DataError, match=r"4\.tar: .*cut"):
        build(folder, workers=2)
    assert indexer.unfinished(folder) == 4
    (folder / "4.tar").write_bytes(good)
    assert build(folder, workers=2).samples == open_index(folder).samples == 30


def test_workers_end_with_the_one_that_started_them(folder: Path):
    code = (
        "import os, sys, time\nfrom pipeline.data import parallel\nfrom tests.data import test_resume\n"
        "if __name__ == '__main__':\n"
        "    for pid in parallel.processes(2)(test_resume.own_id, range(99)):\n"
        "        print(pid, flush=True)\n        time.sleep(600)\n"
    )
    script = folder / "script.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    assert Path(f"/proc/{worker}").exists()
    process.kill()
    process.communicate()
    while Path(f"/proc/{worker}").exists() and "zombie" not in Path(f"/proc/{worker}/status").read_text():
        time.sleep(0.01)  # the test's own time limit ends this if it stays


def own_id(_: int) -> int:
    return os.getpid()


def test_a_worker_that_is_killed_is_told_of(folder: Path):
    with pytest.raises(DataError, match="ended by the system"):
        list(processes(2)(kill_oneself, range(2)))


def kill_oneself(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
