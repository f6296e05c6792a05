"""Two checkpoints side by side: equal to the bit, or how far apart and where, however they were cut among ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.checkpoint import compare as comparing
from pipeline.checkpoint import format
from pipeline.checkpoint.compare import Difference, compare
from pipeline.checkpoint.fragments import Fragment, file_chunks
from pipeline.checkpoint.manifest import Manifest
from pipeline.errors import CheckpointError

State = dict[tuple[str, str], Tensor]


def state() -> State:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(5, 7, generator=generator)
    return {
        ("weight", "master"): weight,
        ("weight", "exp_avg"): weight / 10,
        ("bias", "value"): torch.randn(3, generator=generator).bfloat16(),
        ("count", "value"): torch.tensor(2**60 + 1),
    }


def save(folder: Path, held: State, ranks: int) -> Path:
    """A checkpoint with every tensor cut evenly among `ranks` files."""
    folder.mkdir()
    places, files = [], {}
    for rank in range(ranks):
        name, own = f"rank-{rank:05d}.safetensors", []
        for (parameter, key), tensor in held.items():
            begin, end = tensor.numel() * rank // ranks, tensor.numel() * (rank + 1) // ranks
            if begin < end:
                own.append(Fragment(parameter, key, begin, tensor.reshape(-1)[begin:end]))
        files[name] = format.write(folder / name, file_chunks(own))
        places += [fragment.place(name) for fragment in own]
    shapes = {parameter: tuple(tensor.shape) for (parameter, _), tensor in held.items()}
    manifest = Manifest(4, 1, ranks, 1, "fp32", shapes, tuple(places), files)
    format.write(folder / format.MANIFEST, [manifest.to_bytes()])
    return folder


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "ELEMENTS", 4)


def apart(a: Path, b: Path) -> list[Difference]:
    found = list(compare(a, b))
    assert [(each.name, each.key) for each in found][:2] == [("weight", "master"), ("weight", "exp_avg")]
    return [each for each in found if not each.equal]


def test_the_same_state_cut_in_two_and_in_three_is_equal(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", state(), 2), save(tmp_path / "b", state(), 3)
    assert apart(a, b) == []
    assert [each.elements for each in compare(a, b)] == [35, 35, 3, 1]


def test_differences_are_measured_and_named(tmp_path: Path) -> None:
    other = state()
    other["weight", "exp_avg"] = other["weight", "exp_avg"].clone()
    other["weight", "exp_avg"][4, 6] += 0.25
    other["weight", "exp_avg"][0, 1] -= 0.125
    other["count", "value"] = torch.tensor(2**60)  # one apart, which fp64 could not tell
    a, b = save(tmp_path / "a", state(), 2), save(tmp_path / "b", other, 1)
    exp_avg, count = apart(a, b)
    assert (exp_avg.name, exp_avg.key, exp_avg.differing) == ("weight", "exp_avg", 2)
    assert exp_avg.absolute == pytest.approx(0.25)
    assert exp_avg.relative == pytest.approx(0.25 / float(state()["weight", "exp_avg"].abs().max()))
    assert (count.name, count.differing) == ("count", 1)


@pytest.mark.parametrize("pair", [(0.0, -0.0, 0.0), (1.0, math.nan, math.inf), (math.inf, 1.0, math.inf)])
def test_bits_count_and_what_is_not_finite_is_infinitely_far(tmp_path: Path, pair: tuple[float, float, float]) -> None:
    first, second, distance = pair
    held, other = state(), state()
    held["weight", "master"][2, 2], other["weight", "master"] = first, held["weight", "master"].clone()
    other["weight", "master"][2, 2] = second
    a, b = save(tmp_path / "a", held, 2), save(tmp_path / "b", other, 2)
    [found] = apart(a, b)
    assert (found.differing, found.absolute) == (1, distance) and found.relative in (0.0, math.inf)
    assert apart(b, save(tmp_path / "c", other, 1)) == []  # a NaN is equal to itself


def test_what_only_one_has_is_said(tmp_path: Path) -> None:
    less = {place: tensor for place, tensor in state().items() if place[1] != "exp_avg"}
    less["bias", "value"] = torch.zeros(4).bfloat16()
    a, b = save(tmp_path / "a", state(), 2), save(tmp_path / "b", less, 1)
    said = {each.name: each.missing or "" for each in compare(a, b) if each.missing}
    assert said["weight"] == f"only {a} holds its exp_avg"
    assert said["bias"] == f"has the shape (3,) in {a} and (4,) in {b}"


def test_no_checkpoint_is_an_error_that_names_it(tmp_path: Path) -> None:
    a = save(tmp_path / "a", state(), 1)
    with pytest.raises(CheckpointError, match="nowhere is no checkpoint that can be compared"):
        list(compare(a, tmp_path / "nowhere"))
    (a / format.MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="own sha256"):
        list(compare(a, a))
