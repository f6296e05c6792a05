"""One data set over the shards of several: the tars are linked (or copied) into one folder, under one new root.

No tar is read: their segments come along. Where the first set's shards stay in front under their names, a run that has
begun with it knows the rest as shards that were added (see index.Index.prefix_identity). What it gives up: the sets are
read one behind the other, and only shuffled as blocks; to mix by weight, name both in `data.train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data import root
from pipeline.data.index import Index, open_index, read_segment
from pipeline.data.pack.work import json_bytes, link, read_json, work_folder
from pipeline.data.pack.writer import Progress, silent
from pipeline.data.root import ROOT, Shard
from pipeline.errors import DataError
from pipeline.whole_file import put

ALIKE = ("classes.json", "tokenizer.json")  # must be the same in all sets
OF_TEXT = ("vocab_size", "length", "eot_id")  # of text.json, too
SUMMED = ("bytes", "tokens", "rows", "documents", "files")


class Merged(NamedTuple):
    """renamed: whether shards have other names than in their sets."""

    folder: Path
    identity: str
    samples: int
    shards: int
    renamed: bool
    warnings: tuple[str, ...]


def merge(sets: Sequence[Path], out: Path, copy: bool = False, progress: Progress = silent) -> Merged:
    """Write OUT over the shards of all `sets`, in their order.

    Raises DataError when `out` exists, a set has no good index, or their classes or tokenizers differ.
    """
    if len(sets) < 2:
        raise DataError("one data set is merged already; name two or more")
    opened = [open_index(folder) for folder in sets]
    _refuse_different(sets)
    names = _names(opened)
    renamed = names != [[*one.shards.all_names()] for one in opened]
    digests = [shard.digest for one in opened for shard in one.shards]
    twice = len(digests) - len(set(digests))
    warnings = (f"{twice} shards hold the same as another one: their samples come twice in an epoch",) if twice else ()
    done, total = 0, sum(one.bytes for one in opened)
    with work_folder(out, {"merge": [one.identity for one in opened], "copy": copy}) as work:
        table: list[Shard] = []
        for one, named in zip(opened, names):
            for shard, name in zip(one.shards, named):
                read_segment(one.storage, shard)  # it is whole
                link(Path(one.place) / shard.name, work.out / name, copy)
                link(Path(one.place) / f"{shard.name}.idx", work.out / f"{name}.idx", copy)
                table.append(shard._replace(name=name))
                done += shard.bytes
                progress("merge", done, total)
        put(work.out / ROOT, [root.write(table)])
        for name in ALIKE:
            if (sets[0] / name).is_file():
                put(work.out / name, [(sets[0] / name).read_bytes()])
        if all((folder / "text.json").is_file() for folder in sets):
            put(work.out / "text.json", [json_bytes(_text(sets))])
        put(work.out / "card.json", [json_bytes(_card(sets, opened))])
        index = open_index(work.out)
    return Merged(out, index.identity, index.samples, len(table), renamed, warnings)


def _names(opened: Sequence[Index]) -> list[list[str]]:
    """The names of all shards: their own where these are different and in order, else with the number of their set."""
    own = [[*one.shards.all_names()] for one in opened]
    flat = [name for names in own for name in names]
    if len(set(flat)) == len(flat) and flat == sorted(flat):
        return own
    return [[f"{number:03d}-{name}" for name in names] for number, names in enumerate(own)]


def _refuse_different(sets: Sequence[Path]) -> None:
    for name in ALIKE:
        contents = [(folder / name).read_bytes() if (folder / name).is_file() else None for folder in sets]
        for folder, content in zip(sets, contents):
            if content != contents[0]:
                raise DataError(
                    f"{folder} and {sets[0]} have different {name}: the same number would mean two things; pack both "
                    "with the same one"
                )
    facts = [read_json(folder / "text.json") for folder in sets]
    for folder, found in zip(sets, facts):
        for fact in OF_TEXT:
            if found.get(fact) != facts[0].get(fact):
                raise DataError(
                    f"{folder} has rows of {fact} {found.get(fact)}, {sets[0]} of {facts[0].get(fact)}; pack both alike"
                )


def _text(sets: Sequence[Path]) -> dict[str, Any]:
    facts = [read_json(folder / "text.json") for folder in sets]
    summed = {name: sum(found[name] for found in facts) for name in SUMMED if all(name in found for found in facts)}
    return {**facts[0], "lossless": all(found.get("lossless") for found in facts), **summed, "xz_bytes": None}


def _card(sets: Sequence[Path], opened: Sequence[Index]) -> dict[str, Any]:
    """Where everything comes from: the cards of all sets."""
    cards = [read_json(folder / "card.json") for folder in sets]
    licences = sorted({str(card["licence"]) for card in cards if card.get("licence")})
    parts = [{"identity": one.identity, "samples": one.samples, "card": card} for one, card in zip(opened, cards)]
    facts: dict[str, Any] = {
        "format": 1,
        "kind": "merged",
        "split": "merged",
        "samples": sum(one.samples for one in opened),
    }
    if all(isinstance(card.get("classes"), dict) for card in cards):
        facts["classes"] = {name: sum(card["classes"].get(name, 0) for card in cards) for name in cards[0]["classes"]}
    source = ", ".join(folder.resolve().name for folder in sets)
    return {**facts, "source": source, "licence": ", ".join(licences) or None, "parts": parts}
