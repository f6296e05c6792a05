"""A packing that was stopped or killed goes on, and gives the bytes that it would have given."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import parallel
from pipeline.data.pack import source
from pipeline.data.pack.pack import cut, pack, pack_images
from pipeline.data.pack.pieces import end, piece
from pipeline.data.pack.work import work_folder
from pipeline.data.pack.writer import Packing
from pipeline.errors import DataError
from tests.data.pack.test_pack import animals, contents, image_bytes, nothing_else_in

__all__ = ["animals"]  # a fixture

# Units of 64 MB are too much for a test: these are as small as its files are.
PACK = """
import sys
from pathlib import Path
from pipeline.data.pack import source
from pipeline.data.pack.pack import pack
from pipeline.data.pack.writer import Packing
source.UNIT_BYTES = 20_000
packing = Packing(holdout=0.1, shard_bytes=30_000, threads=int(sys.argv[3]))
print(pack(Path(sys.argv[1]), Path(sys.argv[2]), packing, kind="table").samples)
"""


@pytest.mark.slow
def test_a_packing_that_is_killed_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = ({"text": "word " * int(rng.integers(1, 80)), "label": i % 7, "i": i} for i in range(12_000))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def command(out: str, threads: int) -> list[str]:
        return [sys.executable, "-c", PACK, str(tmp_path / "in.jsonl"), str(tmp_path / out), str(threads)]

    subprocess.run(command("whole", 1), check=True, stdout=subprocess.DEVNULL)
    work = tmp_path / ".out.packing"
    units = shards = 0
    for pattern, enough in (("spool/*.json", 10), ("out/train/*.tar", 10)):
        process = subprocess.Popen(command("out", 2), stdout=subprocess.DEVNULL)
        while len(list(work.glob(pattern))) < enough:
            assert process.poll() is None
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        units, shards = (len(list(work.glob(each))) for each in ("spool/*.json", "out/train/*.tar"))
        assert not (tmp_path / "out").exists() and (units if "spool" in pattern else shards) >= enough
        if "spool" in pattern:
            assert shards == 0  # in the middle of the first half
    assert not list(work.glob("out/test/*.tar"))  # in the middle of the second
    done = subprocess.run(command("out", 1), check=True, capture_output=True, text=True)
    assert done.stdout == "{'train': 10800, 'test': 1200}\n"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and len(contents(tmp_path / "out")) > 100
    assert not work.exists()


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """Files of more than 100,000 bytes are refused by the system: units are smaller, shards are not."""
    rng = np.random.default_rng(0)
    lines = ({"text": "word " * int(rng.integers(1, 80)), "i": i} for i in range(600))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    small = PACK.replace("20_000", "8_000").replace("30_000", "300_000")
    arguments = [str(tmp_path / "in.jsonl"), str(tmp_path / "out"), "1"]
    refused = subprocess.run([sys.executable, "-c", limit + small, *arguments], capture_output=True, text=True)
    assert refused.returncode == 1 and "File too large; mend it, and the same command goes on" in refused.stderr
    spool = {path: path.stat().st_mtime_ns for path in (tmp_path / ".out.packing/spool").iterdir()}
    assert len(spool) > 6 and not list(tmp_path.glob(".out.packing/out/*/*"))
    subprocess.run([sys.executable, "-c", small, *arguments], check=True, stdout=subprocess.DEVNULL)
    arguments[1] = str(tmp_path / "whole")
    subprocess.run([sys.executable, "-c", small, *arguments], check=True, stdout=subprocess.DEVNULL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert nothing_else_in(tmp_path, "in.jsonl", "out", "whole")


def test_processes_give_what_threads_give(animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "UNIT_BYTES", 2000)
    pack(animals, tmp_path / "here", Packing(holdout=4, min_shards=3))
    pack(animals, tmp_path / "there", Packing(holdout=4, min_shards=3), mapping=parallel.processes(2))
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


@pytest.mark.parametrize("stage", ["read", "write train", "write test"])
def test_an_interrupted_packing_goes_on(
    animals: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "UNIT_BYTES", 2000)  # several units
    packing = Packing(holdout=0.2, min_shards=3)
    pack_images(animals, tmp_path / "whole", packing)
    last: list[int] = []

    def interrupt(at: str, done: int, total: int) -> None:
        if at == stage and 0 < done < total:
            last.append(done)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_images(animals, tmp_path / "out", packing, progress=interrupt)
    assert nothing_else_in(tmp_path, "animals", "whole", ".out.packing")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / ".out.packing/spool").iterdir()}
    after: dict[Path, int] = {}

    def look(at: str, done: int, total: int) -> None:
        if (at, done) == ("read", total):
            after.update({path: path.stat().st_mtime_ns for path in (tmp_path / ".out.packing/spool").iterdir()})

    packed = pack_images(animals, tmp_path / "out", packing, progress=look)
    assert last and before and before.items() <= after.items() and packed.warnings[:1] != ()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert nothing_else_in(tmp_path, "animals", "whole", "out")


def test_what_is_left_of_another_packing_is_not_used(animals: Path, tmp_path: Path) -> None:
    def interrupt(at: str, done: int, total: int) -> None:
        if at == "write train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_images(animals, tmp_path / "out", Packing(), progress=interrupt)
    (animals / "fox" / "another.png").write_bytes(image_bytes("PNG", 7))
    packed = pack_images(animals, tmp_path / "out", Packing())
    assert packed.samples == {"train": 31} and "of other files or options; it began anew" in packed.warnings[0]
    pack_images(animals, tmp_path / "whole", Packing())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_kill_at_the_very_end_leaves_nothing_for_long(animals: Path, tmp_path: Path) -> None:
    pack_images(animals, tmp_path / "out", Packing())
    (tmp_path / ".out.packing" / "spool").mkdir(parents=True)
    with pytest.raises(DataError, match="exists already"):
        pack_images(animals, tmp_path / "out", Packing())
    assert nothing_else_in(tmp_path, "animals", "out")


def test_two_packings_into_one_place_do_not_mix(animals: Path, tmp_path: Path) -> None:
    with work_folder(tmp_path / "out", {}), pytest.raises(DataError, match="is being written already"):
        pack_images(animals, tmp_path / "out", Packing())


def test_pieces_are_what_tarfile_writes(tmp_path: Path) -> None:
    names = ["a.txt", "deep/" * 25 + "b.txt", "ä.json", "x" * 96 + ".cls"]
    made = b"".join(piece(name.rpartition(".")[0], {name.rpartition(".")[2]: b"x" * len(name)}) for name in names)
    with tarfile.open(tmp_path / "theirs.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(b"x" * len(name)))
    assert made + end(len(made)) == (tmp_path / "theirs.tar").read_bytes()
    with pytest.raises(DataError, match="give a shorter key"):
        piece("y" * 120, {"txt": b""})


def test_shards_are_cut_by_number_or_by_bytes() -> None:
    assert cut(np.full(10, 5), 3) == [0, 3, 6, 10]
    sizes = np.array([1000] * 10 + [1] * 90)
    edges = cut(sizes, 4)
    assert edges[0] == 0 and edges[-1] == 100 and all(np.diff(edges) > 0)
    bytes_ = np.add.reduceat(sizes, edges[:-1])
    assert bytes_.max() < sizes[:25].sum()  # the largest of equal numbers
    assert cut(np.array([10**9, 1, 1, 1]), 4) == [0, 1, 2, 3, 4]
