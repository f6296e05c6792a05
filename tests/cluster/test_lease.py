"""One writer per run folder, with real processes: started together, killed, stopped, out of sight."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.cluster import lease
from pipeline.errors import RunError

OWNER = (
    "import sys, time; from pathlib import Path; from pipeline.cluster import lease\n"
    "taken = lease.take(Path(sys.argv[1]), beat_seconds=0.05); print('taken', flush=True); time.sleep(600)\n"
)


@contextmanager
def owner(folder: Path) -> Iterator[subprocess.Popen]:
    """A process that holds the lease of `folder`."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "taken\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def elsewhere(folder: Path) -> dict:
    """Rewrites the lease as if its owner were on another host."""
    content = json.loads((folder / "lease.json").read_text()) | {"host": "far-away", "boot": "another"}
    (folder / "lease.json").write_text(json.dumps(content))
    return content


def test_second_taker_is_told_who_owns_the_run(tmp_path: Path) -> None:
    with owner(tmp_path) as process:
        lease.new_attempt(tmp_path)
        before = (tmp_path / "lease.json").read_text()
        with pytest.raises(RunError, match=rf"process {process.pid} on host {os.uname().nodename}, attempt 1\."):
            lease.take(tmp_path)
        assert json.loads((tmp_path / "lease.json").read_text())["token"] == json.loads(before)["token"]
    mine = lease.take(tmp_path)
    with pytest.raises(RunError, match=f"process {os.getpid()} "):
        lease.take(tmp_path)  # not even the same process
    mine.release()


def test_release_gives_the_run_free(tmp_path: Path) -> None:
    with lease.take(tmp_path / "new" / "run") as first:
        assert not first.lost
    first.release()
    assert first.lost and not (tmp_path / "new" / "run" / "lease.json").exists()
    lease.take(tmp_path / "new" / "run").release()
    assert os.listdir(tmp_path / "new" / "run") == [".lease.lock"]
    assert not [thread for thread in threading.enumerate() if thread.name == "lease"]


@pytest.mark.parametrize("reaped", [True, False])
def test_dead_owner_is_replaced_at_once(tmp_path: Path, reaped: bool) -> None:
    with owner(tmp_path) as process:
        process.kill()
        if reaped:
            process.wait()
        else:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie: still in the table, but gone
        waits: list[str] = []
        lease.take(tmp_path, say=waits.append).release()
        assert waits == []


def test_reused_process_number_is_not_taken_for_the_owner(tmp_path: Path) -> None:
    with owner(tmp_path) as process:
        content = json.loads((tmp_path / "lease.json").read_text())
        process.kill()
    (tmp_path / "lease.json").write_text(json.dumps(content | {"pid": os.getpid()}))  # lives, but began at another time
    lease.take(tmp_path).release()


def test_stopped_owner_here_is_not_dead(tmp_path: Path) -> None:
    with owner(tmp_path) as process:
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(RunError, match=f"process {process.pid} "):
            lease.take(tmp_path, silence_seconds=0.3)


def test_silent_owner_out_of_sight_is_replaced_after_the_wait(tmp_path: Path) -> None:
    first = lease.take(tmp_path)
    elsewhere(tmp_path)
    waits: list[str] = []
    began = time.monotonic()
    second = lease.take(tmp_path, say=waits.append, silence_seconds=0.5)
    assert time.monotonic() - began >= 0.5 and len(waits) == 1 and "on host far-away" in waits[0]
    assert first.lost and not second.lost
    first.release()  # the latecomer leaves the new owner's lease alone
    assert not second.lost
    second.release()


def test_beating_owner_out_of_sight_keeps_the_run(tmp_path: Path) -> None:
    with owner(tmp_path) as process:
        path = tmp_path / "lease.json"
        stop = threading.Event()

        def beat() -> None:
            for number in range(10_000):
                if stop.wait(0.05):
                    return
                content = json.loads(path.read_text().splitlines()[0])
                draft = tmp_path / "draft"
                draft.write_text(json.dumps(content | {"host": "far-away", "boot": "another", "beat": str(number)}))
                draft.replace(path)

        process.kill()
        elsewhere(tmp_path)
        thread = threading.Thread(target=beat)
        thread.start()
        try:
            with pytest.raises(RunError, match=f"process {process.pid} on host far-away"):
                lease.take(tmp_path, silence_seconds=5)
        finally:
            stop.set()
            thread.join()


def test_heartbeat_moves_in_place_and_leaves_a_new_owner_alone(tmp_path: Path) -> None:
    first = lease.take(tmp_path, beat_seconds=0.02)
    path = tmp_path / "lease.json"
    beats = {json.loads(path.read_text())["beat"]}
    while len(beats) < 4:
        time.sleep(0.01)
        beats.add(json.loads(path.read_text())["beat"])
    (tmp_path / "other").write_text(json.dumps({"token": "other", "host": "far-away", "pid": 1}))
    (tmp_path / "other").replace(path)
    time.sleep(0.1)
    assert first.lost and json.loads(path.read_text())["token"] == "other"
    first.release()
    assert path.exists()


def test_damaged_lease_is_waited_for_and_replaced(tmp_path: Path) -> None:
    for content in (b"", b"{half", b"[]", b"\xff\xfe"):
        (tmp_path / "lease.json").write_bytes(content)
        waits: list[str] = []
        lease.take(tmp_path, say=waits.append, silence_seconds=0.1).release()
        assert len(waits) == 1


def compete(folder: Path, rounds: int, number: int, barrier, wins) -> None:
    """In each round all take at the same moment; the winner holds on until all have tried."""
    for round_ in range(rounds):
        barrier.wait()
        try:
            mine = lease.take(folder / str(round_))
        except RunError:
            mine = None
        attempt = lease.new_attempt(folder / "attempts-of-all")
        wins.put((round_, number, mine is not None, attempt))
        barrier.wait()
        if mine is not None:
            assert not mine.lost
            mine.release()


def test_exactly_one_wins_when_all_start_together(tmp_path: Path) -> None:
    rounds, takers = 60, 4
    with owner(tmp_path / "dead") as process:
        process.kill()
        process.wait()
    for round_ in range(0, rounds, 2):  # every other round begins with the lease of a dead owner
        (tmp_path / str(round_)).mkdir()
        (tmp_path / str(round_) / "lease.json").write_bytes((tmp_path / "dead" / "lease.json").read_bytes())
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(takers), context.Queue()
    processes = [
        context.Process(target=compete, args=(tmp_path, rounds, number, barrier, results)) for number in range(takers)
    ]
    for competitor in processes:
        competitor.start()
    outcomes = [results.get(timeout=60) for _ in range(rounds * takers)]
    for competitor in processes:
        competitor.join(timeout=60)
        assert competitor.exitcode == 0
    for round_ in range(rounds):
        assert sum(won for at, _, won, _ in outcomes if at == round_) == 1, f"round {round_}"
    assert sorted(attempt for *_, attempt in outcomes) == list(range(1, rounds * takers + 1))
    assert lease.newest_attempt(tmp_path / "attempts-of-all") == rounds * takers


def test_attempts_are_numbered_from_one(tmp_path: Path) -> None:
    assert lease.newest_attempt(tmp_path) == 0
    assert [lease.new_attempt(tmp_path) for _ in range(3)] == [1, 2, 3] and lease.newest_attempt(tmp_path) == 3
    (tmp_path / "attempts" / "12345.json").touch()  # torn by a kill: its number is taken all the same
    assert lease.new_attempt(tmp_path) == 12346
    assert json.loads((tmp_path / "attempts" / "0003.json").read_text())["pid"] == os.getpid()
