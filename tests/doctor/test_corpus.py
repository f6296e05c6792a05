"""The corpus itself: large enough, mostly what users of peers reported, a third set aside, every entry makes files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.doctor import corpus


def test_the_corpus_is_what_it_says() -> None:
    broken, fresh, good = (corpus.entries(name) for name in ("broken", "fresh", "good"))
    names = [entry["id"] for entry in [*broken, *fresh, *good]]
    assert len(broken) >= 100 and len(good) >= 20 and len(set(names)) == len(names)
    assert sum(entry["source"] != "own" for entry in broken) > len(broken) / 2
    assert all({"place", "says", "source"} <= entry.keys() for entry in [*broken, *fresh])


def test_what_was_set_aside_is_what_the_seed_draws() -> None:
    assert sorted(corpus.held_out()) == corpus.draw()


@pytest.mark.slow
def test_every_entry_makes_its_files(tmp_path: Path) -> None:
    good = corpus.make_good(tmp_path / "good")
    for entry in [*corpus.entries("broken"), *corpus.entries("fresh"), *corpus.entries("good")]:
        assert corpus.make(entry, good, tmp_path / entry["id"]).is_file()
