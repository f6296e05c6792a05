"""What the README and the guides say is true: every path of the tree exists and is complete, every command is one that
there is.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests import small_data
from tests.test_train import RESNET

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMAND = re.compile(r"^ {4,}((?:millstream|launch/)\S*.*?)(?:\s+#.*)?$", re.MULTILINE)
COMMANDS = COMMAND.findall(README)
GUIDES = [ROOT / "launch/README.md", ROOT / "k8s/README.md"]


def tree() -> set[str]:
    """Paths of the README's tree, folders with a slash at the end."""
    paths, folder = set(), ""
    for line in README.splitlines():
        if match := re.match(r"^( {4}| {6})([\w.-]+/?) {2,}\S|^( {4})(pipeline/)$", line):
            name = match[2] or match[4]
            nested = match[1] == " " * 6
            folder = folder if nested else name
            paths.add(folder + name if nested else name)
    return paths


def test_the_tree_is_that_of_the_repository() -> None:
    told = tree()
    assert len(told) > 25
    assert [path for path in sorted(told) if not (ROOT / path).exists()] == []
    package = ROOT / "pipeline"
    there = {f"pipeline/{path.name}{'/' if path.is_dir() else ''}" for path in package.iterdir()}
    there -= {"pipeline/__init__.py", "pipeline/__main__.py", "pipeline/__pycache__/"}
    assert sorted(there - told) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command: str) -> None:
    """Commands and their options are known to `--help`; scripts are executable."""
    words = command.split()
    if words[0].startswith("launch/"):
        assert (ROOT / words[0]).stat().st_mode & 0o111
        return
    assert_known(subcommand(words), {command})


def subcommand(words: list[str]) -> tuple[str, ...]:
    return tuple(word for word in words[1:3] if re.fullmatch(r"[a-z][a-z0-9]*(-[a-z]+)*", word))


def assert_known(path: tuple[str, ...], commands: set[str]) -> None:
    """`--help` of a subcommand shows every option that the commands give it."""
    shown = subprocess.run(
        [sys.executable, "-m", "pipeline", *path, "--help"], capture_output=True, text=True, check=True
    )
    for option in re.findall(r"--[a-z-]+", " ".join(commands)):
        assert option in shown.stdout, option


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.parent.name)
def test_commands_of_the_guides_exist(guide: Path) -> None:
    by_path: dict[tuple[str, ...], set[str]] = {}
    for command in COMMAND.findall(guide.read_text().replace("\\\n", " ")):
        words = command.split()
        if words[0].startswith("launch/"):
            assert (ROOT / words[0]).stat().st_mode & 0o111
        else:
            by_path.setdefault(subcommand(words), set()).add(command)
    assert len(by_path) >= 6
    for path, commands in by_path.items():
        assert_known(path, commands)


def test_the_python_example_runs(tmp_path: Path) -> None:
    """The example as it stands, with a toy configuration in place of the shipped one."""
    example = re.search(r"From Python:\n\n((?: {4}.*\n)+)", README)
    assert example is not None
    pictures = small_data.images(tmp_path / "pictures")
    small_data.config(tmp_path / "toy.yaml", RESNET, pictures)
    code = textwrap.dedent(example[1])
    shipped, toy = '"configs/digits.yaml", ["steps=100"]', '"toy.yaml", ["steps=4", "cluster.workers=0"]'
    assert shipped in code
    code = code.replace(shipped, toy)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "done: step 4 of 4" in done.stdout and done.stdout.rstrip().splitlines()[-1].startswith("([0, 1, 2, 3], [")
    assert done.stderr == ""
