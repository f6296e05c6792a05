"""The half of a real API server that serves CustomResourceDefinitions, on loopback, with a real etcd.

No package has a whole kube-apiserver, but Debian packages the library that it does this with (crdserver/). So what
kubectl is told here is real: pruning, defaults, strict fields, rules in CEL, server-side apply, status. What it is not:
core kinds (pods, ConfigMaps), logins, admission, and there is no operator; a test plays that.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).with_name("crdserver")
CACHE = Path(os.environ.get("MILLSTREAM_TEST_CACHE", Path.home() / ".cache/millstream-tests"))
READY_SECONDS = 120.0
TOOLS = ("kubectl", "etcd", "apt-get", "dpkg")


def missing() -> list[str]:
    """Tools that are not here; Debian has them in kubernetes-client and etcd-server."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def binary() -> Path:
    """The server, built once: about 5 CPU minutes."""
    built = CACHE / "crdserver"
    if not built.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        work = CACHE / "crdserver-build"
        done = subprocess.run([str(HERE / "build.sh"), str(built), str(work)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        shutil.rmtree(work)
    return built


@contextmanager
def serve(folder: Path) -> Iterator[dict[str, str]]:
    """A server whose state is in `folder`; yields the environment that makes kubectl talk to it."""
    etcd, peers, port = (f"http://127.0.0.1:{_free_port()}" for _ in range(3))
    port = port.rpartition(":")[2]
    commands = {
        "etcd": [
            "etcd",
            f"--data-dir={folder / 'etcd'}",
            *(f"--{kind}-client-urls={etcd}" for kind in ("listen", "advertise")),
            f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}",
            f"--initial-cluster=default={peers}",
        ],
        "server": [str(binary()), "-port", port, "-etcd", etcd, "-certs", str(folder / "certs")],
    }
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder))
        _wait(f"https://127.0.0.1:{port}/readyz", folder / "server.log")
        yield {"KUBECONFIG": str(_configuration(folder, port)), "KUBECACHEDIR": str(folder / "cache")}
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()


def kubectl(*words: str, given: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["kubectl", *words], input=given, capture_output=True, text=True, timeout=120)
    assert not check or done.returncode == 0, done.stderr
    return done


def install(definitions: Path) -> None:
    """KubeRay's definitions, as its chart installs them."""
    for path in sorted(definitions.glob("*ray*.yaml")):
        kubectl("create", "-f", str(path))
    deadline = time.monotonic() + READY_SECONDS
    while any(kubectl("get", kind, check=False).returncode for kind in ("rayjobs", "rayclusters")):
        assert time.monotonic() < deadline, "the definitions are not served"
        shutil.rmtree(os.environ["KUBECACHEDIR"], ignore_errors=True)  # where kubectl keeps that there were none
        time.sleep(0.2)


def play_operator(kind: str, name: str, **status: Any) -> None:
    """Write the status that KubeRay would."""
    patch = json.dumps({"status": status})
    kubectl("patch", kind, name, "-n", "training", "--subresource=status", "--type=merge", "-p", patch)


def _configuration(folder: Path, port: str) -> Path:
    cluster = {"server": f"https://127.0.0.1:{port}", "insecure-skip-tls-verify": True}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "lab", "cluster": cluster}],
        "users": [{"name": "me", "user": {"token": "any"}}],  # without one kubectl asks for a password
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "me", "namespace": "training"}}],
        "current-context": "lab",
    }
    path = folder / "kubeconfig"
    path.write_text(json.dumps(content))
    return path


def _wait(url: str, log: Path) -> None:
    context = ssl._create_unverified_context()
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, context=context, timeout=2):
            return
        time.sleep(0.2)
    raise AssertionError(f"the server is not ready: {log.read_text()[-2000:]}")


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]
