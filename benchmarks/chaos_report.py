"""What came of a run under chaos, in words, tables and JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import report
from chaos_goodput import Bound, Costs, Fault, bound, costs, not_injected

from pipeline.track import goodput

if TYPE_CHECKING:
    from chaos import Part

TARGET = 0.95  # goodput, of the bound
EXPLAINED = """\
Useful are forward, backward and step of steps that count. The bound is what Young and Daly expect at best of a run with
these costs: it waits {save:.3f} s for a save; {undoing} faults in {up:.0f} s undo work, one every {between:.0f} s; each
of the {ending} faults that ended an attempt costs {notice:.1f} s until it is noticed and {restart:.1f} s until the next
useful step begins, the first start {start:.1f} s. At best it saves every {interval:.1f} s. It knows nothing of ranks
that wait for samples and for each other within a step (`data`), so the steps' whole time is held against it too."""


class Goodput:
    """Shares of all rank-seconds. useful: of useful ones.  steps: of all in steps that count."""

    def __init__(self, part: Part) -> None:
        self.spent = goodput.ledger(part.records)
        self.costs: Costs = costs(part.records, part.faults)
        self.bound: Bound = bound(self.costs)
        whole = sum(self.spent.values())
        self.useful = self.spent["useful"] / whole
        self.steps = (self.spent["useful"] + self.spent["data"]) / whole


def summary(part: Part) -> str:
    """A few lines for the terminal."""
    found = Goodput(part)
    lines = [f"{part.name}: {verdict(part)}", told(part), against(found)]
    return "\n".join(lines + [f"  {check.what:<16} {check.said}" for check in part.checks])


def verdict(part: Part) -> str:
    return "bitwise the same, no manual step, nothing left" if part.good else "FAILED"


def told(part: Part) -> str:
    codes = Counter(part.ends)
    ends = ", ".join(f"{count} x {code}" for code, count in sorted(codes.items()))
    return (
        f"{len(part.faults)} faults in {part.seconds / 60:.1f} minutes, {part.steps} steps; the command ended with "
        f"{ends} (negative: the signal that killed it); manual steps: {part.manual_steps}; left behind: "
        f"{', '.join(part.left) or 'nothing'}; attempts that failed without a fault of ours: "
        f"{'; '.join(not_injected(part.records, part.faults)) or 'none'}"
    )


def against(found: Goodput) -> str:
    best = found.bound.share or math.inf  # a run that never came to its steps
    useful, steps = found.useful / best, found.steps / best
    met = "met" if useful >= TARGET else "MISSED"
    return (
        f"useful {found.useful:.1%} of all time, bound {found.bound.share:.1%}: {useful:.3f} of it ({met}, "
        f">= {TARGET}); the steps' whole time {found.steps:.1%}: {steps:.3f}"
    )


def facts(parts: Sequence[Part], mounts: bool) -> list[str]:
    """What stands above the tables."""
    lines = [
        "Two workers under a Ray of their own; a Llama of 1 million parameters on rows of 128 tokens of Python's own "
        "source text; fp32, AdamW, ZeRO-2, checkpoint.every: auto",
        "W&B's server is away all the time (track.wandb: online, nobody listens)",
        *(f"{part.name}: {told(part)}" for part in parts),
    ]
    return lines if mounts else [*lines, "The disk was never full: nothing may be mounted here"]


def body(parts: Sequence[Part]) -> str:
    return "\n\n".join(f"## {part.name.capitalize()} faults\n\n{section(part)}" for part in parts)


def section(part: Part) -> str:
    """Everything of one part."""
    found = Goodput(part)
    undisturbed = f"Beside the run in peace, {part.steps} steps in {part.peace:.0f} s: {verdict(part)}."
    skipped = [record for record in part.records if record["kind"] == "skip"]
    named = f" Steps skipped for a planted sample: {len({record['step'] for record in skipped})}." if skipped else ""
    checks = report.table(["compared", "outcome"], [[check.what, check.said] for check in part.checks])
    numbers = found.costs._asdict() | {"up": found.costs.up, "interval": found.bound.interval}
    numbers["between"] = found.costs.up / max(found.costs.undoing, 1)
    explained = EXPLAINED.format(**numbers)
    return "\n\n".join(
        [
            undisturbed + named,
            checks,
            f"Goodput: {against(found)}.",
            ledger(found.spent),
            explained,
            kinds(part.faults),
            every(part),
        ]
    )


def ledger(spent: dict[str, float]) -> str:
    whole = sum(spent.values())
    rows = [[kind, f"{seconds:.1f}", f"{seconds / whole:.1%}"] for kind, seconds in spent.items()]
    return report.table(["ledger", "rank-seconds", "share"], [*rows, ["all", f"{whole:.1f}", "100.0%"]])


def kinds(faults: Sequence[Fault]) -> str:
    """By kind: how often, and medians."""
    rows = []
    for kind in dict.fromkeys(fault.kind for fault in faults):
        own = [fault for fault in faults if fault.kind == kind]
        notice, useful = ([getattr(f, name) for f in own] for name in ("seconds_to_notice", "seconds_to_useful"))
        rows.append([kind, str(len(own)), spread(notice), spread(useful)])
    return report.table(["fault", "times", "noticed after, s, median (range)", "next useful step after, s"], rows)


def spread(seconds: Sequence[float | None]) -> str:
    known = [each for each in seconds if each is not None]
    return f"{median(known):.1f} ({min(known):.1f} to {max(known):.1f})" if known else "-"


def every(part: Part) -> str:
    """A row a fault."""
    begin = part.records[0]["time"]
    rows = []
    for fault in part.faults:
        after = [seconds(fault.seconds_to_notice), seconds(fault.seconds_to_useful)]
        rows.append([f"{fault.at - begin:.0f}", fault.kind, str(fault.attempt), str(fault.step), *after])
    return report.table(["at, s", "fault", "attempt", "step", "noticed after, s", "next useful step after, s"], rows)


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def to_json(part: Part) -> dict[str, Any]:
    """For other programs. JSON has no infinity: there it is null."""
    found = Goodput(part)
    interval = found.bound.interval
    return {
        "part": part.name,
        "steps": part.steps,
        "checks": [check.to_json() for check in part.checks],
        "manual_steps": part.manual_steps,
        "left": part.left,
        "exit_codes": part.ends,
        "skipped": len({record["step"] for record in part.records if record["kind"] == "skip"}),
        "faults": [
            {"kind": f.kind, "step": f.step, "noticed": f.seconds_to_notice, "useful": f.seconds_to_useful}
            for f in part.faults
        ],
        "ledger": found.spent,
        "wall": found.costs.wall,
        "useful": found.useful,
        "bound": {"share": found.bound.share, "interval": interval if math.isfinite(interval) else None},
    }
