"""An order that is changed on purpose: what goes on where it was, what begins anew, and what a person is told."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.mixture import Mixture, Source
from tests.data.slow_mixture import Row, SlowSource
from tests.data.test_mixture import fast, mixtures, order, slow, stored


def never(source: int, samples: int) -> None:
    """No data set here has grown."""


def prefix(identities: list[dict[int, str]], source: int, samples: int) -> str | None:
    """Identities of data sets with only their first samples, as the index tells them."""
    return identities[source].get(samples)


def start(*sources: Source, **numbers: int) -> Mixture:
    return Mixture.start(sources, **{"lanes": 4, "shuffle_blocks": 64, "seed": 0, "global_batch": 8, **numbers})


PROSE, CODE = Source("prose", "3f2a91bc", 1000, 4, 0.7), Source("code", "77aa", 300, 4, 0.3)
OTHER = replace(CODE, identity="91bc", samples=2000)


@given(mixtures(), st.data())
@settings(max_examples=40, deadline=None)
def test_every_epoch_stays_whole_through_any_chain_of_changes(plan: dict[str, Any], data: st.DataObject):
    """Weights, sources and data sets change again and again; the slow sources just carry on."""
    mixture, sources, step = Mixture.start(**plan), list(plan["sources"]), 0
    brute, batch = slow(plan, mixture.segments[0].draws), plan["global_batch"]
    known: dict[str, SlowSource] = {s.name: one for s, one in zip(sources, brute.sources)}
    rested: dict[str, Source] = {}
    prefixes: dict[str, dict[int, str]] = {s.name: {} for s in sources}  # what each data set was with fewer samples
    for number in range(data.draw(st.integers(1, 5))):
        steps = data.draw(st.integers(0, 25))
        assert fast(mixture, step, steps, batch) == brute.steps(steps)
        step += steps
        what = data.draw(st.sampled_from(["weight", "add", "remove", "return", "grow", "swap"]))
        i = data.draw(st.integers(0, len(sources) - 1))
        if what == "weight":
            sources[i] = replace(sources[i], weight=data.draw(st.sampled_from([0.3, 1.0, 3.0])))
        elif what == "add":
            sources.insert(i, Source(f"new {number}", f"new data {number}", data.draw(st.integers(1, 50)), 3))
            known[sources[i].name] = SlowSource(order(plan, sources[i]))
            prefixes[sources[i].name] = {}
        elif what == "remove" and len(sources) > 1:
            gone = sources.pop(i)
            rested[gone.name] = gone
        elif what == "return" and rested:
            sources.append(rested.pop(sorted(rested)[0]))
        elif what == "swap":
            sources.append(sources.pop(i))
        elif what == "grow":
            prefixes[sources[i].name][sources[i].samples] = sources[i].identity
            more, block = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 12))
            sources[i] = replace(sources[i], identity=f"grown {number}", samples=sources[i].samples + more, block=block)
            edge = known[sources[i].name].grow(order(plan, sources[i]))
        wanted = Mixture.start(**{**plan, "sources": sources})
        grown = partial(prefix, [prefixes[source.name] for source in sources])
        mixture, notes = Mixture.continued(stored(mixture), step, wanted, grown)
        if what == "grow" and sum(known[sources[i].name].taken):
            assert notes[0].endswith(f"the new ones join at epoch {edge}")
        brute.again([known[s.name] for s in sources], wanted.segments[0].draws, plan["seed"], batch)
        assert wanted.differences(stored(mixture)) == []
    assert fast(mixture, step, 30, batch) == brute.steps(30)
    for source in known.values():
        source.check()


@given(mixtures(), st.integers(0, 30), st.data())
@settings(max_examples=40, deadline=None)
def test_what_cannot_go_on_begins_anew_with_epochs_that_it_has_not_had(plan, steps: int, data: st.DataObject):
    """Other lanes, windows, seed: all sources. Other data or blocks: that source; the others carry on."""
    mixture, sources = Mixture.start(**plan), list(plan["sources"])
    brute = slow(plan, mixture.segments[0].draws)
    assert fast(mixture, 0, steps, plan["global_batch"]) == brute.steps(steps)
    other = dict(plan)
    what = data.draw(st.sampled_from(["lanes", "shuffle_blocks", "seed", "data", "block"]))
    if what == "lanes":
        other |= {"lanes": plan["lanes"] + 1, "global_batch": (plan["lanes"] + 1) * 2}
    elif what == "shuffle_blocks":
        other[what] = plan[what] + 2 * plan["lanes"] + plan["lanes"]
    elif what == "seed":
        other[what] = plan[what] + 1
    else:
        new = {"data": {"identity": "other"}, "block": {"block": sources[0].block + 1}}[what]
        other["sources"] = [replace(sources[0], **new), *sources[1:]]
    wanted = Mixture.start(**other)
    later, notes = Mixture.continued(stored(mixture), steps, wanted, never)
    anew = len(sources) if what not in ("data", "block") else 1
    for i, source in enumerate(other["sources"][:anew]):
        epoch = brute.sources[i].reached + 1
        assert notes[i].startswith(f"{source.name} begins anew with epoch {epoch}, of {source.samples:,} samples")
        brute.sources[i] = SlowSource(order(other, source), epoch)
    assert len(notes) == anew
    brute.again(brute.sources, wanted.segments[0].draws, other["seed"], other["global_batch"])
    assert fast(later, steps, 30, other["global_batch"]) == brute.steps(30)
    for source in brute.sources:
        source.check()
    assert wanted.differences(later.state) == []
    if steps:  # the steps before are still there
        assert fast(later, 0, steps, plan["global_batch"]) == fast(mixture, 0, steps, plan["global_batch"])


@given(mixtures(), st.integers(0, 20), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_another_global_batch_goes_on_with_the_same_lanes(plan: dict[str, Any], steps: int, depth: int):
    mixture = Mixture.start(**plan)
    brute = slow(plan, mixture.segments[0].draws)
    brute.steps(steps)
    batch = plan["lanes"] * depth
    wanted = Mixture.start(**{**plan, "global_batch": batch})
    later, _ = Mixture.continued(mixture.state, steps, wanted, never)
    brute.again(brute.sources, wanted.segments[0].draws, plan["seed"], batch)
    assert fast(later, steps, 40, batch) == brute.steps(40)
    for source in brute.sources:
        source.check()


def drawn_numbers(mixture: Mixture, first: int, steps: int) -> list[Row]:
    return fast(mixture, first, steps, mixture.segments[-1].global_batch)


def test_growth_joins_at_the_edge_and_can_be_taken_back_before():
    old, big = start(PROSE), start(replace(PROSE, identity="big", samples=1500, block=20))
    grown, notes = Mixture.continued(
        stored(old), 300, big, partial(prefix, [{1000: PROSE.identity}])
    )  # 2,400 of 1,000: in epoch 2
    assert notes == ["prose has grown from 1,000 to 1,500 samples: the new ones join at epoch 3"]
    rows = drawn_numbers(grown, 300, 300)
    assert rows[:600] == drawn_numbers(old, 300, 75)
    assert {number for _, epoch, number in rows if epoch == 3} == set(range(1500))

    back, notes = Mixture.continued(stored(grown), 320, start(PROSE), never)
    assert notes == ["prose stays at 1,000 samples: those that were to join at epoch 3 do not"]
    assert drawn_numbers(back, 320, 200) == drawn_numbers(old, 320, 200)

    more = start(replace(PROSE, identity="bigger", samples=1600))
    again, notes = Mixture.continued(stored(grown), 320, more, partial(prefix, [{1000: PROSE.identity}]))
    assert notes == ["prose has grown from 1,000 to 1,600 samples: the new ones join at epoch 3"]
    assert {number for _, epoch, number in drawn_numbers(again, 320, 300) if epoch == 3} == set(range(1600))

    _, notes = Mixture.continued(stored(grown), 400, start(PROSE), never)  # epoch 3 has begun
    assert notes[0].startswith("prose begins anew with epoch 4, of 1,000 samples (other data)")


def test_a_source_that_was_left_out_comes_back_where_it_was():
    both = start(PROSE, CODE)
    alone, notes = Mixture.continued(stored(both), 100, start(PROSE), never)
    assert notes == ["code is drawn no more; should it come back, it goes on where it was"]
    assert alone.shares == [("prose", 4096, 4096)]
    assert {source for source, *_ in drawn_numbers(alone, 100, 50)} == {0}
    assert start(PROSE).differences(stored(alone)) == []
    assert start(PROSE, CODE).differences(stored(alone)) == ["weight of code: 0 -> 0.3"]
    back, notes = Mixture.continued(stored(alone), 150, start(PROSE, CODE), never)
    assert notes == ["code has weight 0.3 instead of 0, and goes on where it was"]
    of_code = [row[1:] for row in drawn_numbers(both, 0, 100) + drawn_numbers(back, 150, 300) if row[0] == 1]
    assert len(of_code) == len(set(of_code)) > 600
    assert sorted(number for epoch, number in of_code if epoch == 0) == list(range(300))


def test_what_a_change_means_is_said():
    both = start(PROSE, CODE)
    extra = Source("extra", "e", 10, 1, 0.5)
    _, notes = Mixture.continued(both.state, 10, start(replace(PROSE, weight=0.5), CODE, extra, global_batch=16), never)
    assert notes == [
        "prose has weight 0.5 instead of 0.7, and goes on where it was",
        "extra is new: it begins with epoch 0",
        "a step has 16 samples instead of 8; sources go on where they were",
    ]
    _, notes = Mixture.continued(both.state, 200, start(PROSE, CODE, lanes=8, seed=3), never)
    lost = ": samples of the epoch in hand may come again, or not at all in it"
    assert notes == [
        f"prose begins anew with epoch 2, of 1,000 samples (lanes: 4 -> 8, seed: 0 -> 3){lost}",
        f"code begins anew with epoch 2, of 300 samples (lanes: 4 -> 8, seed: 0 -> 3){lost}",
    ]
    _, notes = Mixture.continued(both.state, 0, start(PROSE, CODE, seed=3), never)
    assert notes[0] == "prose begins anew with epoch 0, of 1,000 samples (seed: 0 -> 3)"
    with pytest.raises(ValueError, match="step 50"):
        Mixture.continued(Mixture.continued(both.state, 50, both, never)[0].state, 49, both, never)


@pytest.mark.parametrize(
    ("sources", "numbers", "lines"),
    [
        ([PROSE, CODE], {}, []),
        ([replace(PROSE, weight=7), replace(CODE, weight=3)], {}, []),
        ([replace(PROSE, name="letters"), CODE], {}, []),
        ([PROSE, CODE], {"shuffle_blocks": 63}, []),
        ([PROSE, CODE], {"lanes": 8}, ["lanes: 4 -> 8"]),
        ([PROSE, CODE], {"seed": 1}, ["seed: 0 -> 1"]),
        ([PROSE, CODE], {"shuffle_blocks": 128}, ["shuffle_blocks: 64 -> 128"]),
        ([PROSE, CODE], {"global_batch": 16}, ["global batch: 8 -> 16"]),
        ([replace(PROSE, weight=0.5), CODE], {}, ["weight of prose: 0.7 -> 0.5"]),
        ([PROSE, replace(CODE, block=8)], {}, ["block of code: 4 -> 8 samples"]),
        ([PROSE, OTHER], {}, ["data of code: 77aa.. -> 91bc.. (300 -> 2,000 samples)"]),
        ([PROSE, CODE, Source("extra", "x", 5, 1)], {}, ["new source extra"]),
        ([CODE], {}, ["source prose is gone"]),
        ([PROSE], {}, ["source code is gone"]),
        ([CODE, PROSE], {}, ["order of sources: prose, code -> code, prose"]),
        ([CODE], {"seed": 2, "lanes": 2}, ["lanes: 4 -> 2", "seed: 0 -> 2", "source prose is gone"]),
    ],
)
def test_each_difference_is_named(sources: list[Source], numbers: dict[str, int], lines: list[str]):
    state = stored(start(PROSE, CODE))
    wanted = start(*sources, **numbers)
    assert wanted.differences(state) == lines
    same = [drawn_numbers(mixture, 0, 20) for mixture in (Mixture.from_state(state), wanted)]
    assert (same[0] == same[1]) == (not lines)  # a difference is said if and only if there is one
    later, _ = Mixture.continued(state, 20, wanted, never)
    assert Mixture.from_state(stored(later)) == later
    assert wanted.differences(stored(later)) == []
