"""Sending what W&B's files and the journal hold to a W&B server: afterwards each step is there exactly once.

    repair   torn ends are cut off; rows that no file has are filled in from the journal, as another segment
    sync     repair; then each segment in the order of time, of it only those rows that the server lacks and that no
             later rewind undid. What the server has is asked of it before each; so a second sync, or one after a broken
             one, sends nothing twice.

`wandb sync` does the sending. It ends with 0 whatever happens, so its output is judged: a segment counts as sent when
W&B says so and names no error. It gives up: system metrics of a segment that was sent in part before.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import RunError
from pipeline.sections import Track
from pipeline.track import journal
from pipeline.track.wandb import account, segments, sink
from pipeline.track.wandb.segments import Segment

FILL_SECONDS = 600.0
SILENCES = 3  # questions of 10 s that the server leaves unanswered before a sync is given up
_BAD = re.compile(r"\bERROR\b|\b[Ff]ailed\b|[Ee]rror ")

Say = Callable[[str], None]


class Repaired(NamedTuple):
    """torn: {file: bytes that were cut off}.  filled: steps that were added from the journal."""

    torn: dict[Path, int]
    filled: list[int]


class Status(NamedTuple):
    """segments: of all W&B ids of the run.  missing: steps of the journal that the current id's files lack."""

    identity: str | None
    segments: list[Segment]
    missing: list[int]


def status(folder: Path) -> Status:
    """What lies in a run folder; writes nothing."""
    found = segments.find(folder)
    known = account.known(folder)
    have = segments.held(segment for segment in found if segment.identity == known)
    return Status(known, found, sink.missing(journal.read(folder / "journal.jsonl").records, have))


def repair(folder: Path, track: Track, name: str, config: Mapping[str, Any]) -> Repaired:
    """Cut torn ends off and fill in from the journal. The run must not be going on. Raises RunError when W&B fails."""
    before = status(folder)
    torn = {each.path: each.torn for each in before.segments if segments.cut(each) != each}
    if before.missing:
        wrong = sink.fill(track, folder, name, config, before.missing[-1], FILL_SECONDS)
        if wrong:
            raise RunError(f"{folder}: the journal's steps could not be written for W&B: {wrong}")
    return Repaired(torn, before.missing)


def send(folder: Path, track: Track, say: Say) -> int:
    """Send all segments; how many there was something to send of. Raises RunError when one could not be sent."""
    sent = 0
    everything = segments.find(folder)
    for identity in dict.fromkeys(segment.identity for segment in everything):
        mine = [segment for segment in everything if segment.identity == identity]
        try:
            for place, segment in enumerate(mine):
                sent += not segment.sent and _send(segment, mine[place + 1 :], track, say)
        except _CannotRewind:
            say("this server cannot rewind a run: of steps that were done again it gets those of the first time")
            sent += sum(_send(segment._replace(rewound=None), [], track, say) for segment in mine)
    return sent


class _CannotRewind(Exception):
    """The server refuses to forget steps."""


def _send(segment: Segment, later: list[Segment], track: Track, say: Say) -> bool:
    """Send what the server lacks of one segment; whether there was anything."""
    until = min((each.rewound for each in later if each.rewound is not None and each.steps), default=sys.maxsize)
    last = account.last_step(track.project, track.entity, segment.identity)
    rewinds = segment.rewound is not None and not segment.online
    wanted = [step for step in segment.steps if step <= until and (rewinds or step > last)]
    here = segment.path.parent.name
    if not wanted and not segment.begun.exists():
        if not segment.online:
            segment.mark.touch()
        return False
    say(f"{here}: sending " + (f"steps {wanted[0]} to {wanted[-1]}" if wanted else "what its tables show"))
    segment.begun.touch()
    with tempfile.TemporaryDirectory(prefix="millstream-sync-") as scratch:
        whole = wanted == segment.steps and not segment.online and not segment.sent and not segment.lost
        source = segment.path.parent if whole else segments.write_part(segment, wanted, rewinds, Path(scratch))
        _wandb_sync(source, segment, track, Path(scratch))
    segment.mark.touch()
    segment.begun.unlink()
    return True


def _wandb_sync(source: Path, segment: Segment, track: Track, scratch: Path) -> None:
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", "--include-synced", str(source)]
    # WANDB_SERVICE would let a W&B of this process do it, which goes on sending when the command has been given up.
    unwanted = ("WANDB_MODE", "WANDB_DIR", "WANDB_SERVICE")
    environment = {key: value for key, value in os.environ.items() if key not in unwanted}
    output = scratch / "output"
    with output.open("w") as file:
        process = subprocess.Popen(command, cwd=scratch, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            _wait(process, segment, track)
        finally:
            process.kill()
            process.wait()
            account.end_cores(process.pid)  # it outlives the command for a while, and would send into the next try
    text = output.read_text(errors="replace")
    wrong = [line.removeprefix("wandb: ") for line in text.splitlines() if _BAD.search(line)]
    if wrong or process.returncode or "Finished syncing" not in text:
        segment.mark.unlink(missing_ok=True)
        if any("failed to rewind" in line for line in wrong):
            raise _CannotRewind
        said = "; ".join(wrong) or text.strip() or "W&B said nothing"
        raise RunError(f"{segment.path.parent} was not sent: {said}. Nothing is lost: the same command again goes on.")


def _wait(process: subprocess.Popen[bytes], segment: Segment, track: Track) -> None:
    """Until the process ends; raises RunError when the server does not answer any more."""
    silences = 0
    while True:
        try:
            process.wait(account.ASK_SECONDS)
            return
        except subprocess.TimeoutExpired:
            pass
        try:
            account.last_step(track.project, track.entity, segment.identity)
            silences = 0
        except RunError as error:
            silences += 1
            if silences == SILENCES:
                raise RunError(f"{segment.path.parent} was sent in part at the most: {error}") from error
