"""The nodes of a Ray cluster as a run sees them: how many workers they can hold, which of them are about to leave.

Ray notices a dead node after 20 to 55 s (its health check: period, timeout, five misses). A run that has just lost a
worker asks sooner, by opening a connection to the node's raylet. What it gives up: a node that others use as well is
counted whole, since Ray knows what is taken but not for how long.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import NamedTuple

from pipeline.sections import Cluster

ANSWER_SECONDS = 2.0  # that a raylet has to accept a connection


class Node(NamedTuple):
    """slots: workers it can hold.  place: address and port of its raylet."""

    id: str
    slots: int
    place: tuple[str, int]


def usable(cluster: Cluster, use_gpu: bool) -> list[Node]:
    """The nodes that are alive by Ray's knowledge and not about to leave, with what they can hold."""
    import ray

    leaving = draining()
    found = []
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in leaving:
            has = node["Resources"]
            slots = int(has.get("CPU", 0) // cluster.threads_per_worker)
            slots = min(slots, int(has.get("GPU", 0))) if use_gpu else slots
            found.append(Node(node["NodeID"], slots, (node["NodeManagerAddress"], node["NodeManagerPort"])))
    return found


def draining() -> set[str]:
    """Nodes that were told to leave: a spot notice, the autoscaler, SIGTERM to `ray start`, or `ray drain-node`."""
    import ray._private.state  # where Ray Train's own preemption watcher asks (2.60)

    return set(ray._private.state.state.get_draining_nodes() or {})


def capacity(cluster: Cluster, use_gpu: bool, *, asking: bool = False) -> int:
    """Workers that the cluster can hold now. `asking`: only nodes that answer at this moment count."""
    found = usable(cluster, use_gpu)
    return sum(node.slots for node in found if not asking or _answers(node))


def _answers(node: Node) -> bool:
    with suppress(OSError), socket.create_connection(node.place, timeout=ANSWER_SECONDS):
        return True
    return False
