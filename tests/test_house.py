"""The rules of the house: imports point down, each library stays behind its fence, files and functions stay small."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline
from pipeline import task_file

ROOT = Path(pipeline.__file__).parents[1]
PACKAGE = ROOT / "pipeline"

# From the bottom up. A module imports from its own layer and from those before it. The longest name that fits counts.
LAYERS = [
    [
        *("errors", "whole_file", "object_store", "http_store", "s3_store", "look", "problems", "yaml_file"),
        *("rules", "store_rules", "task_file", "sections", "config"),
    ],
    ["models", "data"],
    ["tasks"],
    [
        "session",
        "randomness",
        "batch_norm",
        "initial",
        "prepare",
        "muon",
        "optim",
        "loss_scale",
        "reduction",
        "zero",
        "engine",
        "ema",
        "evaluate",
        "show",
        "sample",
        "node",
        "guard",
        "spikes",
        "replicas",
        "pace",
        "throughput",
        "jit",
        "checkpoint",
        "track",
        "run",
        "same_run",
    ],
    ["learner"],
    ["saving", "health"],
    ["train"],
    ["cluster", "submit", "doctor", "starter", "track.page", "verify_resume"],
    ["cli", "__init__", "__main__"],
]
FENCES = {
    "ray": ["cluster", "submit"],
    "deepspeed": ["engine", "zero", "muon", "checkpoint.shards", "checkpoint.layouts"],
    "wandb": ["track.wandb"],
    "webdataset": ["data"],
}
WITHOUT_TORCH = ["config", "sections", "problems", "yaml_file", "rules", "task_file", "run", "data.index", "track"]
WITHOUT_TORCH += ["object_store", "http_store", "s3_store", "store_rules"]
WITHOUT_TORCH += [f"data.remote.{name}" for name in ("shards", "cache", "cache_policy")]
WITHOUT_TORCH += ["data.order", "data.draws", "data.chains", "data.mixture", "data.reader", "data.samples"]
WITHOUT_TORCH += [
    f"checkpoint.{name}" for name in ("format", "manifest", "disk", "rollbacks", "retention", "remote", "uploads")
]
HEAVY = ["torch", "ray", "deepspeed", "transformers", "wandb", "webdataset"]
LINES_PER_FILE, LINES_PER_FUNCTION, LINES_OF_THE_LOOP = 300, 60, 120


def name_of(path: Path) -> str:
    """pipeline/data/order.py -> data.order, pipeline/data/__init__.py -> data."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
SOURCES = [path for folder in ("pipeline", "tests", "benchmarks", "launch") for path in (ROOT / folder).rglob("*.py")]


def under(name: str, places: list[str]) -> list[str]:
    return [place for place in places if name == place or name.startswith(place + ".")]


def layer(name: str) -> int:
    found = [(len(place), number) for number, places in enumerate(LAYERS) for place in under(name, places)]
    assert found, f"pipeline.{name} stands in no layer; say in this test where it belongs"
    return max(found)[1]


def imports(code: str, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything that a module of `package` imports, wherever in the module."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, node.module] if node.module else base
            yield from ((node.lineno, ".".join([*module, alias.name])) for alias in node.names)


def all_imports() -> Iterator[tuple[str, str, str]]:
    """(module, place, full name) of every import in the package."""
    for name, path in MODULES.items():
        package = ["pipeline", *path.relative_to(PACKAGE).parts[:-1]]
        for line, full in imports(path.read_text(), package):
            yield name, f"{path.relative_to(ROOT)}:{line}", full


def own_module(full: str) -> str | None:
    """The module of ours in an imported name: pipeline.data.order.Order -> data.order."""
    parts = full.split(".")[1:] if full.split(".")[0] == "pipeline" else []
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or None


def test_imports_point_down() -> None:
    wrong = [
        f"{place} imports pipeline.{own}, which stands above it"
        for name, place, full in all_imports()
        if (own := own_module(full)) and layer(own) > layer(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_each_library_stays_behind_its_fence() -> None:
    wrong = []
    for name, place, full in all_imports():
        library = full.split(".")[0]
        if library in FENCES and not under(name, FENCES[library]):
            wrong.append(f"{place} imports {full}; only {', '.join(FENCES[library])} may")
        if library == "torch" and under(name, WITHOUT_TORCH):
            wrong.append(f"{place} imports {full}; this module does without torch")
    assert not wrong, "\n".join(wrong)


def test_no_form_of_import_escapes() -> None:
    code = """
import ray.train
from ..config import Config
from . import order
def later():
    from pipeline import cli
"""
    found = [full for _, full in imports(code, ["pipeline", "data"])]
    assert sorted(found) == ["pipeline.cli", "pipeline.config.Config", "pipeline.data.order", "ray.train"]
    assert [own_module(full) for full in sorted(found)] == ["cli", "config", "data.order", None]


@pytest.mark.parametrize(
    "module", ["pipeline", "pipeline.cli", "pipeline.config", "pipeline.run", "pipeline.cluster.driver"]
)
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_task_files_load_nothing_heavy() -> None:
    modules = ", ".join(f"pipeline.tasks.{name}" for name in task_file.names())
    assert modules, "there are no tasks"
    code = f"import sys, {modules}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_files_and_functions_stay_small() -> None:
    long = []
    for path in SOURCES:
        place, code = path.relative_to(ROOT), path.read_text()
        if code.count("\n") > LINES_PER_FILE:
            long.append(f"{place} has {code.count(chr(10))} lines, more than {LINES_PER_FILE}")
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                lines = node.end_lineno - node.lineno + 1
                loop = (str(place), node.name) == ("pipeline/train.py", "train")
                if lines > (limit := LINES_OF_THE_LOOP if loop else LINES_PER_FUNCTION):
                    long.append(f"{place}:{node.lineno} {node.name} has {lines} lines, more than {limit}")
    assert not long, "\n".join(long)


def test_modules_say_what_they_do() -> None:
    silent = [str(path.relative_to(ROOT)) for path in SOURCES if path.stat().st_size and not docstring(path)]
    assert not silent, f"no docstring at the top of: {', '.join(silent)}"
    vague = [str(path.relative_to(ROOT)) for path in SOURCES if path.stem in ("utils", "helpers", "common", "misc")]
    assert not vague, f"name these for what they do: {', '.join(vague)}"


def docstring(path: Path) -> str | None:
    return ast.get_docstring(ast.parse(path.read_text()))


def test_public_names() -> None:
    assert sorted(pipeline.__all__) == ["__version__", "load", "open_dataset", "open_run", "train"]
    assert all(callable(getattr(pipeline, name)) for name in pipeline.__all__ if name != "__version__")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert pipeline.__version__ == declared


def test_the_function_train_survives_the_module_train() -> None:
    module = importlib.import_module("pipeline.train")
    assert pipeline.train is not module and callable(pipeline.train)
    assert callable(module.train) and module.train is not pipeline.train
