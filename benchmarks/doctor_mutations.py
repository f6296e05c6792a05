"""One change of a configuration, as people make them: drawn by a seed, most of them mistakes, some of them harmless."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import yaml

Tree = dict[str, Any]
Place = tuple[str, ...]
Made = tuple[str, str]  # the new text, what was done

ADDED: list[tuple[str, list[Any]]] = [  # keys that the shipped files leave out
    ("zero.stage", [0, 1, 2, 3, 4, "two"]),
    ("zero.offload_optimizer", ["cpu", "nvme", "disk"]),
    ("zero.extra", [{"overlap_comm": True}, {"overlap_com": True}, {"reduce_bucket_size": 100_000}, {"stage": 3}]),
    ("precision.dtype", ["fp32", "bf16", "fp16", "fp8", "float32"]),
    ("ema", [{"decay": 0.99}, {"decay": 1.5}, {"decy": 0.99}]),
    ("activation_checkpointing", [True, "full"]),
    ("optim.clip", [1.0, -1.0, 0]),
    ("optim.freeze", [["*bias"], ["*"], ["nothing.of.it"]]),
    ("optim.layer_decay", [0.75, 0, 2]),
    ("data.lanes", [4, 8, 7, 0]),
    ("data.bad_samples", ["substitute", "ignore"]),
    ("data.skip_steps", [[[0, 1]], [[5, 2]], [3]]),
    ("checkpoint.keep", [1, 0, "all"]),
    ("checkpoint.keep_best", [1, -1]),
    ("guard.spike", ["skip", "stop"]),
    ("cluster.min_workers", [1, 3]),
    ("task.norm", ["group", "layer"]),
    ("track.wandb", ["off", "on", "sometimes"]),
    ("task.tokenizer", ["data/stdlib/train/tokenizer.json", "gpt2"]),
    ("compile", [False, "fast"]),
]
HARMLESS: list[tuple[str, Callable[[Any], Any]]] = [
    ("seed", lambda value: int(value) + 17),
    ("name", lambda value: f"{value}-again"),
    ("steps", lambda value: int(value) * 2),
    ("optim.lr", lambda value: float(value) / 2),
    ("optim.weight_decay", lambda value: float(value) / 2),
    ("optim.schedule.warmup", lambda value: int(value) // 2),
    ("checkpoint.every", lambda value: int(value) // 5),
    ("global_batch_size", lambda value: int(value) * 2),
    ("micro_batch_size", lambda value: int(value) // 2),
    ("cluster.workers", lambda value: 1),
]


def draw(texts: dict[str, str], seed: int, count: int) -> list[dict[str, Any]]:
    """`count` mutations: config, kind, what, text. No two are the same."""
    rng = random.Random(seed)
    trees = {name: yaml.safe_load(text) for name, text in texts.items()}
    kinds = list(KINDS)
    entries: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(entries) < count:
        name = rng.choice(list(trees))
        kind = rng.choices(kinds, [weight for weight, _ in KINDS.values()])[0]
        made = KINDS[kind][1](copy.deepcopy(trees[name]), rng, trees)
        if made is None or f"{name} {made[1]}" in seen or made[0] == yaml.safe_dump(trees[name], sort_keys=False):
            continue
        seen.add(f"{name} {made[1]}")
        entries.append({"config": name, "kind": kind, "what": made[1], "text": made[0]})
    return entries


def leaves(tree: Tree, above: Place = ()) -> list[Place]:
    """Places of all values that are no sections."""
    found: list[Place] = []
    for key, value in tree.items():
        found += leaves(value, (*above, key)) if isinstance(value, dict) and value else [(*above, key)]
    return found


def everything(tree: Tree, above: Place = ()) -> list[Place]:
    """Places of all values and all sections."""
    found: list[Place] = []
    for key, value in tree.items():
        found.append((*above, key))
        found += everything(value, (*above, key)) if isinstance(value, dict) else []
    return found


def at(tree: Tree, place: Place) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def put(tree: Tree, place: Place, value: Any) -> Made:
    """The text with the value at a place."""
    inside = tree
    for key in place[:-1]:
        inside = inside.setdefault(key, {})
        if not isinstance(inside, dict):
            return written(tree), "nothing"
    inside[place[-1]] = value
    return written(tree), f"{'.'.join(place)}: {value!r}"


def written(tree: Tree) -> str:
    return yaml.safe_dump(tree, sort_keys=False)


def as_number(value: Any) -> int | float | None:
    """YAML reads 1e-3 as a word."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None


def misspelt(word: str, rng: random.Random) -> str:
    """A letter left out, twice, or changed with the next."""
    i = rng.randrange(len(word) - 1) if len(word) > 1 else 0
    return rng.choice(
        [word[:i] + word[i + 1 :], word[: i + 1] + word[i:], word[:i] + word[i : i + 2][::-1] + word[i + 2 :]]
    )


def misspell(tree: Tree, rng: random.Random, trees: dict[str, Tree]) -> Made | None:
    place = rng.choice(everything(tree))
    inside, new = at(tree, place[:-1]), misspelt(place[-1], rng)
    if not new or new in inside:
        return None
    items = [(new if key == place[-1] else key, value) for key, value in inside.items()]
    inside.clear()
    inside.update(items)
    return written(tree), f"{'.'.join(place)} written {new}"


def wrong_type(tree: Tree, rng: random.Random, trees: dict[str, Tree]) -> Made:
    place = rng.choice(everything(tree))
    return put(tree, place, rng.choice(["many", True, None, [1, 2], {"value": 3}, 2.5, "16", ""]))


def number(tree: Tree, rng: random.Random, trees: dict[str, Tree]) -> Made:
    place = rng.choice([place for place in leaves(tree) if as_number(at(tree, place)) is not None])
    value = as_number(at(tree, place))
    assert value is not None
    factor = rng.choice([10, 100, -1, 0, 0.1, 3, "one more"])
    if factor == "one more":
        return put(tree, place, value + 1)
    assert not isinstance(factor, str)
    new = value * factor
    return put(tree, place, int(new) if isinstance(value, int) and new == int(new) else float(f"{new:.6g}"))


def in_list(tree: Tree, rng: random.Random, trees: dict[str, Tree]) -> Made | None:
    places = [place for place in leaves(tree) if isinstance(at(tree, place), list)]
    if not places:
        return None
    place = rng.choice(places)
    old = list(at(tree, place))
    i = rng.randrange(len(old))
    changed = [old[:i] + old[i + 1 :], [*old, old[i]], old[::-1]]
    if isinstance(old[i], int | float):
        changed += [[*old[:i], old[i] * 10, *old[i + 1 :]], [*old[:i], -old[i], *old[i + 1 :]]]
    return put(tree, place, rng.choice(changed))


def remove(tree: Tree, rng: random.Random, trees: dict[str, Tree]) -> Made:
    place = rng.choice(everything(tree))
    del at(tree, place[:-1])[place[-1]]
    return written(tree), f"without {'.'.join(place)}"


def path(tree: Tree, rng: random.Random, trees: dict[str, Tree]) -> Made | None:
    place = rng.choice([place for place in leaves(tree) if str(at(tree, place)).startswith("data/")])
    old = str(at(tree, place))
    others = [str(at(other, p)) for other in trees.values() for p in leaves(other)]
    others = [other for other in others if other.startswith("data/") and other != old]
    new = [misspelt(old, rng), "/" + old, old.rpartition("/")[0], f"{old}/shard-0.tar", "~/" + old]
    return put(tree, place, rng.choice([*new, *rng.sample(others, 2)]))


def word(tree: Tree, rng: random.Random, trees: dict[str, Tree]) -> Made | None:
    """A word misspelt, or one that stands at the same key of another configuration."""
    places = [p for p in leaves(tree) if isinstance(at(tree, p), str) and "data/" not in at(tree, p) and p != ("name",)]
    places = [p for p in places if as_number(at(tree, p)) is None]
    place = rng.choice(places)
    others = [at(other, p) for other in trees.values() for p in leaves(other) if p == place]
    others = [other for other in others if other != at(tree, place)]
    if others and rng.random() < 0.6:
        return put(tree, place, rng.choice(others))
    return put(tree, place, misspelt(at(tree, place), rng))


def section(tree: Tree, rng: random.Random, trees: dict[str, Tree]) -> Made | None:
    """A section of another configuration in place of its own."""
    name, key = rng.choice(list(trees)), rng.choice(["task", "data", "optim", "evaluate", "checkpoint", "zero"])
    if key not in trees[name] or trees[name][key] == tree.get(key):
        return None
    tree[key] = copy.deepcopy(trees[name][key])
    return written(tree), f"{key} of {name}"


def add(tree: Tree, rng: random.Random, trees: dict[str, Tree]) -> Made:
    place, values = rng.choice(ADDED)
    return put(tree, tuple(place.split(".")), rng.choice(values))


def text(tree: Tree, rng: random.Random, trees: dict[str, Tree]) -> Made:
    """A line of the file that is no longer as YAML wants it, or still is."""
    lines = written(tree).splitlines()
    i = rng.randrange(len(lines))
    changed = {
        "indented more": ["   " + lines[i]],
        "with a tab": ["\t" + lines[i].lstrip()],
        "twice": [lines[i], lines[i]],
        "without its colon": [lines[i].replace(":", "", 1)],
        "an open bracket": [lines[i] + " ["],
        "a comment after": [lines[i] + "   # as before"],
    }
    how = rng.choice(list(changed))
    new = changed[how]
    return "\n".join([*lines[:i], *new, *lines[i + 1 :]]) + "\n", f"line {i + 1} ({lines[i].strip()}) {how}"


def harmless(tree: Tree, rng: random.Random, trees: dict[str, Tree]) -> Made | None:
    """What a careful person may do; several at once."""
    chosen = []
    for key, change in rng.sample(HARMLESS, rng.randint(1, 2)):
        place = tuple(key.split("."))
        if place in leaves(tree):
            chosen.append(put(tree, place, change(at(tree, place)))[1])
    return (written(tree), ", ".join(chosen)) if chosen else None


KINDS: dict[str, tuple[int, Callable[[Tree, random.Random, dict[str, Tree]], Made | None]]] = {
    "number": (24, number),
    "harmless": (20, harmless),
    "key misspelt": (8, misspell),
    "wrong type": (9, wrong_type),
    "key removed": (9, remove),
    "path": (7, path),
    "word": (7, word),
    "list": (5, in_list),
    "section swapped": (6, section),
    "key added": (10, add),
    "text": (4, text),
}
