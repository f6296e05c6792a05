"""The image as restricted pods run it: a Ray cluster of three containers trains, one is drained by SIGTERM, and what
its Secret holds is nowhere afterwards.

Commands, variables and rights are those of the rendered manifest; the operator's part, which joins them, is played
here: `ulimit -n 65536; ray start ... --block` for each group (pod.go of KubeRay), a token, and the submitter. So is the
kubelet's, which makes variables of a Secret's keys (envFrom).
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.submit.kubernetes.manifest import CONFIGMAP_MOUNT, items, section, text
from pipeline.track import journal
from tests import small_data
from tests.submit import box, sent_run
from tests.submit.sent_run import CANARIES, CANARY
from tests.test_train import RESNET

pytestmark = [
    pytest.mark.slow,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
PATIENCE = 300.0  # seconds until what was asked for must be there; the machine may be busy
STEPS = 1000
SECRET = "keys"


@pytest.mark.timeout(2400)  # the image is built the first time
def test_three_restricted_containers_train_and_one_is_drained(tmp_path: Path) -> None:
    box.require()
    box.build()
    job = prepare(tmp_path)
    cluster = job["spec"]["rayClusterSpec"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    mounts = {tmp_path / "storage": "/storage", tmp_path / "etc": CONFIGMAP_MOUNT}
    with box.Network(["head", "worker-1", "worker-2", "submitter"]) as network, ExitStack() as stack:
        dashboard = f"http://{network.address('head')}:8265"

        def begin(name: str, command: list[str], group: dict[str, Any]) -> subprocess.Popen[bytes]:
            log, env, secret = tmp_path / f"{name}.log", environment(group), {**token, **secret_of(group)}
            process = box.start(name, network, command, env=env, secret=secret, mounts=mounts, log=log)
            stack.callback(end, process, network, name)
            return process

        def leaked(*names: str) -> list[str]:
            """Where secrets stand: in what the run has left, its containers have said, or have in /tmp."""
            scratch = [process / "root/tmp" for name, process in first(network).items() if name in names]
            assert len(scratch) == len(names)
            return sent_run.where_it_stands(CANARY, token["RAY_AUTH_TOKEN"], folders=(tmp_path, *scratch))

        head = cluster["headGroupSpec"]
        begin("head", start_ray(head, network.address("head")), head)
        wait_for(lambda: "Ray runtime started" in (tmp_path / "head.log").read_text(), tmp_path / "head.log")
        group, address = cluster["workerGroupSpecs"][0], f"{network.address('head')}:6379"
        workers = []
        for name in ("worker-1", "worker-2"):
            workers.append(begin(name, start_ray(group, network.address(name), address), group))
        for name in ("worker-1", "worker-2"):
            log = tmp_path / f"{name}.log"
            wait_for(lambda log=log: "Ray runtime started" in log.read_text(), log)
        submit = ["ray", "job", "submit", f"--address={dashboard}", "--", *job["spec"]["entrypoint"].split()]
        submitter = begin("submitter", submit, job["spec"]["submitterPodTemplate"])

        folder, told = tmp_path / "storage/runs/digits", tmp_path / "submitter.log"
        wait_for(lambda: len(steps(folder)) > 5, told)
        assert_rights(network)
        assert_given(network)
        assert leaked(*network.names) == []
        workers[1].send_signal(signal.SIGTERM)  # as the kubelet does
        assert workers[1].wait(timeout=PATIENCE) is not None
        assert submitter.wait(timeout=2 * PATIENCE) == 0, told.read_text()[-3000:]
        assert leaked("head", "worker-1") == []

    assert list((folder / "wandb").rglob("*.log")), "W&B has written nothing to look through"
    assert sent_run.where_it_stands(CANARY, token["RAY_AUTH_TOKEN"], folders=(tmp_path,)) == []
    records = journal.read(folder / "journal.jsonl").records
    assert [each["workers"] for each in records if each["kind"] == "attempt"] == [2, 1]
    assert ["is about to leave" in each["message"] for each in records if each["kind"] == "resize"] == [True]
    assert not [each for each in records if each["kind"] == "failure"]
    assert steps(folder) == list(range(STEPS)), "a step was lost, or done twice"
    assert [each["reason"] for each in records if each["kind"] == "end"][-1] == "done"


def prepare(folder: Path) -> dict[str, Any]:
    """A run on a claim and in a ConfigMap, both folders here, rendered by the command; its RayJob."""
    storage, home = folder / "storage", folder / "submitted/digits"
    data = small_data.images(storage / "data")
    changes = {"workers": 2, "min_workers": 1, "wait_seconds": 120}
    toy = small_data.config(
        folder / "toy.yaml",
        RESNET,
        data,
        name="digits",
        steps=STEPS,
        checkpoint={"every": 500},
        cluster=changes,
        track={"wandb": "auto"},  # it has a key, and no way to its server
    )
    words = [str(toy), "runs=/storage/runs", "data.train=/storage/data", "data.evaluate={}", "--folder", "/storage"]
    words += ["--image", "localhost/millstream:0.1.0", "-o", "nodes=2", "-o", "grace=100", "-o", f"secret={SECRET}"]
    command = sent_run.command("submit", "k8s", *words, "--render", "--to", str(home))
    with (folder / "submit.log").open("w") as log:
        subprocess.run(command, env=sent_run.environment(), cwd=folder, stdout=log, stderr=log, check=True)
    (folder / "etc").mkdir()
    (folder / "etc/config.yaml").write_text((home / "config.yaml").read_text())
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, 1000, 1000)
    return yaml.safe_load((home / "rayjob.yaml").read_text())


def container(group: dict[str, Any]) -> dict[str, Any]:
    """That of a group's pods, as the manifest has it."""
    return (section(group, "template.spec") or section(group, "spec"))["containers"][0]


def environment(group: dict[str, Any]) -> dict[str, str]:
    return {item["name"]: item["value"] for item in items(container(group), "env")}


def secret_of(group: dict[str, Any]) -> dict[str, str]:
    """The keys of the Secret that the group's container names, as variables."""
    named = [text(item, "secretRef.name") for item in items(container(group), "envFrom")]
    assert named in ([], [SECRET])
    return CANARIES if named else {}


def start_ray(group: dict[str, Any], own: str, head: str | None = None) -> list[str]:
    """The command that KubeRay makes of rayStartParams."""
    place = ["--head", "--port=6379"] if head is None else [f"--address={head}"]
    params = [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
    words = ["ray", "start", *place, "--block", f"--node-ip-address={own}", *params]
    return ["bash", "-c", f"ulimit -n 8192; {' '.join(words)}"]


def first(network: box.Network) -> dict[str, Path]:
    """Process 1 of each container, in /proc."""
    networks = {os.readlink(network.namespace(name)): name for name in network.names}
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            name, numbers = networks.get(os.readlink(process / "ns/net")), facts(process)["NSpid"].split()
            if name and len(numbers) > 1 and numbers[-1] == "1":
                found[name] = process
    return found


def facts(process: Path) -> dict[str, str]:
    return dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())


def assert_rights(network: box.Network) -> None:
    """User, capabilities and root filesystem of each container's process 1, as the kernel tells them."""
    found = first(network)
    assert found.keys() == {"head", "worker-1", "worker-2", "submitter"}
    for process in found.values():
        status = facts(process)
        mounts = [line.split() for line in (process / "mounts").read_text().splitlines()]
        assert status["Uid"].split() == status["Gid"].split() == ["1000"] * 4
        assert all(int(status[f"Cap{kind}"], 16) == 0 for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb"))
        assert status["NoNewPrivs"].strip() == "1" and status["Seccomp"].strip() == "2"
        assert "ro" in next(mount for mount in mounts if mount[1] == "/")[3].split(",")


def assert_given(network: box.Network) -> None:
    """Head and workers have what is in the Secret, and the submitter has not."""
    for name, process in first(network).items():
        given = (process / "environ").read_bytes().decode().split("\0")
        held = [f"{key}={value}" in given for key, value in CANARIES.items()]
        assert held == [name != "submitter"] * len(CANARIES), name


def steps(folder: Path) -> list[int]:
    path = folder / "journal.jsonl"
    if not path.exists():
        return []
    return [each["step"] for each in journal.read(path).records if each["kind"] == "step"]


def wait_for(there: Any, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not there():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.5)


def end(process: subprocess.Popen[bytes], network: box.Network, name: str) -> None:
    """SIGKILL to all of a container that is still there; what SIGTERM does has been seen by then."""
    if process.poll() is None and (there := first(network).get(name)):
        os.kill(int(there.name), signal.SIGKILL)
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:  # it was about to start
        process.kill()
        process.wait()
