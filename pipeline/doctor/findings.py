"""What was found: errors, by which a run would fail, warnings, by which it may be worth less, and notes.

The words are those of problems.Problem: place, message, line, a way to mend it. Errors that other parts raise as
`key: what; how to mend it` become one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.config import Config
from pipeline.problems import Problem
from pipeline.yaml_file import Source

Level = Literal["error", "warning", "note"]
PLACE = re.compile(r"(?P<place>[a-z_]+(?:\.[\w-]+)*):? +(?P<rest>.*)", re.DOTALL)


@dataclass(frozen=True)
class Finding:
    """One thing that was found, by which part of the examination."""

    level: Level
    part: str
    problem: Problem


@dataclass
class Report:
    """All that was found. figures: of the run, for programs.  seconds: how long each part took.  source: the file."""

    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    source: Source | None = None

    def of(self, *levels: Level) -> list[Finding]:
        """Those of these levels, by level and then by line."""
        chosen = [finding for finding in self.findings if finding.level in levels]
        return sorted(chosen, key=lambda finding: (levels.index(finding.level), finding.problem.line or 10**9))

    @property
    def fails(self) -> bool:
        """Whether something would."""
        return any(finding.level == "error" for finding in self.findings)

    def add(self, level: Level, part: str, place: str, message: str, mend: str | None = None) -> None:
        """Note a finding, with the line of its key in the file."""
        self.put(level, part, Problem(place, message, suggestion=mend))

    def put(self, level: Level, part: str, problem: Problem) -> None:
        """Note a problem that another part has told, once."""
        located = self.source.locate(problem) if self.source else problem
        if all(known.problem != located for known in self.findings):
            self.findings.append(Finding(level, part, located))

    def refuse(self, part: str, error: Exception, place: str = "", level: Level = "error") -> None:
        """Note an error that was raised: its own place if it begins with one, else `place`."""
        self.put(level, part, told(str(error), place))

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of a block to a part."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began


def told(text: str, place: str) -> Problem:
    """`key: what; how to mend it` as a problem; a text without a key of a configuration is about `place`."""
    match = PLACE.fullmatch(text)
    if match and match["place"].partition(".")[0] in Config.model_fields and ("." in match["place"] or ": " in text):
        place, text = match["place"], match["rest"]
    message, _, mend = text.rpartition("; ")
    return Problem(place, message or text, suggestion=mend if message else None)
