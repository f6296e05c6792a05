"""Containers as a restricted pod's, where there is neither an engine nor a registry: buildah, podman and crun.

A base image is made of Debian's packages (debootstrap), for registries cannot be counted on; k8s/Dockerfile is built
on it, with this machine's way to Python packages. A container runs as the image's user, without any capability or
new privilege, its root filesystem read-only, on a network that leads nowhere else.

What it is not: a kubelet. Limits of memory and CPU are not enforced, and nobody starts a container again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests import debian

ROOT = Path(__file__).parents[2]
TOOLS = ("buildah", "podman", "crun", "debootstrap", "ip", "unshare", "xz", "gpgv")
PACKAGES = ("buildah", "podman", "netavark", "crun", "debootstrap", "iproute2", "util-linux", "xz-utils", "gpgv")
BASE, IMAGE = "localhost/base:bookworm", "localhost/millstream:cpu"
CACHE = Path(os.environ.get("MILLSTREAM_TEST_CACHE", Path.home() / ".cache/millstream-tests")) / "box"


def require() -> None:
    """Install the tools that are missing."""
    debian.require(TOOLS, PACKAGES)


def environment() -> dict[str, str]:
    """Images live in a store of their own."""
    (CACHE / "tmp").mkdir(parents=True, exist_ok=True)
    store = f'[storage]\ndriver = "overlay"\nrunroot = "{CACHE}/run"\ngraphroot = "{CACHE}/graph"\n'
    (CACHE / "storage.conf").write_text(store)
    own = {"CONTAINERS_STORAGE_CONF": str(CACHE / "storage.conf"), "TMPDIR": str(CACHE / "tmp")}
    return {**os.environ, **own, "BUILDAH_ISOLATION": "chroot"}


def run(*command: str, **more: Any) -> str:
    """What a command prints; its complaints are in the error."""
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, **more)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout.strip()


def build() -> str:
    """Id of the image, built where it has changed; 2 to 5 minutes the first time, and the base 2 before that."""
    if subprocess.run(["buildah", "inspect", BASE], env=environment(), capture_output=True).returncode:
        _make_base()
    mounts = [f"--volume={path}:{path}:ro" for path in ("/etc/ssl/certs", *_pip_folders()) if Path(path).exists()]
    pip = CACHE / "pip.conf"
    pip.write_text(_pip_configuration())
    options = [
        "--layers",
        "--isolation=chroot",
        "--format=docker",
        f"--build-arg=BASE={BASE}",
        "--build-arg=CPU_INDEX=",
    ]
    ignore = f"--ignorefile={ROOT / 'k8s/Dockerfile.dockerignore'}"
    file, volume = str(ROOT / "k8s/Dockerfile"), f"--volume={pip}:/etc/pip.conf:ro"
    command = ("buildah", "bud", *options, *mounts, volume, ignore, "-f", file, "-t", IMAGE, str(ROOT))
    try:
        run(*command)
    except AssertionError as error:  # a step that could not start its process; those before it are kept
        if "Close_Fd sealing memfd copy" not in str(error):
            raise
        run(*command)
    return run("buildah", "inspect", "--format={{.FromImageID}}", IMAGE)


class Network:
    """Network namespaces on a switch that leads nowhere else; each lives as long as a shell that this process holds."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.shells: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Network:
        switch = self._shell("switch")
        self._ip(switch, "ip link add br0 type bridge && ip link set br0 up")
        for number, name in enumerate(self.names):
            pid = self._shell(name)
            self._ip(switch, f"ip link add p{number} type veth peer name eth0 netns {pid}")
            self._ip(switch, f"ip link set p{number} master br0 up")
            self._ip(pid, f"ip addr add {self.address(name)}/24 dev eth0; ip link set eth0 up; ip link set lo up")
        return self

    def __exit__(self, *error: object) -> None:
        for shell in self.shells.values():
            shell.communicate()

    def address(self, name: str) -> str:
        return f"10.89.77.{10 + self.names.index(name)}"

    def namespace(self, name: str) -> str:
        return f"/proc/{self.shells[name].pid}/ns/net"

    def _shell(self, name: str) -> int:
        command = ["unshare", "--net", "bash", "-c", "echo up; while read -r line; do :; done"]
        shell = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.shells[name] = shell
        assert shell.stdout is not None and shell.stdout.readline() == "up\n"
        return shell.pid

    def _ip(self, pid: int, script: str) -> None:
        run("nsenter", "--net", "--target", str(pid), "bash", "-c", script)


def start(
    name: str,
    network: Network,
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    secret: Mapping[str, str],
    mounts: Mapping[Path, str],
    log: Path,
) -> subprocess.Popen[bytes]:
    """A container with the address of `name`; mounts: folder here -> path there. SIGTERM goes on to its process 1.

    secret: variables that stand on no command line here.
    """
    # crun does not take cgroups of both versions: the second is put out of sight in a mount namespace of our own.
    shell = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec podman "$@"'
    hosts = [f"--add-host={other}:{network.address(other)}" for other in network.names]
    options = [
        "--cgroup-manager=cgroupfs",
        "run",
        "--rm",
        "--replace",
        f"--name=millstream-{name}",
        f"--network=ns:{network.namespace(name)}",
        "--cgroups=disabled",
        "--no-healthcheck",
        "--pull=never",
        "--ulimit=nofile=4096:8192",
        "--ulimit=nproc=4000:4000",
        "--read-only",
        "--read-only-tmpfs=false",
        "--tmpfs=/tmp:rw,mode=1777",
        "--shm-size=512m",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        *hosts,
        *(f"--env={key}={value}" for key, value in env.items()),
        *(f"--env={key}" for key in secret),
        *(f"--volume={here}:{there}" for here, there in mounts.items()),
        IMAGE,
        *command,
    ]
    with log.open("wb") as stream:
        return subprocess.Popen(
            ["unshare", "-m", "bash", "-c", shell, "podman", *options],
            env=environment() | dict(secret),
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )


def _make_base() -> None:
    root, tar = CACHE / "root", CACHE / "base.tar"
    shutil.rmtree(root, ignore_errors=True)
    include = "--include=python3,python3-venv,ca-certificates,bash"
    run("debootstrap", "--variant=minbase", include, "bookworm", str(root))
    run("tar", "-C", str(root), "--exclude=./var/cache/apt/archives/*.deb", "-cf", str(tar), ".")
    container = run("buildah", "from", "scratch")
    run("buildah", "add", "-q", container, str(tar), "/")
    run("buildah", "commit", "-q", "--rm", container, BASE)
    shutil.rmtree(root)
    tar.unlink()


def _pip_settings() -> dict[str, str]:
    shown = run(sys.executable, "-m", "pip", "config", "list")
    settings = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    return {key.rpartition(".")[2]: value.strip("'\"") for key, value in settings.items()}


def _pip_configuration() -> str:
    return "\n".join(["[global]", *(f"{key} = {value}" for key, value in _pip_settings().items()), ""])


def _pip_folders() -> list[str]:
    """Folders and files that pip's settings name: mirrors, wheels, certificates."""
    words = " ".join(_pip_settings().values()).replace("file://", "").split()
    return sorted({word.removesuffix("/simple") for word in words if word.startswith("/") and Path(word).exists()})
