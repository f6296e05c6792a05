"""A batch script of Slurm taken apart: its `#SBATCH` options, its assignments, the body that is the same for all.

What stands where neither Slurm nor bash reads it is a problem already here. A line that Slurm takes for a comment is
the costliest: the job runs, hours later, without what was asked for.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.problems import Problem

SCRIPT = "job.sbatch"
BODY = Path(__file__).with_name("slurm.sh")
VARIABLES = ("FOLDER", "JOB", "CONFIG", "CODE", "PYTHON", "SLOTS", "GPUS", "GRACE", "SECRETS", "STEP", "INSIDE")
LARGEST = 4 * 2**20  # bytes: Slurm's max_script_size
RENDER = "render it again with `millstream submit slurm CONFIG --render`"


@dataclass
class Script:
    """A batch script taken apart. options: name -> (line, value).  values: assignment -> (line, words)."""

    text: str
    configs: Mapping[str, Mapping[str, Any]]
    options: dict[str, tuple[int, str]] = field(default_factory=dict)
    values: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    body: int = 0  # line before the body
    found: list[Problem] = field(default_factory=list)

    def say(self, place: str, message: str, mend: str, line: int | None = None) -> None:
        if line is None and place.startswith("--"):
            line = self.options.get(place[2:], (None, ""))[0]
        self.found.append(Problem(f"{SCRIPT}: {place}" if place else SCRIPT, message, line, mend))

    def option(self, name: str) -> str | None:
        return self.options[name][1] if name in self.options else None

    def number(self, name: str) -> int | None:
        """A variable's value as a number, None where it is none (and has a problem of its own)."""
        words = self.values.get(name, (0, [""]))[1]
        return int(words[0]) if len(words) == 1 and words[0].isdigit() else None

    def word(self, name: str) -> str:
        return "".join(self.values.get(name, (0, [""]))[1][:1])


def take_apart(script: Script) -> None:
    """Directives, then assignments, then the body; and all that stands where Slurm or bash do not read it."""
    text, lines = script.text, script.text.split("\n")
    if "\r" in text:
        script.say("", "has line ends of DOS, which Slurm refuses", "save it with \\n alone", 1)
    if not lines[0].startswith("#!") or "bash" not in lines[0]:
        script.say("", "does not begin with a line for bash", "begin it with #!/usr/bin/env bash", 1)
    if len(text) > LARGEST:
        script.say("", f"is larger than Slurm takes, {LARGEST:,} bytes", RENDER)
    body = BODY.read_text()
    if text.endswith(body):
        script.body = text[: -len(body)].count("\n")
    else:
        script.say("", "the part below the assignments is not the one that is tested", RENDER)
        first = body.partition("\n")[0]
        script.body = lines.index(first) if first in lines else len(lines)
    begun = False
    for number, line in enumerate(lines[: script.body], 1):
        name, equals, given = line.partition("=")
        if re.match(r"\s*#+\s*SBATCH", line, re.IGNORECASE):
            _directive(script, number, line, begun)
        elif not line.strip() or line.startswith("#"):
            continue
        elif equals and name in VARIABLES:
            begun = True
            _assignment(script, number, name, given)
        else:
            begun = True
            script.say("", f"{line.strip()[:40]!r} has no place above the body", "take it out", number)


def _directive(script: Script, number: int, line: str, begun: bool) -> None:
    match = re.fullmatch(r"#SBATCH --([a-z][a-z-]*)(?:=(.*))?", line.rstrip())
    if not match:
        mend = "write #SBATCH --name=value from the beginning of the line"
        script.say("", f"{line.strip()!r} is a comment to Slurm, or not in the long form", mend, number)
    elif begun:
        script.say(f"--{match[1]}", "stands below a command, where Slurm reads no more", "move it up", number)
    elif match[1] in script.options:
        script.say(f"--{match[1]}", f"stands on line {script.options[match[1]][0]} too", "keep one", number)
    else:
        script.options[match[1]] = number, match[2] or ""


def _assignment(script: Script, number: int, name: str, given: str) -> None:
    """`$JOB`, `$FOLDER` and the member's number are all that may be put in; nothing may be run."""
    inner = given[1:-1] if given.startswith("(") and given.endswith(")") else given
    try:
        words = shlex.split(inner)
    except ValueError:
        script.say(name, "has a quote that is left open", RENDER, number)
        return
    plain = re.sub(r"'[^']*'", "", inner).replace("$JOB/", "").replace("$FOLDER", "")
    plain = plain.replace("config-$SLURM_ARRAY_TASK_ID.yaml", "")
    if re.search(r"[$`;&|<>*?(){}!~]", plain) or (inner == given and len(words) > 1):
        script.say(name, "holds what bash would run or expand", "put the value in single quotes", number)
    elif name in script.values:
        script.say(name, f"is set on line {script.values[name][0]} too", "keep one", number)
    else:
        script.values[name] = number, words
