"""A shard that is read far more slowly than the others of the run is found, and named with the file system it is on.

How long the bytes of a shard take when they are first touched (they are mapped, so that is when the disk or the server
is waited for) comes with every micro batch, from threads and decoder processes alike. Nothing is read in another order
for it. What it gives up: with `data.check_digests: false` the bytes are first touched while they are decoded, and that
is not measured; shards that are all equally slow are none of them slow: the share of data wait tells of those.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.data.remote.cache_policy import IN_FLIGHT

if TYPE_CHECKING:
    from pipeline.data.remote.shards import Remote

SLOWER = 10.0  # times the others' seconds for a byte
LEAST_SECONDS = 1.0  # that were spent on it, and waited for data, before it is named
LEAST_READS = 5  # micro batches that read from it
LINK_SECONDS, LINK_SHARE = 30.0, 0.3  # a link is slow when training waits for it this share of so many seconds
MOST_NAMED = 3  # so that a slow server is not named once for each of its shards

Reads = dict[str, list[float]]
"""Path of a shard, or "" for several together -> bytes that were read of it, and the seconds that took."""


class SlowShard(NamedTuple):
    """What is known of one: MB/s of its own, and of the others."""

    shard: str
    rate: float
    others: float
    message: str


class SlowShards:
    """Keeps how fast each shard was read."""

    def __init__(self) -> None:
        self._read: Reads = {}
        self._times: dict[str, int] = {}
        self._waited = 0.0
        self._named: set[str] = set()

    def note(self, reads: Reads, waited: float) -> None:
        """What micro batches have read, and the seconds that somebody waited for them."""
        self._waited += waited
        for shard, (count, seconds) in reads.items():
            read = self._read.setdefault(shard, [0, 0.0])
            read[0] += count
            read[1] += seconds
            self._times[shard] = self._times.get(shard, 0) + 1

    def found(self, of: Iterable[str]) -> list[SlowShard]:
        """Those of these shards that are slow, and have not been told yet."""
        if self._waited < LEAST_SECONDS or len(self._named) >= MOST_NAMED:
            return []
        found = []
        for shard in set(of) - self._named - {""}:
            count, seconds = self._read[shard]
            others = [read for name, read in self._read.items() if name != shard and name not in self._named]
            rest, rest_seconds = sum(count for count, _ in others), sum(seconds for _, seconds in others)
            if not (rest and rest_seconds) or seconds < LEAST_SECONDS or self._times[shard] < LEAST_READS:
                continue
            rate, usual = count / seconds / 1e6, rest / rest_seconds / 1e6
            if rate * SLOWER <= usual and len(self._named) < MOST_NAMED:
                self._named.add(shard)
                said = (
                    f"shard {shard} on {file_system(shard)} is read at {rate:.2g} MB/s, the others at {usual:.2g} MB/s"
                )
                found.append(SlowShard(shard, rate, usual, f"{said}: training waits for it. Copy it to a faster disk"))
        return found


class SlowLink:
    """What comes from one URL, and how long training waits for it."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self._began, self._fetched, self._waited, self._told = time.monotonic(), remote.fetched, 0.0, False

    def note(self, waited: float) -> None:
        """A step was waited for by so many seconds."""
        self._waited += waited

    def found(self) -> str | None:
        """That training waits for this URL, when it has done so for long; told once."""
        seconds = time.monotonic() - self._began
        if seconds < LINK_SECONDS or self._told:
            return None
        fetched, waited = self.remote.fetched - self._fetched, self._waited
        self._began, self._fetched, self._waited = time.monotonic(), self.remote.fetched, 0.0
        if waited < LINK_SHARE * seconds or not fetched:
            return None
        self._told = True
        said = f"{self.remote.place} comes at {fetched / seconds / 1e6:.3g} MB/s, {IN_FLIGHT} requests at a time"
        return (
            f"{said}: training waits for it {waited / seconds:.0%} of the time. Put the shards nearer, use fewer bytes "
            "for a sample, or more nodes: each has its own link"
        )


def file_system(path: Path | str) -> str:
    """What holds a path, in the kernel's words: "nfs4 at /data (server:/export)"; see proc_pid_mounts(5)."""
    if "://" in str(path):
        return str(path).partition("://")[0] + "://" + str(path).partition("://")[2].partition("/")[0]
    real = Path(path).resolve()
    best = ("", "an unknown file system")
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return best[1]
    for line in lines:
        source, point, kind = (word.replace("\\040", " ") for word in line.split()[:3])
        if real.is_relative_to(point) and len(point) >= len(best[0]):  # of two at one place the later one counts
            best = point, f"{kind} at {point} ({source})"
    return best[1]
