"""`millstream data index`, `verify` and `stats` as a person runs them: Ctrl-C, a kill, damage, numbers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.data import notes
from pipeline.data.index import build, open_index, unfinished
from tests.small_tars import samples, write_tar

DATA = [sys.executable, "-m", "pipeline", "data"]
SHARDS = 300
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def data(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DATA, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards enough for a scan to be stopped in its middle; not to be changed."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(SHARDS):
        write_tar(folder / f"{number:03d}.tar", samples(20, 20 * number))
    return folder


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_index_goes_on(many: Path, tmp_path: Path, stop: signal.Signals):
    folder = tmp_path / "shards"
    shutil.copytree(many, folder)
    time.sleep(1.1)  # longer than notes.SETTLED_NS
    command = [*DATA, "index", str(folder), "--workers", "2"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while unfinished(folder) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    if stop is signal.SIGINT:
        os.killpg(process.pid, stop)  # as a terminal does
    else:
        process.send_signal(stop)
    _, err = process.communicate()
    done = unfinished(folder)
    assert 5 <= done < SHARDS and not (folder / "shards.idx").exists()
    if stop is signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in err
        assert f"of {SHARDS} shards are scanned, and the same command goes on from there: millstream data index" in err
    resumed = data("index", folder, "--workers", "1")
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on: {done} of {SHARDS} shards were scanned before" in resumed.stdout
    assert f"indexed {SHARDS} shards: {20 * SHARDS:,} samples" in resumed.stdout
    identity = open_index(folder).identity
    assert build(folder).identity == identity
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_verify_names_shard_member_and_kind(tmp_path: Path):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", samples(8))
    build(tmp_path)
    good = data("verify", tmp_path, "--workers", "1")
    assert good.returncode == 0 and good.stdout == "all good: 2 shards, 16 samples, nothing differs from the index\n"
    tar = bytearray((tmp_path / "b.tar").read_bytes())
    tar[tar.index(b"sample 3")] ^= 1
    (tmp_path / "b.tar").write_bytes(tar)
    (tmp_path / "a.tar").unlink()
    bad = data("verify", tmp_path, "--workers", "2")
    lines = bad.stdout.splitlines()
    assert bad.returncode == 1 and lines[0].split() == ["shard", "member", "kind", "damage"]
    assert [line.split()[:3] for line in lines if line.startswith(("a.tar", "b.tar"))] == [
        ["a.tar", "-", "missing"],
        ["b.tar", "00003.txt", "digest"],
    ]
    assert lines[-1].startswith("2 damaged")


def test_stats_are_printed_and_given_as_json(tmp_path: Path):
    write_tar(tmp_path / "a.tar", samples(20))
    build(tmp_path)
    shown = data("stats", tmp_path)
    assert shown.returncode == 0 and shown.stderr == ""
    for title in ("shards", "fields", "classes (cls)", "contents of txt"):
        assert title in shown.stdout.splitlines()
    found = json.loads(data("stats", tmp_path, "--json", "--sample", "5").stdout)
    assert found["samples"] == 20 and found["classes"]["cls"] == {str(label): 2 for label in range(10)}
    assert found["contents"][0]["looked"] == 5


def test_an_index_that_is_being_made_elsewhere_is_left_alone(tmp_path: Path):
    write_tar(tmp_path / "a.tar", samples(3))
    with notes.writing(tmp_path):
        refused = data("index", tmp_path, "--workers", "1")
    assert refused.returncode == 1 and "is being indexed already" in refused.stderr
    assert data("index", tmp_path).returncode == 0


def test_what_is_said_can_be_pasted_and_shown_in_any_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "zwei Bücher"
    folder.mkdir()
    write_tar(folder / "a.tar", samples(20))
    made = data("index", folder, "--workers", "1").stdout
    assert f"preview '{folder}'`" in made and made.endswith(f"data.train='{folder}'\n")
    monkeypatch.setitem(ENVIRONMENT, "PYTHONIOENCODING", "ascii")
    shown = data("stats", folder)
    assert shown.returncode == 0 and "zwei B?cher" in shown.stdout
    gone = data("stats", tmp_path / "ä")
    assert gone.returncode == 1 and "/\\xe4: no such folder" in gone.stderr
