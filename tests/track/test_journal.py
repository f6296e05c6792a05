"""The journal under kills, torn and damaged lines, many threads, rewinds and a full disk."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import RunError
from pipeline.track.journal import Journal, Record, curve, follow, lineage, read
from pipeline.track.summary import summary


def step(number: int, loss: float, **metrics: float) -> Record:
    return {"kind": "step", "step": number, "metrics": {"train/loss": loss, **metrics}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "journal.jsonl"


def test_records_come_back_and_are_plain_json(path: Path) -> None:
    journal = Journal(path, 3)
    assert journal.write({"kind": "start", "note": 'ü "quoted" \n line'}) == 1
    assert journal.write_many([step(0, 2.5), step(1, math.nan, rate=math.inf), {"kind": "save", "p": path}]) == 4
    journal.write({"kind": "x", "i": np.int64(3), "f": np.float32(0.5), "a": np.arange(2), "n": np.float64("nan")})
    journal.sync()
    assert journal.position == {"attempt": 3, "seq": 5}
    journal.close()
    journal.close()
    records, problems = read(path)
    assert problems == [] and [record["seq"] for record in records] == [1, 2, 3, 4, 5]
    assert {record["attempt"] for record in records} == {3} and records[0]["note"] == 'ü "quoted" \n line'
    assert records[2]["metrics"] == {"train/loss": None, "rate": None} and records[3]["p"] == str(path)
    assert {key: records[4][key] for key in "ifan"} == {"i": 3, "f": 0.5, "a": [0, 1], "n": None}

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    for line, record in zip(path.read_text().splitlines(), records):
        plain = json.loads(line, parse_constant=refuse)
        assert len(plain.pop("crc")) == 8 and plain == record and list(plain)[:4] == ["v", "attempt", "seq", "time"]


def test_torn_tail_is_cut_named_and_numbering_goes_on(path: Path) -> None:
    journal = Journal(path, 1)
    journal.write_many(step(k, k) for k in range(3))
    journal.close()
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for length in range(last, len(whole) + 1):  # cut at every byte of the last line
        path.write_bytes(whole[:length])
        torn = length - last if length < len(whole) else 0
        assert read(path).problems == [] and len(read(path).records) == (2 if length < len(whole) else 3)
        journal = Journal(path, 2)
        assert journal.torn_bytes == torn
        journal.write(step(2, 2))
        journal.close()
        records, problems = read(path)
        assert problems == [] and [record["seq"] for record in records] == list(range(1, len(records) + 1))
        warnings = [record["message"] for record in records if record["kind"] == "warning"]
        assert warnings == (
            [f"cut a torn line of {torn} bytes from the end of journal.jsonl, left by a kill"] if torn else []
        )


def test_every_damaged_line_is_named_and_no_other_is_lost(path: Path) -> None:
    journal = Journal(path, 1)
    journal.write_many(step(k, k / 7) for k in range(20))
    journal.close()
    whole = path.read_bytes()
    lines = whole.split(b"\n")
    rng = random.Random(0)
    for _ in range(300):
        number = rng.randrange(20)
        bit = rng.randrange(len(lines[number]) * 8)
        damaged = bytearray(whole)
        damaged[sum(len(line) + 1 for line in lines[:number]) + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        records, problems = read(path)
        assert [record["step"] for record in records] == [k for k in range(20) if k != number]
        assert problems and problems[0].startswith(f"{path}:{number + 1}: damaged line")


def test_numbering_goes_on_behind_long_and_damaged_lines(path: Path) -> None:
    journal = Journal(path, 1)
    journal.write_many([step(0, 1), {"kind": "error", "traceback": "x" * 300_000}, step(1, 1)])
    journal.close()
    with path.open("ab") as file:
        file.write(b"\0" * 200_000 + b"\n" + b"torn")
    journal = Journal(path, 2)
    assert journal.torn_bytes == 4 and journal.position["seq"] == 4
    journal.close()
    records, problems = read(path)
    assert [record["seq"] for record in records] == [1, 2, 3, 4] and problems == [
        f"{path}:4: damaged line of 200000 bytes passed over"
    ]


def test_threads_share_a_journal(path: Path) -> None:
    journal = Journal(path, 1)

    def write(thread: int) -> None:
        for number in range(50):
            journal.write_many([{"kind": "x", "thread": thread, "number": number, "part": part} for part in range(3)])

    threads = [threading.Thread(target=write, args=(thread,)) for thread in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    records, problems = read(path)
    assert problems == [] and [record["seq"] for record in records] == list(range(1, 901))
    for thread in range(6):  # batches stay together, and each thread's own order holds
        mine = [record for record in records if record["thread"] == thread]
        assert [(r["number"], r["part"]) for r in mine] == [(number, part) for number in range(50) for part in range(3)]
        assert all(b["seq"] - a["seq"] == 1 for a, b in pairwise(mine) if a["number"] == b["number"])


def test_kill_loses_no_written_line(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.track.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]), 1); n = 0\n"
        "while True: n += 1; journal.write({'kind': 'x', 'n': n}); print(n, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(500):
        said = int(process.stdout.readline())
    process.kill()
    said = int((process.stdout.read().split() or [said])[-1])
    process.stdout.close()
    process.wait()
    numbers = [record["n"] for record in read(path).records]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= said


def test_follow_sees_a_growing_file_across_attempts(path: Path) -> None:
    stop, seen = threading.Event(), []
    reader = threading.Thread(target=lambda: seen.extend(record["seq"] for record in follow(path, stop)))
    reader.start()  # before there is a file
    journal = Journal(path, 1)
    for k in range(10):
        journal.write(step(k, k))
        time.sleep(0.02)
    journal.close()
    with path.open("ab") as file:
        file.write(b'{"v":1,"half a li')
    time.sleep(0.15)
    journal = Journal(path, 2)
    journal.write_many(step(k, k) for k in range(10, 20))
    journal.close()
    stop.set()
    reader.join()
    assert seen == list(range(1, 22))


def test_disk_full_takes_the_batch_back(path: Path) -> None:
    journal = Journal(path, 1)
    journal.write(step(0, 1))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))  # write(2) really takes 100 bytes, then fails
    try:
        with pytest.raises(RunError, match=f"{path}: File too large.*run the same command again"):
            journal.write_many(step(k, 1) for k in range(1, 5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before
    assert journal.write(step(1, 1)) == 2
    journal.close()
    assert [record["seq"] for record in read(path).records] == [1, 2]


def test_journal_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=f"{tmp_path}/file/journal.jsonl"):
        Journal(tmp_path / "file" / "journal.jsonl", 1)
    assert read(tmp_path / "absent") == ([], [])


# --- what is read out of the records ---


def attempts(*parts: tuple[int, int, list[Record]]) -> list[Record]:
    """Records of attempts (number, step it began at, its records) as read gives them, a second apart."""
    records: list[Record] = []
    for attempt, began, content in parts:
        kind = "restore" if began else "start"
        for record in [{"kind": "attempt"}, {"kind": kind, "step": began}, *content]:
            records.append(
                {"attempt": attempt, "seq": len(records) + 1, "time": 1000.0 * attempt + len(records)} | record
            )
    return records


def evaluation(done: int, accuracy: float) -> Record:
    return {
        "kind": "evaluation",
        "step": done,
        "metrics": {"eval/test/accuracy": accuracy, "eval/test/loss": 1 - accuracy},
    }


def test_rewinds_leave_one_value_a_step(path: Path) -> None:
    records = attempts(
        (1, 0, [*(step(k, 100 + k) for k in range(8)), evaluation(4, 0.4), evaluation(8, 0.8)]),
        (2, 4, [step(k, 200 + k) for k in range(4, 6)]),  # killed before it had come as far as the first
        (3, 5, [step(k, 300 + k) for k in range(5, 9)]),
    )
    assert curve(records, "train/loss") == (list(range(9)), [100, 101, 102, 103, 204, 305, 306, 307, 308])
    assert curve(records[:-6], "train/loss")[0] == [0, 1, 2, 3, 4, 5]  # steps 6 and 7 of attempt 1 are gone at once
    assert curve(records, "eval/test/accuracy") == ([4], [0.4])
    assert curve(records, "absent") == ([], [])
    fresh = attempts((1, 0, [step(k, k) for k in range(5)]), (2, 0, [step(0, 9)]))
    assert curve(fresh, "train/loss") == ([0], [9])  # nothing had been saved: began again
    back = [*attempts((1, 0, [step(k, k) for k in range(9)])), {"attempt": 1, "kind": "rollback", "step": 5, "last": 9}]
    assert curve(back, "train/loss")[0] == [0, 1, 2, 3, 4]  # before the next attempt has begun
    late = [*records, {"attempt": 1, "seq": 99, "time": 0, **step(50, 1)}]
    assert lineage(late) == lineage(records)  # a record of an attempt that others have gone past


def test_curve_gives_nan_for_what_was_not_finite(path: Path) -> None:
    journal = Journal(path, 1)
    journal.write_many([{"kind": "start", "step": 0}, step(0, 1.0), step(1, math.inf)])
    journal.close()
    steps, values = curve(read(path).records, "train/loss")
    assert steps == [0, 1] and values[0] == 1.0 and math.isnan(values[1])


def test_summary_of_two_attempts() -> None:
    timing = {"time/step_seconds": 0.5, "data/wait_seconds": 0.1}
    first = [step(k, 1, **timing, **{"throughput/samples_per_second": 10 + k}) for k in range(4)]
    second = [step(k, 1, **timing, **{"throughput/samples_per_second": 20 + k}) for k in range(2, 6)]
    records = attempts(
        (1, 0, [*first, evaluation(2, 0.9)]),
        (2, 2, [*second, evaluation(4, 0.7), evaluation(6, 0.8), {"kind": "end", "reason": "done", "step": 6}]),
    )
    facts = summary(records)
    assert (facts["last_step"], facts["attempts"], facts["restarts"]) == (6, 2, 1)
    assert [(name, last, best, at) for name, last, best, at in facts["evaluations"]] == [
        ("test/accuracy", 0.8, 0.9, 2),
        ("test/loss", pytest.approx(0.2), pytest.approx(0.1), 2),
    ]
    assert summary(records, best="test/accuracy", mode="min")["evaluations"][0][2:] == (0.7, 4)
    assert facts["samples_per_second"] == 22.5 and facts["data_wait_share"] == pytest.approx(0.2)
    assert facts["wall_seconds"] == 6 + 8
    assert summary([])["last_step"] == 0 and summary([])["samples_per_second"] is None


def test_journal_needs_no_torch(path: Path) -> None:
    code = "import sys, pipeline.track.journal; assert not {'torch', 'wandb', 'ray', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
