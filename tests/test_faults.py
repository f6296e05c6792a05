"""The table of faults is true: 30 rows, and every test that it names is there."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAULTS = 31


def rows() -> list[list[str]]:
    lines = (Path(__file__).parent / "FAULTS.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return table[1:]


def test_every_fault_has_a_row() -> None:
    assert [row[0] for row in rows()] == [str(number) for number in range(1, FAULTS + 1)]
    assert all(len(row) == 5 for row in rows())


def test_every_test_that_is_named_is_there() -> None:
    named = [name for row in rows() for name in row[4].split() if name != "-"]
    assert len(named) > FAULTS
    for name in named:
        file, _, function = name.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, name


def test_a_row_without_a_test_says_why() -> None:
    for number, _, seen, _, tests in rows():
        assert tests != "-" or "not " in seen or "no JIT" in seen, number
