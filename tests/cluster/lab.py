"""Hosts out of namespaces: a cluster of machines on this one, to be killed, cut off, healed and preempted.

Each host has namespaces of its own for network, mounts, processes, host name and IPC: an address on a switch that leads
nowhere else, a private /tmp and /dev/shm, and a process 1 with which all its processes die at once.

    with Lab(tmp_path, 3) as lab:
        lab.start_ray("h0", head=True)
        lab.start_ray("h1")
        print(lab.run("h0", ["ray", "status"]))
        lab.cut("h1")

No namespace has a name: it lives as long as the processes in it, and process 1 of a host ends with its standard input,
which the test holds. So nothing is left of a lab, even when the test itself is killed.

What it gives up: the hosts share kernel, clock, processors and, but for /tmp, the disk. It needs root.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

ROOT = Path(__file__).parents[2]
SUBNET = "10.77.0"
RAY_PORT, DASHBOARD_PORT = 6379, 8265
PATIENCE_SECONDS = 240  # until what was started must be there; the machine may be busy

# How soon the head takes a host for dead: 4 s instead of 64 s. A user sets them where `ray start --head` is called.
FAST = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}

# Process 1 of a host. A shell, because it must reap orphans. Of /tmp only $SHARED and $ROOT, where this code lies, are
# those of the other hosts. As on a machine every boot has an id of its own.
BOOT = """
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs -o size=2g shm /dev/shm
mount --bind "$LAB/hosts" /etc/hosts
mount -t tmpfs tmp "$LAB/tmp"
for place in "$SHARED" "$ROOT"; do
    case $place in /tmp/*) mkdir -p "$LAB/tmp/${place#/tmp/}" && mount --bind "$place" "$LAB/tmp/${place#/tmp/}" ;; esac
done
mount --rbind "$LAB/tmp" /tmp
cat /proc/sys/kernel/random/uuid >/tmp/boot_id
mount --bind /tmp/boot_id /proc/sys/kernel/random/boot_id
hostname "$NAME"
echo up
while read -r line; do :; done
"""


class Worker(NamedTuple):
    """A process that trains, as this machine numbers it."""

    host: str
    pid: int


class Host(NamedTuple):
    """first: its process 1, as this machine numbers it.  port: its cable's end at the switch."""

    process: subprocess.Popen[str]
    first: int
    port: str


class Lab:
    """Hosts h0, h1, ... with the addresses 10.77.0.10, 10.77.0.11, ...; `with` takes them down whatever happens.

    shared: a folder that all see under the same path.  token: Ray asks for one; every host has it.  dashboard: the head
    has one, and with it the Jobs API.
    """

    def __init__(self, shared: Path, hosts: int, *, token: bool = False, dashboard: bool = True) -> None:
        self.shared, self.dashboards = shared.resolve(), dashboard
        self.folder = self.shared / "lab"
        self.hosts: dict[str, Host] = {}
        self.ray: dict[str, subprocess.Popen[str]] = {}  # `ray start --block` of each host
        self.own: dict[str, dict[str, str]] = {}  # environment of a host, beside the one of all
        self._ports = 0
        self._stack = ExitStack()
        (self.folder / "tmp").mkdir(parents=True)
        # each host has a /tmp of its own, whatever this process was told to use
        self.environment = {**os.environ, "TMPDIR": "/tmp", "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
        self.environment |= {"RAY_AUTH_MODE": "disabled", "RAY_TRAIN_V2_ENABLED": "1"}
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        if token:
            path = self.folder / "token"
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(32))
            self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
        self.names = [f"h{number}" for number in range(hosts)]
        lines = ["127.0.0.1 localhost", *(f"{self.address(name)} {name}" for name in self.names)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")  # without a name that resolves gloo binds loopback
        try:
            self.switch = self._namespace("--net", "echo up; while read -r line; do :; done")
            self._network(self.switch.pid, "ip link add br0 type bridge && ip link set br0 up")
            for name in self.names:
                self.boot(name)
        except BaseException:
            self.close()
            raise

    def address(self, host: str) -> str:
        return f"{SUBNET}.{10 + int(host.removeprefix('h'))}"

    def boot(self, host: str) -> None:
        """Bring a host up, or up again after `kill` or `power`: with nothing of what it ran or had in /tmp."""
        spaces = ("--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child")
        process = self._namespace(*spaces, BOOT, NAME=host)
        first = children(process.pid)[0]
        self._ports += 1
        port = f"port{self._ports}"  # the old one of a host that is booted again may be there for a moment
        card = f"address 02:00:00:00:00:{10 + int(host[1:]):02x}"  # a host that is booted again has the same
        cable = f"ip link add {port} type veth peer name eth0 {card} netns {first}"
        self._network(self.switch.pid, f"{cable} && ip link set {port} master br0 up")
        eth0 = f"ip addr add {self.address(host)}/24 dev eth0 && ip link set eth0 up && ip link set lo up"
        self._network(first, eth0)
        self.hosts[host] = Host(process, first, port)

    def start(
        self, host: str, command: Sequence[str], *, output: int | IO[str] = subprocess.PIPE, **environment: str
    ) -> subprocess.Popen[str]:
        """Start a command on a host, in the shared folder; stderr goes where stdout goes. See `send` for signals."""
        spaces = ["--mount", "--uts", "--ipc", "--net", "--pid", f"--wdns={self.shared}"]
        process = subprocess.Popen(
            ["nsenter", "--target", str(self.hosts[host].first), *spaces, "--", *command],
            env=self.environment | self.own.get(host, {}) | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._stack.callback(_reap, process)
        return process

    def run(self, host: str, command: Sequence[str], **environment: str) -> str:
        """Run a command on a host to its end; its output. Raises RuntimeError with it when it fails."""
        process = self.start(host, command, output=subprocess.PIPE, **environment)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} on {host}: exit {process.returncode}\n{output}")
        return output

    def send(self, process: subprocess.Popen[str], number: int) -> None:
        """Signal a command that `start` has started: nsenter, which waits for it, passes none on."""
        for child in children(process.pid):
            os.kill(child, number)

    # ---------------------------------------------------------------- what befalls hosts
    def kill(self, host: str) -> None:
        """All its processes at once, the cable in: peers see their connections reset."""
        os.kill(self.hosts[host].first, signal.SIGKILL)
        self.hosts.pop(host).process.wait()
        self.ray.pop(host, None)

    def power(self, host: str) -> None:
        """Power off: peers see nothing at all."""
        self.cut(host)
        self.kill(host)

    def cut(self, host: str) -> None:
        """Pull the cable: all goes on there, and nobody hears of it."""
        self._network(self.switch.pid, f"ip link set {self.hosts[host].port} down")

    def heal(self, host: str) -> None:
        """Put the cable in again."""
        self._network(self.switch.pid, f"ip link set {self.hosts[host].port} up")

    def preempt(self, host: str) -> None:
        """SIGTERM to its `ray start --block`, as Kubernetes, Slurm and a cloud's shutdown send it."""
        self.send(self.ray[host], signal.SIGTERM)

    # ---------------------------------------------------------------- Ray
    @property
    def ray_address(self) -> str:
        return f"{self.address('h0')}:{RAY_PORT}"

    @property
    def dashboard(self) -> str:
        return f"http://{self.address('h0')}:{DASHBOARD_PORT}"

    def start_ray(self, host: str, *more: str, head: bool = False, cpus: int | None = None, **environment: str) -> None:
        """`ray start --block` on a host, and wait until it is up; `more` of its options.

        The head is h0. It takes a lost host for dead after 4 s. cpus: that it offers; by default a worker 1, and the
        head none, so that no training lands there.
        """
        where = [f"--node-ip-address={self.address(host)}", "--object-store-memory=100000000", "--disable-usage-stats"]
        if head:
            where += ["--head", f"--port={RAY_PORT}", f"--dashboard-host={self.address(host)}"]
            where += [f"--include-dashboard={self.dashboards}"]
            environment = FAST | environment
        else:
            where += [f"--address={self.ray_address}"]
        slots = int(not head) if cpus is None else cpus
        log = self.folder / f"ray-{host}.log"
        with log.open("w") as output:
            command = ["ray", "start", "--block", f"--num-cpus={slots}", *where, *more]
            self.ray[host] = self.start(host, command, output=output, **environment)
        give_up = time.monotonic() + PATIENCE_SECONDS
        while "Ray runtime started" not in log.read_text():
            if self.ray[host].poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"Ray did not start on {host}:\n{log.read_text()}")
            time.sleep(0.1)

    def mend(self, **environment: str) -> None:
        """Boot every host that is down, and start Ray (in this environment) on every host where it has ended."""
        for host in self.names:
            if host not in self.hosts:
                self.boot(host)
            if host not in self.ray or self.ray[host].poll() is not None:
                self.start_ray(host, head=host == "h0", cpus=None, **environment)

    def workers(self, folder: Path, attempt: int) -> dict[int, Worker]:
        """By rank, the workers that live of an attempt at the run in `folder`: those that write its logs."""
        networks = {os.readlink(f"/proc/{host.first}/ns/net"): name for name, host in self.hosts.items()}
        found = {}
        for output in Path("/proc").glob("[0-9]*/fd/1"):
            with suppress(OSError):  # it has just ended
                log, process = Path(os.readlink(output)).name, output.parents[1]
                host = networks.get(os.readlink(process / "ns" / "net"))
                if host and log.startswith(f"attempt-{attempt:04d}-rank-") and (folder / "logs" / log).exists():
                    found[int(log.removesuffix(".log").rpartition("-")[2])] = Worker(host, int(process.name))
        return found

    # ---------------------------------------------------------------- how it is held
    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take everything down; the kernel removes the namespaces with the last process in them."""
        self._stack.close()

    def _namespace(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """A shell that runs the last argument in namespaces of its own, once it has said that it is up."""
        *spaces, script = arguments
        places = {"LAB": str(self.folder), "SHARED": str(self.shared), "ROOT": str(ROOT)}
        process = subprocess.Popen(
            ["unshare", *spaces, "bash", "-c", script],
            env=self.environment | places | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._stack.callback(_reap, process)
        assert process.stdout is not None
        if (said := process.stdout.readline()) != "up\n":
            raise RuntimeError(
                f"{environment.get('NAME', 'the switch')} did not come up: {said}{process.stdout.read()}"
            )
        return process

    def _network(self, pid: int, script: str) -> None:
        """Run `ip` commands in the network namespace of a process."""
        command = ["nsenter", "--net", "--target", str(pid), "bash", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{script}: {done.stderr}")


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _reap(process: subprocess.Popen[str]) -> None:
    """End what stands outside of a host: nsenter, or `unshare`, which waits until all of its host is dead."""
    if process.stdin is None:
        # nsenter ends with its child; that as an orphan would be for this machine's process 1 to reap, which may not
        with suppress(OSError, subprocess.TimeoutExpired):
            for child in children(process.pid):
                os.kill(child, signal.SIGKILL)
            process.wait(timeout=1)
        process.kill()
    else:
        process.stdin.close()
    process.wait(timeout=PATIENCE_SECONDS)
    if process.stdout is not None:
        process.stdout.close()
