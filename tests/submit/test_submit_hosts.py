"""A run sent to a Ray cluster of three hosts that speak TLS: nobody gets in without the token or a certificate, and a
host that dies ends nothing.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.run import Run
from tests.cluster.lab import PATIENCE_SECONDS, ROOT, Lab
from tests.submit import sent_run
from tests.submit.sent_run import CANARIES, CANARY, command, steps, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.root, pytest.mark.timeout(1800)]


def test_three_hosts(tmp_path: Path) -> None:
    sent_run.project(tmp_path)
    run = tmp_path / "runs/toy"
    (tmp_path / "wrong").write_text("f" * 64)
    with Lab(tmp_path, 3, token=True) as lab:
        token = Path(lab.environment["RAY_AUTH_TOKEN_PATH"])
        lab.environment |= CANARIES

        def submit(*words: str, code: int = 0, key: str | Path = token) -> str:
            """On h0, whose head stands on its address in the network, not on loopback."""
            process = lab.start("h0", command("submit", *words), RAY_AUTH_TOKEN_PATH=str(key))
            said, _ = process.communicate(timeout=4 * PATIENCE_SECONDS)
            assert process.returncode == code and "Traceback" not in said, said
            return said

        certificates = ROOT / "launch/ray-certificates"
        subprocess.run([certificates, tmp_path / "tls", *map(lab.address, lab.hosts)], check=True)
        subprocess.run([certificates, tmp_path / "strange", lab.address("h2")], check=True)
        lab.own = {host: tls(lab, host) for host in lab.hosts}
        lab.start_ray("h0", head=True)
        plain = join(lab, "h1", RAY_USE_TLS="0")
        strange = join(lab, "h2", **tls(lab, "h2", "strange"))
        send = ["ray", "toy.yaml", "cluster.min_workers=1", "cluster.grow_seconds=3", "--address", lab.dashboard]
        send += ["-o", f"python={sys.executable}"]
        assert "asks for a token, and there is none here" in submit(*send, code=78, key="")
        assert "does not know this token" in submit(*send, code=78, key=tmp_path / "wrong")
        for outsider in (plain, strange):
            told, _ = outsider.communicate(timeout=PATIENCE_SECONDS)
            assert outsider.returncode and "Ray runtime started" not in told, told
        for host in ("h1", "h2"):
            lab.start_ray(host)
        refused_open_head(lab, submit)
        assert not run.exists()

        (tmp_path / "slow").touch()
        submit(*send)
        wait_for(lambda: len(steps(run)) >= 2, lambda: submit("logs", "toy"))
        lab.kill("h2")
        wait_for(lambda: len(steps(run, attempt=2)) >= 1, lambda: submit("logs", "toy"))
        assert workers(run) == [2, 1]
        submit("stop", "toy", "--watch", code=75)
        assert "stopped: STOPPED" in submit("status", "toy") and "restart 1 of" in submit("logs", "toy")

        (tmp_path / "slow").unlink()
        lab.boot("h2")
        lab.start_ray("h2")
        assert "done: SUCCEEDED" in submit("resume", "toy", "--watch")
        assert workers(run) == [2, 1, 2] and sorted(set(steps(run))) == list(range(sent_run.STEPS))
        places = (run, tmp_path / "submitted")
        assert sent_run.where_it_stands(CANARY, token.read_text(), folders=places) == []


def tls(lab: Lab, host: str, folder: str = "tls") -> dict[str, str]:
    """What makes Ray on a host speak TLS, as the guide has it."""
    own = f"{lab.shared}/{folder}/{lab.address(host)}"
    files = {"SERVER_CERT": f"{own}.crt", "SERVER_KEY": f"{own}.key", "CA_CERT": f"{lab.shared}/{folder}/ca.crt"}
    return {"RAY_USE_TLS": "1", **{f"RAY_TLS_{name}": file for name, file in files.items()}}


def join(lab: Lab, host: str, **environment: str) -> subprocess.Popen[str]:
    """A worker that has the token and tries to come in."""
    options = [f"--address={lab.ray_address}", f"--node-ip-address={lab.address(host)}", "--disable-usage-stats"]
    changed = [f"{name}={value}" for name, value in environment.items()]
    changed += ["RAY_NUM_REDIS_GET_RETRIES=1"]  # it knocks once; by itself Ray goes on for minutes
    return lab.start(host, ["env", *changed, "ray", "start", "--block", *options])


def refused_open_head(lab: Lab, submit: sent_run.Say) -> None:
    """A second head, on h1, that lets in whoever reaches it."""
    address, port = lab.address("h1"), 8300
    start = ["ray", "start", "--head", "--block", f"--node-ip-address={address}", "--port=6400", "--num-cpus=0"]
    start += [f"--dashboard-host={address}", f"--dashboard-port={port}", "--object-store-memory=100000000"]
    start += ["--disable-usage-stats", "--dashboard-agent-listen-port=52400", "--ray-client-server-port=20100"]
    log = lab.folder / "open.log"
    with log.open("w") as output:
        process = lab.start("h1", [*start, "--temp-dir=/tmp/open"], output=output, RAY_AUTH_MODE="disabled")
    knock = ["ray", "toy.yaml", "--address", f"http://{address}:{port}"]
    wait_for(lambda: "Ray runtime started" in log.read_text(), log.read_text)
    reach = [
        "curl",
        "--silent",
        "--fail",
        "--retry",
        "30",
        "--retry-all-errors",
        f"http://{address}:{port}/api/version",
    ]
    assert "ray_version" in lab.run("h0", reach)
    assert "whoever reaches it runs any code there" in submit(*knock, code=78)
    lab.send(process, 9)


def workers(run: Path) -> list[int]:
    """Of each attempt."""
    return [record["workers"] for record in Run(run).records() if record["kind"] == "attempt"]
