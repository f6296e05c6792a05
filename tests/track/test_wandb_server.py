"""W&B online and sent later, with the real client against a server of our own (wandb_server.py): each step arrives
once, through kills, rewinds, and a server that is late, refuses, hangs up or leaves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import RunError
from pipeline.sections import Track
from pipeline.track import journal
from pipeline.track.wandb import account, segments, sync
from tests.track import attempts
from tests.track.attempts import attempt
from tests.track.wandb_server import Run, Server

ONLINE = "wandb=online"


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.close()


@pytest.fixture
def environment(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """With an account on the test's server; for this process and for those that it starts."""
    mine = attempts.environment(tmp_path / "home") | server.environment
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "TMPDIR", *server.environment):
        monkeypatch.setenv(name, mine[name])
    monkeypatch.setattr(account, "ASK_SECONDS", 1.0)
    return mine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def run_of(server: Server, folder: Path) -> Run:
    return server.runs[json.loads((folder / "run.json").read_text())["wandb_id"]]


def losses(run: Run) -> list[float]:
    return [row["train/loss"] for row in run.history if "train/loss" in row]


def tables(server: Server, folder: Path) -> list[int]:
    """The steps of which a table has arrived whole: its row, and the artifact with the file of its picture."""
    run = run_of(server, folder)
    steps = [row["train/step"] for row in run.history if "samples/test" in row]
    rows = [row["samples/test"] for row in run.history if "samples/test" in row]
    assert all(row["_type"] == "table-file" and row["nrows"] == 2 for row in rows)
    names = [name for name in server.artifacts if name.startswith("run-")]
    assert [server.artifacts[name].state for name in names] == ["COMMITTED"] * len(steps)
    sent = [content for name in names for file, content in server.artifacts[name].files.items() if file.endswith("png")]
    assert sent == [(folder / attempts.PICTURE.format(step)).read_bytes() for step in steps]
    return steps


def repair_and_send(folder: Path) -> int:
    """As `millstream track sync` does it."""
    sync.repair(folder, Track(), "small", {"name": "small"})
    return sync.send(folder, Track(), lambda line: None)


def test_an_online_run_goes_on_under_its_id(server: Server, environment: dict[str, str], folder: Path) -> None:
    attempt(folder, environment, 1, 0, 25, "flushed", ONLINE)
    server.delay = 0.2
    said = attempt(folder, environment, 2, 20, 40, "failed", ONLINE, "tags=[a]", "group=sweep")
    run = run_of(server, folder)
    assert len(server.runs) == 1 and said == f"{server.url}/somebody/millstream/runs/{next(iter(server.runs))}\n"
    assert run.steps == [row["train/step"] for row in run.history] == list(range(41))
    assert [row["eval/test/accuracy"] for row in run.history if "eval/test/accuracy" in row] == [0.1, 0.2, 0.3, 0.4]
    assert (run.facts["groupName"], run.facts["tags"], run.exit_code) == ("sweep", ["a"], 1)
    assert run.config["millstream"]["value"]["code"] == {"commit": "c" * 40, "dirty": False}
    assert run.config["seed"]["value"] == 2
    (alert,) = run.alerts
    assert (alert["title"], alert["severity"]) == ("small: given up", "ERROR") and "out of luck" in alert["text"]

    # Lineage: data set -> run -> checkpoints, all of it by reference.
    assert set(run.used) == {"data-small-train:v0"} and server.artifacts["data-small-train:v0"].type == "dataset"
    made = [server.artifacts[name] for name in run.logged if name.startswith("checkpoint-")]
    assert {artifact.metadata["step"] for artifact in made} == {10, 20, 30, 40}
    assert all(artifact.state == "COMMITTED" and artifact.metadata["data"] == "96 samples" for artifact in made)
    last = next(artifact for artifact in made if artifact.metadata["step"] == 40)
    (entry,) = last.manifest["contents"].values()
    assert entry["ref"] == f"file://{folder}/checkpoints/checkpoint-00000040/manifest.json"
    assert "step-40" in last.aliases
    assert tables(server, folder) == [20, 40]
    assert [row["train/step"] for row in run.history if "system/n1_lab/cpu" in row] == [5, 15, 25, 35]


@pytest.mark.parametrize("where", ["online", "offline"])
def test_rewind_forgets_the_steps_that_are_done_again(
    server: Server, environment: dict[str, str], folder: Path, where: str
) -> None:
    keys = (f"wandb={where}", "on_rewind=rewind")
    end = "flushed" if where == "offline" else "done"  # the client sends every 15 s: a kill would leave nothing there
    attempt(folder, environment, 1, 0, 25, end, *keys)
    attempt(folder, environment, 2, 10, 30, end, *keys)
    attempt(folder, environment, 3, 20, 40, "done", *keys)
    if where == "offline":
        assert repair_and_send(folder) == 3 and repair_and_send(folder) == 0
    run = run_of(server, folder)
    assert run.steps == list(range(41)) and run.rewinds == [9, 19]
    assert [round(loss % 1, 1) for loss in losses(run)] == [0.1] * 10 + [0.2] * 10 + [0.3] * 20


def test_a_server_that_cannot_rewind_is_asked_once(server: Server, environment: dict[str, str], folder: Path) -> None:
    server.can_rewind = False
    keys = ONLINE, "on_rewind=rewind"
    attempt(folder, environment, 1, 0, 25, "done", *keys)
    said = attempt(folder, environment, 2, 10, 30, "done", *keys).splitlines()
    assert said[0].startswith("W&B: failed to rewind run") and said[0].endswith("the steps that it has are skipped")
    assert len(said) == 2 and run_of(server, folder).steps == list(range(31))

    offline = folder.with_name("offline")
    offline.mkdir()
    keys = ("on_rewind=rewind",)
    attempt(offline, environment, 1, 0, 25, "flushed", *keys)
    attempt(offline, environment, 2, 10, 30, "done", *keys)
    assert repair_and_send(offline) == 3 and repair_and_send(offline) == 0  # the first one in two parts
    assert run_of(server, offline).steps == list(range(31))
    assert [round(loss % 1, 1) for loss in losses(run_of(server, offline))] == [0.1] * 25 + [0.2] * 5


def test_a_new_run_stands_beside_the_one_that_was_left(
    server: Server, environment: dict[str, str], folder: Path
) -> None:
    keys = ONLINE, "on_rewind=new_run"
    attempt(folder, environment, 1, 0, 25, "done", *keys)
    attempt(folder, environment, 2, 10, 30, "done", *keys)
    old, new = server.runs.values()
    assert new is run_of(server, folder) and old.facts["groupName"] == new.facts["groupName"] == "small"
    assert old.steps == list(range(25)) and new.steps == list(range(31))
    assert [round(loss % 1, 1) for loss in losses(new)] == [0.1] * 10 + [0.2] * 20
    assert (old.exit_code, new.exit_code) == (1, 0)


def test_offline_files_arrive_once_whatever_breaks(server: Server, environment: dict[str, str], folder: Path) -> None:
    attempt(folder, environment, 1, 0, 35, "flushed")
    torn = segments.find(folder)[-1].path
    torn.write_bytes(torn.read_bytes()[:-10])
    attempt(folder, environment, 2, 20, 50, "flushed")
    attempt(folder, environment, 3, 50, 60, "killed")  # the journal has more than W&B
    before = sync.status(folder)
    assert before.missing and before.missing[-1] == 60 and not server.runs

    server.behave = "refuse"
    with pytest.raises(RunError, match=r"refuses to answer \(403.*wandb login"):
        repair_and_send(folder)
    server.leave()
    with pytest.raises(RunError, match="no answer from W&B"):
        repair_and_send(folder)
    server.come_back()
    assert sync.status(folder).missing == []  # filled in before anything was sent

    sent: list[str] = []
    for _ in range(2):  # twice it is cut off in the middle of a segment
        server.hang_up_after = 1
        with pytest.raises(RunError, match=r"was sent in part|was not sent|no answer"):
            sync.send(folder, Track(), sent.append)
        server.leave()
        server.come_back()
    assert sync.send(folder, Track(), sent.append) > 0
    assert run_of(server, folder).steps == list(range(61))
    assert [row["train/step"] for row in run_of(server, folder).history] == list(range(61))
    assert tables(server, folder) == [20, 40, 60]
    server.requests.clear()
    assert repair_and_send(folder) == 0 and server.requests == []
    for segment in segments.find(folder):  # nor when the marks are lost
        segment.mark.unlink()
    assert repair_and_send(folder) == 0
    assert run_of(server, folder).steps == list(range(61))


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["leave", "hang up", "silent", "fail"])
def test_a_server_that_fails_ends_nothing(
    server: Server, environment: dict[str, str], folder: Path, trouble: str
) -> None:
    """In the middle of a run and until after its end; the run ends as always, and everything is sent later."""
    (folder / "hold-20").touch()
    process = attempts.start(folder, environment, 1, 0, 40, "done", ONLINE)
    try:
        while not (server.runs and len(run_of(server, folder).steps) >= 10):
            assert process.poll() is None
        if trouble == "leave":
            server.leave()
        else:
            server.behave = trouble
        output, errors = process.communicate("go on\n", timeout=60)  # it hung for minutes without limits of ours
    finally:
        process.kill()
    assert process.returncode == 0 and errors == ""
    assert "W&B: its server did not take everything within 6 s; left alone" in output and "track sync" in output
    server.leave() if trouble != "leave" else None
    server.come_back()
    repair_and_send(folder)
    assert run_of(server, folder).steps == list(range(41))
    assert repair_and_send(folder) == 0


def test_a_part_of_a_segment_reads_like_the_whole(
    server: Server, environment: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    attempt(folder, environment, 1, 0, 400, "done")  # more than a block of 32 KiB
    (segment,) = segments.find(folder)
    assert segment.steps == list(range(401)) and segment.path.stat().st_size > 3 * 32768
    part = segments.write_part(segment, range(100, 401), False, tmp_path / "part") / segment.path.name
    rows = list(segments.rows_in(segment.path))
    assert list(segments.rows_in(part)) == rows[100:]

    # W&B's copies of the tables' files are found where the folder has been moved to; without them the rest is sent.
    moved = folder.rename(folder.with_name("moved"))
    (segment,) = segments.find(moved)
    staging = moved / "wandb" / "artifacts" / "staging"
    [copy] = [
        path for path in staging.iterdir() if path.read_bytes() == (moved / attempts.PICTURE.format(40)).read_bytes()
    ]
    copy.unlink()
    assert segment.lost
    assert sync.send(moved, Track(), lambda line: None) == 1
    assert run_of(server, moved).steps == list(range(401))
    assert [each.state for name, each in server.artifacts.items() if name.startswith("run-")] == ["COMMITTED"] * 3


def test_a_server_is_asked_what_it_has(server: Server, environment: dict[str, str], folder: Path) -> None:
    assert account.last_step("millstream", None, "unknown") == -1
    attempt(folder, environment, 1, 0, 5, "done", ONLINE)
    identity = next(iter(server.runs))
    assert account.last_step("millstream", None, identity) == 4
    server.behave = "fail"
    with pytest.raises(RunError, match="500"):
        account.last_step("millstream", None, identity)
    assert [r["step"] for r in journal.read(folder / "journal.jsonl").records if r["kind"] == "step"] == [*range(5)]
