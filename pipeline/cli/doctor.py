"""`millstream doctor`: what would fail, before it is paid for. See __init__.py."""

from __future__ import annotations

import json
import sys
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pipeline.doctor.findings import Report

EXAMPLE = """Example: millstream doctor configs/digits.yaml

Example: millstream doctor configs/digits.yaml --target ray --world-size 16 --device H100"""
STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
FAILS = 78


class Kind(Enum):
    """Where a run goes."""

    local = "local"
    ray = "ray"
    slurm = "slurm"
    k8s = "k8s"


def doctor(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file that describes the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys set for this time.")] = None,
    target: Annotated[
        Kind, typer.Option(help="Where it will run; what `submit` would send there is read over.")
    ] = Kind.local,
    world_size: Annotated[int | None, typer.Option(min=1, help="Workers, instead of cluster.workers.")] = None,
    device: Annotated[
        str | None, typer.Option(help="GPU of the target, such as H100 or A100-40GB; its memory counts.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Shared folder at the target, as for submit.")] = None,
    image: Annotated[str | None, typer.Option(help="Container image, as for submit.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help="An option of the target's own.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the real step of a small network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
) -> None:
    """Say everything that would fail, not fit, starve or never learn; no cluster, no GPU.

    Exit code 78 when something would fail, 0 otherwise.
    """
    from pipeline.doctor.examine import Target, examine

    began = time.perf_counter()
    options = {name: value for name, _, value in (text.partition("=") for text in option or ())}
    where = Target(target.value, world_size, device, folder, image, None, options)
    report = examine(config, overrides or (), where, quick=quick, progress=_progress(as_json))
    seconds = time.perf_counter() - began
    if as_json:
        typer.echo(json.dumps(_plain(report, config, seconds), default=str))
    else:
        _show(report, config, seconds)
    raise typer.Exit(FAILS if report.fails else 0)


def _progress(silent: bool) -> Any:
    """Says which part is under way, on a terminal."""

    def say(part: str) -> None:
        if not silent and sys.stderr.isatty():
            sys.stderr.write(f"\r\033[K{part} ...")
            sys.stderr.flush()

    return say


def _plain(report: Report, config: Path, seconds: float) -> dict[str, Any]:
    """The report made of what JSON has."""
    findings = [
        {
            "level": finding.level,
            "part": finding.part,
            "place": finding.problem.place,
            "file": str(config),
            "line": finding.problem.line,
            "message": finding.problem.message,
            "mend": finding.problem.suggestion,
        }
        for finding in report.of("error", "warning", "note")
    ]
    parts = {part: round(each, 3) for part, each in report.seconds.items()}
    return {
        "fails": report.fails,
        "findings": findings,
        "figures": report.figures,
        "seconds": {**parts, "all": round(seconds, 3)},
    }


def _show(report: Report, config: Path, seconds: float) -> None:
    from pipeline.cli import terminal

    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    for finding in report.of("error", "warning", "note"):
        problem = finding.problem
        line = f":{problem.line}" if problem.line else ""
        terminal.say(f"{finding.level}  {config}{line}  {problem.place}".rstrip(), STYLES[finding.level])
        terminal.say(f"   {problem.message}")
        if problem.suggestion:
            terminal.say(f"   -> {problem.suggestion}")
    for text in _facts(report.figures):
        terminal.say(text, "dim")
    errors, warnings = len(report.of("error")), len(report.of("warning"))
    counts = [
        f"{count} {word}{'s' if count > 1 else ''}"
        for count, word in ((errors, "error"), (warnings, "warning"))
        if count
    ]
    verdict = f"would fail: {', '.join(counts)}" if errors else f"good to go{', ' + counts[0] if counts else ''}"
    terminal.say(f"{verdict} ({seconds:.1f} s)", "bold red" if errors else "bold green")


def _facts(figures: dict[str, Any]) -> list[str]:
    """What is well to know of a run, a line each."""
    facts = []
    for place, epochs in figures.get("epochs", {}).items():
        facts.append(f"{place}: {figures[place]['samples']:,} samples, {epochs:,.2f} epochs")
    if network := figures.get("network"):
        facts.append(f"network: {network['kind']}, {network['parameters'] / 1e6:,.2f} million parameters")
    if memory := figures.get("memory"):
        about = "" if memory["activations_known"] else ", activations not counted"
        facts.append(f"memory: about {memory['total'] / 1e9:,.2f} GB a worker{about}")
    if saves := figures.get("checkpoints"):
        size, free = saves["bytes"] * saves["kept"] / 1e9, saves["free_bytes"] / 1e9
        facts.append(f"checkpoints: {saves['kept']} at a time, {size:,.2f} GB of {free:,.1f} GB free")
    if names := figures.get("secrets"):
        facts.append(f"secrets here, by name: {', '.join(names)}")
    return facts
