"""The moving average: what its formula says, at every stage and precision; evaluated in place of the weights, undone.

That it is saved and read back by every layout is in checkpoint/test_layouts.py, at other numbers of workers in
checkpoint/test_shards.py, and that evaluation names it in test_train.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import ema
from pipeline.sections import Ema
from pipeline.session import World
from tests import gloo, small_run

LAYOUTS = [(dtype, stage) for dtype in ("fp32", "bf16") for stage in range(4)]
AVERAGE = Ema(decay=0.75, every=2)


def on_two(world: World, root: Path) -> dict[Any, dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for dtype, stage in LAYOUTS:
        settings = small_run.config("words", stage, dtype, ema=AVERAGE)
        engine = small_run.start(world, settings, "words")
        want = masters(world, engine)
        for number in range(6):
            small_run.step(engine, world, settings, "words", number, spoil=float("nan") if number == 3 else 1)
            if number in (1, 5):
                want = {name: 0.75 * want[name] + 0.25 * now for name, now in masters(world, engine).items()}
        said: dict[str, Any] = {"off": farthest(averages(world, engine), want)}
        found[dtype, stage] = said | swapped(world, engine, settings)
        engine.close()
    return found | {"notes": begun_and_dropped(world, root)}


def masters(world: World, engine: Any) -> dict[str, torch.Tensor]:
    state = small_run.whole(world, engine)
    return {place.split("|")[0]: tensor for place, tensor in state.items() if place.endswith("|master")}


def averages(world: World, engine: Any) -> dict[str, torch.Tensor]:
    state = small_run.whole(world, engine)
    return {place.split("|")[0]: tensor for place, tensor in state.items() if place.endswith("|ema")}


def farthest(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    assert got.keys() == want.keys()
    return max(float((got[name] - want[name]).abs().max()) for name in want)


def swapped(world: World, engine: Any, settings: Any) -> dict[str, Any]:
    """What the forward pass gives with the weights, with the averages, and with the weights again."""
    before, expected = small_run.state(engine), averages(world, engine)
    tokens = small_run.batch("words", 50)[0][:4]

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return engine.model(tokens).float()

    engine.model.eval()
    usual = forward()
    with ema.averaged(engine):
        inside, shown = forward(), masters(world, engine)
    again = forward()
    plain = small_run.model("words").to(engine.dtype).eval()  # the same network without DeepSpeed
    for name, parameter in plain.named_parameters():
        if name in expected:
            parameter.data.copy_(expected[name].view(parameter.shape))
    with torch.no_grad():
        alone = plain(tokens).float()
    engine.model.train()
    same = small_run.same(before, small_run.state(engine))
    return {
        "shown": all(torch.equal(shown[name], expected[name]) for name in expected),
        "inside": float((inside - alone).abs().max()),
        "apart": float((inside - usual).abs().max()),
        "undone": same and torch.equal(again, usual),
        "goes on": small_run.step(engine, world, settings, "words", 6)[1].applied,
    }


def begun_and_dropped(world: World, root: Path) -> dict[str, Any]:
    """Saved without and read with averages, at another stage; and the other way round."""
    said: dict[str, Any] = {}
    for name, before, after in (("begun", None, AVERAGE), ("dropped", AVERAGE, None)):
        settings = small_run.config("words", 2, ema=before)
        engine = small_run.start(world, settings, "words")
        small_run.curve(engine, world, settings, "words", 0, 2)
        small_run.save(world, settings, engine, root / name, 2)
        weights = masters(world, engine)
        engine.close()
        settings = small_run.config("words", 3, ema=after)
        engine = small_run.start(world, settings, "words")
        restored = small_run.load(world, settings, engine, root / name)
        assert restored is not None
        same = masters(world, engine).keys() == weights.keys() and farthest(masters(world, engine), weights) == 0
        begun = averages(world, engine)
        said[name] = (restored.notes, same, farthest(begun, weights) == 0 if begun else None)
        engine.close()
    return said


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, dict[str, Any]]]:
    return gloo.run(on_two, 2, tmp_path_factory.mktemp("ema"), timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_it_is_the_average_of_the_masters_at_every_other_step_that_was_applied(two: Any, layout: Any) -> None:
    assert two[0][layout]["off"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_evaluation_sees_the_average_and_the_weights_come_back_to_the_bit(two: Any, layout: Any) -> None:
    for rank in two:
        said = rank[layout]
        assert said["shown"] and said["undone"] and said["goes on"]
        assert said["inside"] < (1e-5 if layout[0] == "fp32" else 0.05)
        assert said["apart"] > 10 * said["inside"]


@pytest.mark.slow
def test_a_run_that_begins_or_ends_to_average_says_so(two: Any) -> None:
    notes, same, begun = two[0]["notes"]["begun"]
    assert same and begun is True
    assert "not bitwise: ema: the checkpoint has no averages; they begin at its weights" in notes
    notes, same, begun = two[0]["notes"]["dropped"]
    assert same and begun is None
    assert "not bitwise: ema: the checkpoint's averages are dropped, as the configuration has none" in notes
