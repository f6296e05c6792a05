"""Save at one world size and ZeRO stage, go on at another: the same losses, to the bit where promised.

The promise: same world size and stage, bitwise; else fp32 within 1e-6 relative over 20 steps, bf16 within 1e-2. Both
networks, both optimizers (AdamW with three groups, SGD with momentum), tied and frozen parameters, a buffer, a moving
average. Before anything is trained every state is bit for bit that which was saved, and no byte was read beside what a
rank needs. Each world size is started once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pipeline.checkpoint.format import checkpoint_name, list_checkpoints
from pipeline.checkpoint.manifest import Manifest
from pipeline.config import Config
from pipeline.sections import Ema
from pipeline.session import World
from tests import gloo, small_run

if TYPE_CHECKING:
    from pipeline.engine import Engine

Row = tuple[str, str, int]  # network, precision, ZeRO stage that saves
ROWS: list[Row] = [
    (kind, dtype, stage) for kind in ("words", "images") for dtype in ("fp32", "bf16") for stage in range(4)
]
FAST = [row for row in ROWS if row[2] == 2 or row in (("words", "fp32", 3), ("images", "bf16", 3))]
SAVED_AT, END = 4, 24
SMALL_PARTS = {
    "sub_group_size": 300,
    "stage3_param_persistence_threshold": 40,
}  # several sub-groups, some parameters kept
PROMISE = {"fp32": 1e-6, "bf16": 1e-2}


def start(world: World, row: Row) -> tuple[Config, Any]:
    kind, dtype, stage = row
    settings = small_run.config(kind, stage, dtype, extra=SMALL_PARTS if stage == 3 else {}, ema=Ema(decay=0.5))
    return settings, small_run.start(world, settings, kind)


def write_all(world: World, root: Path, rows: list[Row]) -> dict[Row, list[float]]:
    """Uninterrupted runs that save on the way; their losses after it, found again, to the bit, by restoring at once."""
    losses = {}
    for kind, dtype, stage in rows:
        folder = root / f"{kind}-{dtype}-{stage}"
        settings, engine = start(world, (kind, dtype, stage))
        small_run.curve(engine, world, settings, kind, 0, SAVED_AT)
        small_run.save(world, settings, engine, folder, SAVED_AT)
        whole = small_run.whole(world, engine)
        if world.rank == 0:
            torch.save(whole, folder.with_suffix(".pt"))
        losses[kind, dtype, stage] = small_run.curve(engine, world, settings, kind, SAVED_AT, END)
        final = small_run.state(engine)
        engine.close()

        settings, engine = start(world, (kind, dtype, stage))
        assert small_run.load(world, settings, engine, folder)
        assert small_run.curve(engine, world, settings, kind, SAVED_AT, END) == losses[kind, dtype, stage]
        assert small_run.same(small_run.state(engine), final)
        engine.close()
    return losses


def go_on(
    world: World, root: Path, rows: list[Row], stages: dict[int, tuple[int, ...]]
) -> dict[tuple[str, str, int, int], list[float]]:
    """Losses after restoring each row at each of the stages that `stages` gives for the one it was saved at."""
    losses = {}
    for kind, dtype, saved in rows:
        for stage in stages.get(saved, ()):
            settings, engine = start(world, (kind, dtype, stage))
            restored = small_run.load(world, settings, engine, root / f"{kind}-{dtype}-{saved}")
            assert restored is not None and restored.step == SAVED_AT
            assert (f"not bitwise: zero.stage {saved} -> {stage}" in restored.notes) == (saved != stage)
            assert (f"not bitwise: workers 2 -> {world.world_size}" in restored.notes) == (world.world_size != 2)
            saved_state = torch.load(root / f"{kind}-{dtype}-{saved}.pt")
            assert small_run.same(small_run.whole(world, engine), saved_state)
            assert_frugal(engine, restored.manifest, root / f"{kind}-{dtype}-{saved}" / checkpoint_name(SAVED_AT))
            losses[kind, dtype, saved, stage] = small_run.curve(engine, world, settings, kind, SAVED_AT, END)
            engine.close()
    return losses


def assert_frugal(engine: Engine, manifest: Manifest, folder: Path) -> None:
    """Linux counts the bytes that this process has read: they are those of its own pieces, and headers of files."""
    from pipeline.checkpoint import layouts
    from pipeline.checkpoint.fragments import Reader

    files, needed = set(), 0
    sizes = {"F32": 4, "BF16": 2}
    pieces = list(layouts.pieces(engine))
    for piece in pieces:
        for key, tensor in piece.state.items():
            for place in manifest.fragments:
                begin, end = max(piece.start, place.start), min(piece.start + len(tensor), place.start + place.numel)
                if (place.parameter, place.key) == (piece.name, key) and begin < end:
                    files.add(place.file)
                    needed += (end - begin) * sizes[place.dtype]
    for file in files:
        with (folder / file).open("rb") as opened:
            needed += 8 + int.from_bytes(opened.read(8), "little")
    counted = bytes_read()
    with Reader(folder, manifest.fragments) as reader:
        for piece in pieces:
            for key, tensor in piece.state.items():
                reader.read_into(torch.empty_like(tensor), piece.name, key, piece.start)
    counted = bytes_read() - counted
    assert needed <= counted <= needed + 300  # the count itself is read from a file


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def differences(found: dict[tuple[str, str, int, int], list[float]], written: dict) -> dict[tuple, tuple[float, float]]:
    """(relative difference of the first loss, largest of all) for each row, those that break the promise only."""
    broken = {}
    for (kind, dtype, saved, stage), losses in found.items():
        relative = [abs(a - b) / abs(b) for a, b in zip(losses, written[kind, dtype, saved], strict=True)]
        if max(relative) > PROMISE[dtype]:
            broken[kind, dtype, saved, stage] = (relative[0], max(relative))
    return broken


def on_two(world: World, root: Path) -> dict[str, Any]:
    written = write_all(world, root, FAST)
    read = go_on(world, root, FAST, {2: (0,), 3: (1,)})
    return {"written": written, "read": read}


def on_four(world: World, root: Path) -> dict[str, Any]:
    return {"read": go_on(world, root, FAST, {2: (3,)})}


def on_one(world: World, root: Path) -> dict[str, Any]:
    return {"read": go_on(world, root, FAST, {2: (1,), 3: (0,)})}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def two(root) -> list[dict[str, Any]]:
    return gloo.run(on_two, 2, root, timeout=240)


@pytest.fixture(scope="module")
def one(root, two) -> dict[str, Any]:
    return gloo.run(on_one, 1, root, timeout=240)[0]


@pytest.fixture(scope="module")
def four(root, two) -> dict[str, Any]:
    return gloo.run(on_four, 4, root, timeout=240)[0]


def test_same_world_size_at_another_stage(two):
    """The same stage, to the bit, is asserted where it is written (write_all)."""
    assert len(two[0]["read"]) == 6
    assert not differences(two[0]["read"], two[0]["written"])


def test_one_worker_at_zero_1_and_0(two, one):
    assert len(one["read"]) == 6
    assert not differences(one["read"], two[0]["written"])


def test_four_workers_at_zero_3(two, four):
    assert len(four["read"]) == 4
    assert not differences(four["read"], two[0]["written"])


def test_files_are_safetensors_that_the_library_reads(two, root):
    from safetensors.torch import load_file

    [listed] = list_checkpoints(root / "words-bf16-2")
    assert listed.manifest is not None and len(listed.manifest.files) == 2
    tensors = {file: load_file(listed.path / file) for file in listed.manifest.files}
    for place in listed.manifest.fragments:
        assert tensors[place.file][place.tensor].shape == (place.numel,)
    assert listed.manifest.aliases == {"head.weight": "embed.weight"}
    frozen = [place for place in listed.manifest.fragments if place.parameter == "place"]
    assert {(place.key, place.dtype) for place in frozen} == {("value", "BF16")}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_stage_to_every_stage_and_world_size(tmp_path):
    """A Latin square: each pair of stages at one world size, each stage to each world size. benchmarks/resume_matrix.py
    has the whole table.
    """
    written = gloo.run(write_all, 2, tmp_path, ROWS, timeout=600)[0]
    for workers in (1, 2, 3, 4):
        goes_on = {stage: ((stage + workers) % 4,) for stage in range(4)}
        read = gloo.run(go_on, workers, tmp_path, ROWS, goes_on, timeout=900)[0]
        assert len(read) == 16 and not differences(read, written), workers
