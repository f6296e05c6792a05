"""The W&B sink with the real wandb, offline: kills and rewinds leave each step once; nothing it meets stops a run."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.sections import Track
from pipeline.track.journal import Journal, Record
from pipeline.track.wandb import Wandb, segments, sink
from pipeline.track.wandb.account import mode
from tests.track import attempts
from tests.track.attempts import attempt


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Without anybody's W&B account, with a home of its own; for this process and for those that it starts."""
    mine = attempts.environment(tmp_path / "home")
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", mine["HOME"])
    return mine


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def steps_in(path: Path) -> list[int]:
    return [json.loads(row["_step"]) for row in segments.rows_in(path)]


def entries(path: Path) -> Iterator[Any]:
    """Files of the artifacts that tables are in, as W&B's own file names them."""
    for _, record in segments._records(path):
        if record.WhichOneof("record_type") == "artifact" and record.artifact.type == "run_table":
            yield from record.artifact.manifest.contents


def test_each_step_once_through_kills_and_rewinds(tmp_path: Path, environment: dict[str, str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    attempt(folder, environment, 1, 0, 35, "killed")  # at once: W&B's file has next to nothing
    attempt(folder, environment, 2, 20, 50, "flushed")  # goes on from 20; 0 to 19 come from the journal
    torn = files(folder)[-1]
    held, whole = steps_in(torn), torn.read_bytes()
    assert held[-1] >= 40 and held[0] == 0
    torn.write_bytes(whole[:-10])
    said = attempt(folder, environment, 3, 30, 60, "done")  # rewinds: 30 to 48 are there already
    assert whole.startswith(torn.read_bytes()) and len(torn.read_bytes()) < len(whole) - 10  # `wandb sync` can read on
    assert len(held) - 1 <= len(steps_in(torn)) <= len(held)
    assert said == "offline; `millstream track sync .` sends it\n"

    found = files(folder)
    identity = json.loads((folder / "run.json").read_text())["wandb_id"]
    assert {path.name for path in found} == {f"run-{identity}.wandb"} and 2 <= len(found) <= 3
    rows = [row for path in found for row in segments.rows_in(path)]
    steps = [json.loads(row["_step"]) for row in rows]
    assert steps == list(range(61))  # 60: the evaluation after the last step
    assert [json.loads(row["train/step"]) for row in rows] == steps
    losses = [json.loads(row["train/loss"]) for row in rows[:60]]
    assert all(math.floor(loss) == step for step, loss in enumerate(losses))
    assert round(losses[-1] % 1, 1) == 0.3 and round(losses[25] % 1, 1) == 0.2
    scored = {
        step: json.loads(row["eval/test/accuracy"]) for step, row in zip(steps, rows) if "eval/test/accuracy" in row
    }
    assert scored == {10: 0.1, 20: 0.2, 30: 0.3, 40: 0.4, 50: 0.5, 60: 0.6}
    assert math.isnan(float(json.loads(rows[3]["optim/lr"])))
    told = [step for step, row in zip(steps, rows) if "system/n1_lab/cpu" in row]
    assert told == [5, 15, 25, 35, 45, 55] and json.loads(rows[45]["system/n1_lab/cpu"]) == 0.45
    tables = {step: row for step, row in zip(steps, rows) if row.get("samples/test/_type") == '"table-file"'}
    assert list(tables) == [20, 40, 60] and json.loads(tables[60]["samples/test/nrows"]) == 2
    copies = [entry.local_path for file in found for entry in entries(file)]
    assert copies and all(Path(copy).is_relative_to(folder) and Path(copy).is_file() for copy in copies)


def test_that_a_run_went_back_is_an_alert_and_its_curve_goes_on(tmp_path: Path, environment: dict[str, str]) -> None:
    """Steps 3 to 5 are left out after step 4 had been sent: each step stands once, and the gap is one."""
    journal, tracker = Journal(tmp_path / "journal.jsonl", 1), Wandb(Track(wandb="offline"), tmp_path, "run", {})
    records: list[Record] = [{"kind": "start", "step": 0}]
    records += [{"kind": "step", "step": step, "metrics": {"train/loss": float(step)}} for step in range(5)]
    records += [
        {"kind": "rollback", "step": 3, "last": 5, "message": "going back to step 2"},
        {"kind": "end", "step": 4},
    ]
    records += [{"kind": "restore", "step": 2}]
    records += [{"kind": "step", "step": step, "metrics": {"train/loss": float(step)}} for step in (2, 6, 7)]
    for record in records:
        journal.write(record)
        tracker.write(record)
    tracker.close()
    journal.close()
    assert tracker.notice is None
    [file] = files(tmp_path)
    assert steps_in(file) == [0, 1, 2, 3, 4, 6, 7]
    alerts = [record.alert for _, record in segments._records(file) if record.WhichOneof("record_type") == "alert"]
    assert [(alert.title, alert.text) for alert in alerts] == [("run: gone back", "going back to step 2")]


def test_no_key_means_offline_with_one_line(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    tracker = Wandb(Track(), tmp_path, "run", {}, say=lines.append)
    tracker.close()
    assert len(lines) == 1 and tracker.notice == lines[0] and "no key found" in lines[0]
    assert tracker.where is not None and tracker.where.startswith("offline") and len(files(tmp_path)) == 1

    lines.clear()
    asked = tmp_path / "asked"
    asked.mkdir()
    tracker = Wandb(Track(wandb="online"), asked, "run", {}, say=lines.append)  # asked for, and there is no key
    tracker.close()
    assert len(lines) == 1 and lines[0].endswith("going on offline") and len(files(asked)) == 1


@pytest.mark.parametrize("where", ["environment", "netrc"])
def test_key_is_looked_for_where_wandb_does(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    assert mode("auto") == "offline"
    if where == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    else:
        (tmp_path / "home" / ".netrc").write_text(f"machine api.wandb.ai login user password {'0' * 40}\n")
        (tmp_path / "home" / ".netrc").chmod(0o600)
    assert mode("auto") == "online" and mode("offline") == "offline" and mode("off") == "off"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode("auto") == "off"


def test_off_makes_nothing_and_imports_nothing(tmp_path: Path, environment: dict[str, str]) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from pipeline.sections import Track; from pipeline.track.wandb import Wandb\n"
        "tracker = Wandb(Track(wandb='off'), Path(sys.argv[1]), 'run', {})\n"
        "tracker.write({'kind': 'start', 'step': 0}); tracker.close()\n"
        "assert tracker.notice is None and tracker.where is None and not {'wandb', 'torch', 'ray'} & set(sys.modules)\n"
    )
    (tmp_path / "run").mkdir()
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=True, env=environment)
    assert os.listdir(tmp_path / "run") == []


@pytest.fixture
def killed() -> Iterator[None]:
    """W&B's own process is killed in the test, and W&B here does not ask what became of it; that is no leak."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for thread in threading.enumerate():
            if thread.name == "wandb":
                thread.join(30)
        gc.collect()


@pytest.mark.usefixtures("killed")
@pytest.mark.parametrize("records", [3, 20_000])
def test_failure_is_one_line_and_never_raised(tmp_path: Path, environment: dict[str, str], records: int) -> None:
    (tmp_path / "run.json").mkdir()  # W&B's id cannot be kept there
    lines: list[str] = []
    tracker = Wandb(Track(wandb="offline"), tmp_path, "run", {}, say=lines.append)
    for step in range(records):
        tracker.write({"attempt": 1, "kind": "step", "step": step, "metrics": {"train/loss": 1.0}})
    tracker.close()
    tracker.close()
    assert len(lines) == 1 and re.fullmatch(
        r"W&B: .+; left alone, the journal has everything \(`millstream track sync .+` sends it\)", lines[0]
    )


@pytest.mark.usefixtures("killed")
def test_falling_behind_ends_it(tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.track.wandb.sink.BEHIND", 10)
    lines: list[str] = []
    tracker = Wandb(Track(wandb="offline"), tmp_path, "run", {}, say=lines.append)
    for step in range(1000):  # while W&B is still starting
        tracker.write({"attempt": 1, "kind": "step", "step": step, "metrics": {"train/loss": 1.0}})
    tracker.close()
    assert len(lines) == 1 and lines[0].startswith("W&B: it does not keep up; left alone, the journal has everything")


@pytest.mark.slow
def test_server_that_is_away_means_offline(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(sink, "INIT_SECONDS", 2.0)
    journal = Journal(tmp_path / "journal.jsonl", 1)
    records: list[Record] = [{"kind": "start", "step": 0}]
    records += [{"kind": "step", "step": step, "metrics": {"train/loss": 1.0}} for step in range(5)]
    journal.write_many(records)
    journal.close()
    lines: list[str] = []
    tracker = Wandb(Track(), tmp_path, "run", {}, say=lines.append)
    for record in records:
        tracker.write({"attempt": 1, **record})
    give_up = time.monotonic() + 60
    while tracker.where is None and time.monotonic() < give_up:
        time.sleep(0.1)
    tracker.close()
    assert len(lines) == 1 and lines[0].endswith("going on offline")
    (segment,) = files(tmp_path)
    while steps_in(segment) != list(range(5)) and time.monotonic() < give_up:
        time.sleep(0.1)  # W&B's own process completes the file a moment after finish
    assert steps_in(segment) == list(range(5))
