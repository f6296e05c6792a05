"""What two checkpoints differ in, at other numbers of ranks too, in bounded memory; and how it is shown."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import cli
from pipeline.checkpoint import diff as diffs
from pipeline.checkpoint import format
from pipeline.checkpoint.diff import Diff
from pipeline.checkpoint.format import Manifest
from pipeline.checkpoint.fragments import Fragment, Reader, file_chunks

SHAPES = {"embed.weight": (7, 5), "head.bias": (11,)}


def state() -> dict[tuple[str, str], Tensor]:
    torch.manual_seed(0)
    return {(name, key): torch.randn(shape) for name, shape in SHAPES.items() for key in ("master", "exp_avg")}


def save(root: Path, values: dict[tuple[str, str], Tensor], ranks: int = 1, **changes: Any) -> Path:
    """A checkpoint of these tensors, each cut among so many ranks."""
    facts: dict[str, Any] = {"step": 40, "attempt": 1, "world_size": ranks, "zero_stage": 1, "dtype": "fp32"} | changes
    staging = format.stage(root, facts["step"], facts["attempt"])
    files, places = {}, []
    for rank in range(ranks):
        cuts = {k: (v.numel() * rank // ranks, v.numel() * (rank + 1) // ranks) for k, v in values.items()}
        held = [Fragment(*key, first, values[key].view(-1)[first:end]) for key, (first, end) in cuts.items()]
        name = f"rank-{rank:05d}.safetensors"
        files[name] = format.write(staging / name, file_chunks(held))
        places += [fragment.place(name) for fragment in held]
    shapes = {name: tuple(values[name, "master"].shape) for name, key in values if key == "master"}
    manifest = Manifest(parameters=shapes, fragments=tuple(places), files=files, **facts)
    return format.commit(root, staging, manifest, newest_attempt=lambda: manifest.attempt)


def compare(a: Path, b: Path) -> Diff:
    manifests = [format.inspect(path)[0] for path in (a, b)]
    assert manifests[0] and manifests[1]
    return diffs.diff(a, b, (manifests[0], manifests[1]))


def test_other_ranks_and_stages_are_the_same_state(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", state()), save(tmp_path / "b", state(), ranks=3, zero_stage=3, attempt=2)
    found = compare(a, b)
    assert found.equal and found.compared == 4
    assert [fact.name for fact in found.made] == ["attempt", "workers", "zero.stage"]


def test_every_flipped_element_is_counted_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffs, "SLICE_ELEMENTS", 4)  # so that slices end inside tensors and fragments
    a = save(tmp_path / "a", state(), ranks=2)
    other = state()
    other["embed.weight", "exp_avg"].view(-1)[[0, 17, 34]] += torch.tensor([1e-3, 0.5, -2.0])
    found = compare(a, save(tmp_path / "b", other, ranks=3))
    assert not found.equal and found.state == []
    [tensor] = found.tensors
    x, y = (values["embed.weight", "exp_avg"].double().view(-1) for values in (state(), other))
    assert tensor[:2] == ("embed.weight", "exp_avg") and (tensor.elements, tensor.total) == (3, 35)
    assert tensor.largest == float((x - y).abs().max()) and 1.99 < tensor.largest < 2.01
    assert tensor.relative == float(((x - y).abs() / torch.maximum(x.abs(), y.abs())).max())


def test_values_without_a_distance(tmp_path: Path) -> None:
    """The same NaN is equal; NaN against a number is infinitely far; 0 and -0 differ in a bit and in nothing else."""
    one, other = state(), state()
    for values in (one, other):
        values["head.bias", "master"][0] = math.nan
    one["head.bias", "master"][1], other["head.bias", "master"][1] = 0.0, -0.0
    [tensor] = compare(save(tmp_path / "a", one), save(tmp_path / "b", other)).tensors
    assert tensor[2:] == (0.0, 0.0, 1, 11)
    other["head.bias", "master"][2] = math.nan
    [tensor] = compare(save(tmp_path / "a", one), save(tmp_path / "c", other)).tensors
    assert tensor[2:] == (math.inf, math.inf, 2, 11)


def test_what_stands_beside_the_tensors(tmp_path: Path) -> None:
    facts = {"scalars": {"steps": {"w": {"step": 40.0}}}, "data": {"identity": "d1"}, "config": {"optim": {"lr": 0.1}}}
    a = save(tmp_path / "a", state(), **facts)
    fewer = {place: value for place, value in state().items() if place != ("head.bias", "exp_avg")}
    changed = {"scalars": {"steps": {"w": {"step": 41.0}}}, "data": {"identity": "d2"}, "config": {"optim": {"lr": 1}}}
    found = compare(a, save(tmp_path / "b", fewer, step=41, **changed))
    assert found.state == [
        ("step", 40, 41),
        ("scalars.steps.w.step", 40.0, 41.0),
        ("data.identity", "d1", "d2"),
        ("exp_avg of head.bias", "there", "absent"),
    ]
    assert found.made == [("config.optim.lr", 0.1, 1)] and found.tensors == [] and found.compared == 3
    wider = state() | {("head.bias", "master"): torch.zeros(12), ("head.bias", "exp_avg"): torch.zeros(12)}
    found = compare(a, save(tmp_path / "c", wider, **facts))
    assert found.state == [("shape.head.bias", [11], [12])] or found.state == [("shape.head.bias", (11,), (12,))]
    assert found.compared == 2


def test_memory_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read but slices, one from each side at a time, and every element of both sides once."""
    asked: list[int] = []
    read_into = Reader.read_into

    def spy(reader: Reader, target: Tensor, *place: Any) -> None:
        asked.append(target.numel())
        read_into(reader, target, *place)

    monkeypatch.setattr(Reader, "read_into", spy)
    monkeypatch.setattr(diffs, "SLICE_ELEMENTS", 8)
    assert compare(save(tmp_path / "a", state()), save(tmp_path / "b", state(), ranks=2)).equal
    assert max(asked) == 8 and sum(asked) == 2 * 2 * (35 + 11)


# --- the command ---


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run(*paths: Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["millstream", "checkpoint", "diff", *map(str, paths)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out + err

    return run


def test_the_command_says_equal_different_or_damaged(tmp_path: Path, command) -> None:
    other = state()
    other["head.bias", "master"][4] += 1
    a, b, c = save(tmp_path / "a", state()), save(tmp_path / "b", state(), attempt=2), save(tmp_path / "c", other)
    code, said = command(a, b)
    assert code == 0 and said.startswith("equal: 4 tensors, to the bit\n") and "attempt" in said
    code, said = command(a, c)
    assert code == 1 and said.startswith("different: 1 of 4 tensors differ, by at most ")
    assert [line.split()[:2] for line in said.splitlines() if "1 of 11" in line] == [["head.bias", "master"]]
    manifest = format.inspect(c)[0]
    assert manifest is not None
    (c / format.MANIFEST).write_bytes(dataclasses.replace(manifest, step=41).to_bytes())
    code, said = command(a, c)
    assert code == 2 and "is of step 41: the folder has been renamed" in said
    code, said = command(a, tmp_path / "nothing")
    assert code == 1 and "is no run folder" in said
