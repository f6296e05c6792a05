"""What the journal's records mean: every kind, and every key of it. Version 1; `journal.VERSION` stands in each line.

Each line has v (this version), attempt, seq (number of the line), time (seconds since the epoch, for people), kind, and
crc; then what stands below. A key ending in `?` may be absent. Steps are counted from 0, so that "steps done" is one
more than the last one's number. A new kind or key keeps the version; a key that changes its meaning raises it. A
reader passes over kinds that it does not know.

What it gives up: keys are checked by tests of the project's own runs, not each time that a record is written.
"""

from __future__ import annotations

from collections.abc import Mapping

HEAD: Mapping[str, str] = {
    "v": "version of this schema",
    "attempt": "number of the attempt that wrote it",
    "seq": "number of the line in the file, from 1",
    "time": "seconds since the epoch when it was written",
    "kind": "one of the keys of KINDS",
}

KINDS: Mapping[str, Mapping[str, str]] = {
    "attempt": {
        "workers": "training processes; 0: one, without Ray",
        "restarts": "failures before it in this command",
        "relaunch": "whether this command had an attempt before it",
        "code": "millstream: version; commit: of git, or null; dirty: whether tracked files differ from it, or null",
    },
    "start": {
        "step": "0",
        "notes": "lines for people",
        "workers": "world size",
        "parameters": "of the network",
        "data": "the data sets in a few words",
        "window_bytes": "that one worker shuffles in",
    },
    "restore": {
        "step": "steps done by the checkpoint that is gone on from",
        "notes": "lines for people: what differs from before",
        "workers": "world size",
        "parameters": "of the network",
        "data": "the data sets in a few words",
        "window_bytes": "that one worker shuffles in",
    },
    "step": {
        "step": "its number",
        "metrics": "train/*: means over the batch; optim/lr; time/step_seconds; data/wait_seconds: of the slowest; "
        "throughput/samples_per_second: over all ranks, also <unit>_per_second and mfu where they are known; "
        "memory/host_gb, memory/gpu_gb: of the worker that holds most; null: was not finite",
        "samples": "digest of which samples stood in which rows, the same at every world size",
    },
    "evaluation": {
        "step": "steps done",
        "metrics": "eval/<set>/<name>",
        "seconds": "that it took, samples to look at included",
    },
    "samples": {
        "step": "steps done",
        "sets": "set -> the first held-out samples, each name -> text, number, or {picture: file below samples/}",
    },
    "node": {
        "host": "its name",
        "values": "cpu, memory, disk: share in use; memory_bytes: in use; disk_free_bytes: where the run lies; "
        "gpu<i>, gpu<i>_memory: share in use",
    },
    "save": {
        "step": "steps done",
        "path": "folder below checkpoints/",
        "metrics": "checkpoint/save_seconds, checkpoint/blocked_seconds: training waited; checkpoint/bytes",
        "removed": "folders of checkpoints that were deleted",
    },
    "save_failed": {"step": "steps done", "message": "why"},
    "cadence": {
        "step": "steps done",
        "every": "steps between checkpoints from now on",
        "save_seconds": "that a save makes training wait",
        "step_seconds": "of a step",
    },
    "upload": {"step": "of the checkpoint", "url": "second home", "bytes": "sent", "seconds": "that it took"},
    "upload_failed": {"step": "of the checkpoint", "message": "why"},
    "upload_pending": {"steps": "of checkpoints that were not sent", "message": "how to send them"},
    "skip": {
        "step": "that was not applied",
        "rank": "that says so",
        "reason": "in words",
        "samples?": "numbers of the samples of this rank",
        "loss_scale?": "fp16's, now",
        "value?": "the loss, when it jumped",
        "limit?": "above which a loss jumps",
    },
    "spike": {
        "step": "that jumps",
        "rank": "that says so",
        "reason": "in words",
        "value": "loss or gradient norm",
        "limit": "above which a value jumps",
        "samples?": "numbers of the samples of this rank",
    },
    "left_out": {"step": "first that is left out", "last": "last"},
    "rollback": {
        "step": "first that is left out; what was recorded of it and later ones is void",
        "last": "last that is left out",
        "from_step": "at which it was decided",
        "to_step": "steps done by the checkpoint that is gone back to",
        "number": "how often, with this time",
        "message": "in words",
    },
    "pace": {
        "step": "last of a window",
        "steps": "in it",
        "seconds": "of a step, median",
        "compute": "by rank: seconds before it first waits for others, median",
        "data": "by rank: seconds waited for samples, mean",
        "memory": "by rank: bytes that it holds, on its host and at most on its GPU",
    },
    "slow": {
        "step": "at which it was found",
        "what": "rank, host, shard, or link: to a URL",
        "message": "in words",
        "by?": "compute or data",
        "ranks?": "that are behind",
        "host?": "where they run",
        "since?": "step",
        "rank?": "that reads it",
        "shard?": "its path",
        "rate?": "MB/s",
        "others?": "MB/s of the other shards",
    },
    "health": {
        "step": "its number",
        "metrics": "health/<layer>/<what>, see health.py",
        "seconds": "that the look took",
    },
    "recompute": {"step": "that is computed once more", "reason": "in words"},
    "substitute": {
        "step": "at which it was decided",
        "source": "data set",
        "number": "of the bad sample",
        "substitute": "number of the sample that stands for it",
        "reason": "what is wrong with it",
    },
    "time": {"ranks": "rank -> phase -> seconds since its worker began; silent: since it was last heard"},
    "stall": {
        "rank": "that does not move",
        "host": "where it runs",
        "pid": "its process",
        "phase": "what it was doing",
        "step": "of what",
        "seconds": "in that phase",
        "limit": "that is allowed",
        "silent": "whether nothing was heard of it",
        "message": "in words",
        "stacks": "rank -> Python stack",
    },
    "resize": {"message": "why the workers are asked to leave"},
    "error": {
        "rank": "that failed",
        "phase": "in which",
        "step": "of which step",
        "type": "class of the exception",
        "message": "its text",
        "traceback": "its traceback",
        "final": "whether another attempt is of no use",
        "exit_code": "for the command",
    },
    "failure": {
        "cause": "lost, stall, start, memory ... or the class of an exception",
        "message": "what ended the attempt, and what comes after",
        "exit_code": "null: another attempt",
    },
    "warning": {"message": "in words", "step?": "at which it was found", "layer?": "of the network"},
    "end": {"reason": "done, stopped or rollback", "step": "steps done"},
}
