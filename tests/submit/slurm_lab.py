"""A real Slurm over hosts of the lab: slurmctld on h0, slurmd on each other; Debian's packages, none of their units.

Two partitions: a job in `high` takes the nodes of one in `low`, which is warned first and queued again. What it gives
up: no accounting, no cgroups; the nodes share this machine's memory.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from tests import debian
from tests.cluster.lab import Lab
from tests.submit.sent_run import wait_for

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge"]
# cred_expire: a job that was requeued waits that long (120 s by itself) before it may start again.
CONF = """
ClusterName=lab
SlurmctldHost=h0({head})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/tmp/munge/socket,cred_expire=10
CredType=cred/munge
StateSaveLocation=/tmp/slurm/state
SlurmdSpoolDir=/tmp/slurm/spool
SlurmctldPidFile=/tmp/slurm/ctld.pid
SlurmdPidFile=/tmp/slurm/d.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=10
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
NodeName=h[1-{last}] NodeAddr=10.77.0.[11-{address}] CPUs={cpus} RealMemory=1000
PartitionName=low  Nodes=ALL PriorityTier=1 Default=YES MaxTime=60 GraceTime=60 State=UP
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF MaxTime=60 State=UP
"""
DAEMONS = """
mkdir -p -m 755 /tmp/munge /tmp/slurm/state /tmp/slurm/spool && chmod 1777 /tmp
exec munged --foreground --key-file="$KEY" --socket=/tmp/munge/socket --pid-file=/tmp/munge/pid \
    --log-file=/tmp/munge/log --seed-file=/tmp/munge/seed
"""


def require() -> None:
    """Install Slurm where it is missing."""
    debian.require(("slurmctld", "slurmd", "sbatch", "munged"), PACKAGES)


class Slurm:
    """Slurm on a lab whose h0 is the login node and whose other hosts are idle nodes once `with` is entered."""

    def __init__(self, lab: Lab) -> None:
        self.lab, nodes = lab, len(lab.hosts) - 1
        conf, key = lab.folder / "slurm.conf", lab.folder / "munge.key"
        conf.write_text(
            CONF.format(head=lab.address("h0"), last=nodes, address=10 + nodes, cpus=os.cpu_count() or 1).lstrip()
        )
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        lab.environment["SLURM_CONF"] = str(conf)
        for host in lab.hosts:
            self._daemon(host, "munged", ["env", f"KEY={key}", "bash", "-c", DAEMONS])
            lab.run(host, ["bash", "-c", "until [ -S /tmp/munge/socket ]; do sleep 0.05; done"])
        self._daemon("h0", "slurmctld", ["slurmctld", "-D"])
        for host in list(lab.hosts)[1:]:
            self._daemon(host, "slurmd", ["slurmd", "-D", "-N", host])
        wait_for(lambda: self._idle() == nodes, self._why)

    def submit(self, *options: str) -> str:
        """sbatch on h0; the job's number."""
        return self.lab.run("h0", ["sbatch", "--parsable", *options]).strip()

    def facts(self, number: str) -> dict[str, str]:
        """What scontrol says of a job."""
        shown = self.lab.run("h0", ["scontrol", "--oneliner", "show", "job", number])
        return {word.partition("=")[0]: word.partition("=")[2] for word in shown.split()}

    def __enter__(self) -> Slurm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Its daemons die with the hosts of the lab."""

    def _daemon(self, host: str, name: str, command: list[str]) -> None:
        with self._log(host, name).open("w") as output:
            self.lab.start(host, command, output=output)

    def _log(self, host: str, name: str) -> Path:
        return self.lab.folder / f"{name}-{host}.log"

    def _idle(self) -> int:
        try:
            shown = self.lab.run("h0", ["timeout", "10", "sinfo", "-h", "-N", "-p", "low", "-o", "%T"])
        except RuntimeError:
            return 0
        return shown.split().count("idle")

    def _why(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in self.lab.folder.glob("slurm*.log"))
