"""A run sent to a real Ray head with token authentication on this machine: refused, sent, stopped, gone on with."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.run import Run
from tests.submit import sent_run
from tests.submit.sent_run import CANARY, command, environment, same, state, steps, undisturbed, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


class Head(NamedTuple):
    url: str
    token: Path
    folder: Path  # Ray's own


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` with a token, on loopback, in a session of its own; nothing of it is left."""
    folder = Path(tempfile.mkdtemp(prefix="h"))  # a short name: Ray's sockets lie in it
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    port = free_port()
    start = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    start += [f"--port={free_port()}", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}", "--num-cpus=2"]
    start += [f"--temp-dir={folder}/ray", "--object-store-memory=100000000", "--disable-usage-stats"]
    start += [f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    mine |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    log = (folder / "log").open("w")
    process = subprocess.Popen(start, cwd=folder, env=mine, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: started(folder / "log", process), (folder / "log").read_text)
        wait_for(lambda: answers(url, token.read_text()), lambda: "the dashboard does not answer")
        yield Head(url, token, folder)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # told to end, it takes half a minute
        process.wait()
        log.close()
        shutil.rmtree(folder)


def started(log: Path, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, log.read_text()
    return "Ray runtime started" in log.read_text()


def answers(url: str, token: str) -> bool:
    try:
        ask(url, token, "/api/version")
    except OSError:
        return False
    return True


def ask(url: str, token: str, path: str) -> str:
    request = urllib.request.Request(url + path, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


def test_refused_sent_stopped_and_gone_on_with(tmp_path: Path, head: Head) -> None:
    sent_run.project(tmp_path)
    (tmp_path / "wrong").write_text(secrets.token_hex(32))
    run, python = tmp_path / "runs/toy", ["-o", f"python={sys.executable}"]

    def submit(*words: str, token: Path | None = head.token, code: int = 0) -> str:
        mine = environment(**({"RAY_AUTH_TOKEN_PATH": str(token)} if token else {}))
        done = subprocess.run(
            command("submit", *words), cwd=tmp_path, env=mine, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
        return done.stdout + done.stderr

    send = ["ray", "toy.yaml", "--address", head.url, *python]
    assert "asks for a token, and there is none here" in submit(*send, token=None, code=78)
    assert "does not know this token" in submit(*send, token=tmp_path / "wrong", code=78)
    assert json.loads(ask(head.url, head.token.read_text(), "/api/jobs/")) == [] and not run.exists()

    (tmp_path / "slow").touch()
    said = submit(*send)
    assert f"job {head.url}/#/jobs/toy-" in said and "bytes in" in said
    wait_for(lambda: len(steps(run)) >= 2, lambda: submit("logs", "toy"))
    assert "running: RUNNING" in submit("status", "toy") and "step" in submit("logs", "toy")
    assert "of this run is running" in submit(*send, code=78)
    shown = ask(head.url, head.token.read_text(), "/api/jobs/")
    places = (run, tmp_path / "submitted", head.folder / "ray")
    assert CANARY not in shown and head.token.read_text() not in shown and "toy-" in shown
    assert sent_run.where_it_stands(CANARY, head.token.read_text(), folders=places) == []

    submit("stop", "toy", "--watch", code=75)
    assert "stopped: STOPPED" in submit("status", "toy")
    end = [record for record in Run(run).records() if record["kind"] == "end"][-1]
    assert end["reason"] == "stopped" and 2 <= end["step"] < sent_run.STEPS
    assert any(listed.step == end["step"] for listed in Run(run).checkpoints())  # it had the time to save

    (tmp_path / "slow").unlink()
    said = submit("resume", "toy", "--watch")
    assert "done: SUCCEEDED, exit code 0" in said
    assert sorted(steps(run)) == list(range(sent_run.STEPS))
    assert "is done" in submit("resume", "toy", code=78)
    assert sent_run.where_it_stands(CANARY, head.token.read_text(), folders=places) == []
    assert same(state(run), state(undisturbed(tmp_path)))
