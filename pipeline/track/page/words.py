"""What the page says in words: of one record of the journal, of a length of time, of a number.

A kind of record that is not known here is told by its message, else by its plain fields, so a new kind needs no change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BAD = ("failure", "error", "stall", "save_failed")
WARN = ("warning", "skip", "spike", "rollback", "substitute", "recompute", "slow", "resize")
WARN += ("upload_failed", "upload_pending")
TONES = {**{kind: "bad" for kind in BAD}, **{kind: "warn" for kind in WARN}}
_HEAD = ("v", "attempt", "seq", "time", "kind", "step", "crc", "metrics", "traceback", "stacks", "exit_code")


def event(record: Mapping[str, Any]) -> tuple[str, str]:
    """(one line, the rest of it: traceback, stacks or further lines) for a rare record."""
    line, _, more = _line(record).strip().partition("\n")
    stacks = record.get("stacks") or {}
    parts = [more, str(record.get("traceback") or ""), *(f"worker {rank}\n{stacks[rank]}" for rank in stacks)]
    return line, "\n\n".join(part.strip() for part in parts if part.strip())


def _line(record: Mapping[str, Any]) -> str:
    match record:
        case {"kind": "attempt", "attempt": number, "workers": workers}:
            who = "one plain process" if workers == 0 else f"{workers} worker{'s' * (workers > 1)}"
            return f"attempt {number}: {who}"
        case {"kind": "start", "parameters": int(parameters)}:
            return f"training from step 0: {parameters:,} parameters{_notes(record)}"
        case {"kind": "restore", "step": step}:
            return f"going on from step {step}{_notes(record)}"
        case {"kind": "save", "metrics": {"checkpoint/bytes": bytes_, "checkpoint/save_seconds": seconds}}:
            return f"checkpoint, {bytes_ / 1e6:,.1f} MB in {seconds:.2f} s"
        case {"kind": "end", "reason": reason, "step": step}:
            return f"{reason} after {step} steps"
        case {"kind": "error", "rank": rank, "type": type_, "message": message}:
            return f"worker {rank}, {record.get('phase')} of step {record.get('step')}: {type_}: {message}"
    return str(record.get("message") or record.get("reason") or _fields(record))


def _notes(record: Mapping[str, Any]) -> str:
    return "".join(f"; {note}" for note in record.get("notes") or ())


def _fields(record: Mapping[str, Any]) -> str:
    plain = (bool, int, float, str)
    told = [f"{key} {value}" for key, value in record.items() if key not in _HEAD and isinstance(value, plain)]
    return ", ".join(told) or str(record["kind"])


def duration(seconds: float) -> str:
    """ "0.4 s", "37 s", "12 min 3 s", "3 h 20 min", "2 d 4 h"."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    for name, size, below, smaller in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {name}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"


def number(value: float) -> str:
    """Four digits that count: "0.0123", "1.235e-05", "12,346"."""
    return f"{value:,.0f}" if 10_000 <= abs(value) < 1e9 else f"{value:.4g}"
