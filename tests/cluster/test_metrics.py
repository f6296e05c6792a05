"""What Prometheus sees of a run: the values as records leave them, and a real Prometheus (Debian's) that scrapes a run
of two workers while it trains, asked every query of the dashboard.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cluster.metrics import GAUGES, State
from tests import small_data
from tests.cluster.test_runs import finish, millstream, wait_for_step
from tests.test_train import RESNET

MONITORING = Path(__file__).parents[2] / "k8s" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana-dashboard.json").read_text())
QUERIES = [
    pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
]
PATIENCE = 180.0  # seconds until every query must have had its data


def test_records_become_values() -> None:
    state = State(100, began=1000.0)
    metrics = {"train/loss": None, "optim/lr": 0.1, "time/step_seconds": 2.0, "data/wait_seconds": 0.5}
    saved = {"checkpoint/save_seconds": 1.5, "checkpoint/bytes": 10, "checkpoint/blocked_seconds": 0.1}
    for number, record in enumerate(
        [
            {"kind": "attempt", "attempt": 3, "workers": 2},
            {"kind": "restore", "step": 10},
            {"kind": "step", "step": 10, "metrics": metrics},
            {"kind": "skip", "step": 11},
            {"kind": "evaluation", "step": 11, "metrics": {"eval/test/accuracy": 0.5}},
            {"kind": "save", "step": 11, "metrics": saved},
        ]
    ):
        state.take({"time": 1000.0 + number, **record})
    values = state.at(1015.0)
    assert math.isnan(values.pop("loss"))
    assert values == {
        "attempt": 3,
        "restarts": 2,
        "workers": 2,
        "step": 11,
        "steps": 100,
        "learning_rate": 0.1,
        "step_seconds": 2.0,
        "data_wait_share": 0.25,
        "skipped_steps": 1,
        "warnings": 0,
        "checkpoint_step": 11,
        "checkpoint_save_seconds": 1.5,
        "checkpoint_bytes": 10,
        "checkpoint_age_seconds": 10.0,
        "silent_seconds": 10.0,
    }
    assert state.evaluations == {"test/accuracy": 0.5} and set(values) < set(GAUGES)


def test_the_dashboard_hangs_together() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24  # none lies on another
    asked = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    assert [name for name in GAUGES if f"ray_millstream_{name}{{" not in asked] == ["attempt", "checkpoint_step"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def programs(folder: Path) -> Path:
    """Debian's prometheus and promtool, from its package, installed nowhere; returns their folder."""
    folder.mkdir()
    download = ["apt-get", "download", "prometheus"]
    if subprocess.run(download, cwd=folder, capture_output=True).returncode:
        subprocess.run(["apt-get", "update"], check=True, capture_output=True)
        subprocess.run(download, cwd=folder, check=True, capture_output=True)
    (package,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=folder, check=True)
    return folder / "usr" / "bin"


def ask(port: int, query: str) -> list[dict[str, Any]]:
    """Prometheus' answer: series with a value each; none while it does not answer yet."""
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]["result"]
    except OSError as error:
        if isinstance(error, urllib.error.HTTPError):
            raise AssertionError(f"{query}: {error.read().decode()}") from error
        return []


@pytest.mark.slow
@pytest.mark.root
def test_prometheus_answers_every_query_while_a_run_trains(tmp_path: Path) -> None:
    binaries = programs(tmp_path / "prometheus")
    for name in ("prometheus-hosts.yml", "prometheus-kubernetes.yml"):
        content = yaml.safe_load((MONITORING / name).read_text())
        for job in content["scrape_configs"]:
            job.pop("kubernetes_sd_configs", None)  # Debian's is built without it
        (tmp_path / name).write_text(yaml.safe_dump(content))
        check = [binaries / "promtool", "check", "config", "--syntax-only", tmp_path / name]
        done = subprocess.run(check, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    # The file for hosts as it stands, but for ports that are free here and a list of nodes that nobody keeps.
    target, port = free_port(), free_port()
    scrape = yaml.safe_load((MONITORING / "prometheus-hosts.yml").read_text())
    (here,) = [job for job in scrape["scrape_configs"] if job["job_name"] == "millstream-here"]
    here["static_configs"][0]["targets"] = [f"127.0.0.1:{target}"]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(scrape))
    serve = [binaries / "prometheus", f"--config.file={tmp_path}/prometheus.yml"]
    serve += [f"--storage.tsdb.path={tmp_path}/series", f"--web.listen-address=127.0.0.1:{port}"]

    pictures = str(small_data.images(tmp_path / "pictures"))
    task = {**RESNET, "name": "tests.slow_task"}
    data = {"train": pictures, "evaluate": {"test": pictures}}
    changes = {"steps": 5000, "evaluate": {"every": 10}, "checkpoint": {"every": 10}}
    small_data.config(tmp_path / "toy.yaml", task, tmp_path / "pictures", data=data, **changes)
    run = millstream(tmp_path, "train", "toy.yaml", f"cluster.metrics_port={target}")
    with (tmp_path / "log").open("w") as log:
        prometheus = subprocess.Popen(serve, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for_step(tmp_path / "runs" / "toy", 12, 1, run)
        unanswered = {query.values[0]: query.id for query in QUERIES}
        give_up = time.monotonic() + PATIENCE
        found: dict[str, list[dict[str, Any]]] = {}
        while set(unanswered) - set(found) and time.monotonic() < give_up:
            for query in set(unanswered) - set(found):
                if series := ask(port, str(query).replace("$run", ".*")):
                    found[str(query)] = series
            time.sleep(1)
        missing = [name for query, name in unanswered.items() if query not in found]
        assert missing == [], (missing, (tmp_path / "log").read_text()[-2000:])
        values = {query: float(series[0]["value"][1]) for query, series in found.items()}
        assert all(math.isfinite(value) for value in values.values())
        of_run = [series[0] for query, series in found.items() if "ray_millstream" in query]
        assert {each["metric"]["run"] for each in of_run} == {"toy"}
        (workers,) = [value for query, value in values.items() if "ray_millstream_workers" in query]
        assert workers == 2
        run.send_signal(signal.SIGINT)
        finish(run, 75)
    finally:
        prometheus.kill()
        prometheus.wait()
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
