"""What a resume changes: every ZeRO stage, from 1 to 4 workers to 1 to 4 workers, four families, two precisions.

    convnet     a ResNet with batch norm and ReLU, SGD with momentum
    language    a Llama, AdamW with two groups (matrices are decayed, norms are not)
    audio       an LSTM on clips of unequal lengths, with dropout and masks drawn by sample
    diffusion   a U-Net that is told the class; noise, time steps and dropped classes are drawn by micro batch

Each run trains 24 steps without a break and keeps its checkpoint of step 4. From there it is gone on with, at the same
stage, with each number of workers, and losses of the 20 steps are compared; samples and learning rates must be equal,
and with the same number of workers every tensor of the last checkpoint too. Batches are 4 micro batches of 4 samples,
so 3 workers have unequal shares. All of it runs through `pipeline.train.train`, in one start of processes for each
number of workers that saves, and one for each that goes on.

    python benchmarks/resume_matrix.py --save
    python benchmarks/resume_matrix.py --case language --dtype bf16 --stage 3 --from 2 --to 3      # one cell
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cases
import checks
import report
import workers
from gpu_check import difference

if TYPE_CHECKING:
    from pipeline.session import World

SAVED_AT, END = 4, 24
WORKERS = (1, 2, 3, 4)
DTYPES = ("fp32", "bf16")
ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1, "schedule": {"warmup": 2}}
OPTIMIZERS = {
    "convnet": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "schedule": {"warmup": 2}},
    "language": ADAMW,
    "audio": ADAMW,
    "diffusion": ADAMW,
}


class Promise(NamedTuple):
    """Of losses after another number of workers has gone on: largest relative difference of each run, and median."""

    each: float
    median: float
    text: str


SMOOTH = Promise(1e-6, 1e-6, "within 1e-6")
KINKS = Promise(1e-3, 1e-6, "each within 1e-3, the median within 1e-6 (ReLU)")
LOW_PRECISION = Promise(1e-2, 1e-2, "within 1e-2")


class Row(NamedTuple):
    """What is saved."""

    case: str
    dtype: str
    stage: int
    workers: int

    def folder(self, runs: Path) -> Path:
        return runs / "-".join(map(str, self))


class Cell(NamedTuple):
    """How far the losses of a run that went on are from those without a break, and whether that is as promised."""

    relative: float
    kept: bool


def promise(case: str, dtype: str) -> Promise:
    return LOW_PRECISION if dtype != "fp32" else KINKS if case == "convnet" else SMOOTH


def without_break(
    world: World, line: Connection, paths: dict[str, Path], rows: list[Row], runs: Path
) -> dict[Row, checks.Trained]:
    """Every row's run on the workers that are here, its checkpoints kept."""
    saving = [f"steps={END}", f"checkpoint.every={SAVED_AT}", f"checkpoint.keep_every={SAVED_AT}"]
    return {
        row: checks.run(world, paths[row.case], row.folder(runs), row.dtype, row.stage, saving)
        for row in rows
        if row.workers == world.world_size
    }


def gone_on(
    world: World, line: Connection, paths: dict[str, Path], rows: list[Row], runs: Path
) -> dict[Row, tuple[checks.Trained, str | None]]:
    """Every row from its checkpoint to the end, on the workers that are here; a tensor that is other at the end."""
    found = {}
    for row in rows:
        folder, saved = runs / f"on-{world.world_size}" / row.folder(runs).name, row.folder(runs) / "checkpoints"
        if world.rank == 0:
            (folder / "checkpoints").mkdir(parents=True)
            name = f"checkpoint-{SAVED_AT:08d}"
            (folder / "checkpoints" / name).symlink_to(saved / name, target_is_directory=True)
        world.barrier()
        ending = [f"steps={END}", f"checkpoint.every={END}", "checkpoint.keep=2"]
        trained = checks.run(world, paths[row.case], folder, row.dtype, row.stage, ending, attempt=2)
        found[row] = trained, unequal(saved, folder / "checkpoints") if world.rank == 0 else None
        world.barrier()
    return found


def unequal(one: Path, other: Path) -> str | None:
    """Something in the last checkpoint's state that is not the same to the bit."""
    from pipeline.checkpoint.diff import diff
    from pipeline.checkpoint.format import MANIFEST, Manifest

    folders = [root / f"checkpoint-{END:08d}" for root in (one, other)]
    a, b = (Manifest.from_bytes((folder / MANIFEST).read_bytes()) for folder in folders)
    found = diff(folders[0], folders[1], (a, b))
    wrong = [f"{each.key} of {each.parameter}" for each in found.tensors] + [fact.name for fact in found.state]
    return next(iter(wrong), None)


def judge(row: Row, workers: int, whole: checks.Trained, went: checks.Trained, tensor: str | None) -> Cell:
    """One cell. Raises ArithmeticError when it went on with other samples or rates, or other bits where none may be."""
    where = f"{row} on {workers} workers"
    steps = list(range(SAVED_AT, END))
    if list(went.steps) != steps:
        raise ArithmeticError(f"{where}: went on with steps {list(went.steps)[:3]}..., not {steps[0]} to {steps[-1]}")
    for step in steps:
        if went.steps[step][1:] != whole.steps[step][1:]:
            raise ArithmeticError(f"{where}: step {step} has other samples or another learning rate")
    gaps = [difference(went.steps[k], whole.steps[k]) for k in steps]
    same = workers == row.workers
    if same and (max(gaps) > 0 or tensor):
        raise ArithmeticError(f"{where}: not bitwise: losses differ by {max(gaps):.1e}, {tensor or 'no tensor'}")
    return Cell(max(gaps), max(gaps) <= promise(row.case, row.dtype).each)


def matrix(plan: argparse.Namespace, folder: Path) -> tuple[dict[tuple[Row, int], Cell], list[str]]:
    """All cells that hold, and what is wrong with the others."""
    zero, cluster = {"stage": 1}, {"workers": 1, "threads_per_worker": 1}
    paths = {
        case: cases.write(folder, case, "toy", optim=OPTIMIZERS[case], zero=zero, cluster=cluster) for case in plan.case
    }
    rows = [Row(*row) for row in product(plan.case, plan.dtype, plan.stage, plan.saves)]
    whole: dict[Row, checks.Trained] = {}
    for count in plan.saves:
        print(f"without a break, {count} worker(s)", flush=True)
        whole |= workers.run(without_break, count, paths, rows, folder, timeout=3600)[0]
    cells, wrong = {}, []
    for count in plan.goes_on:
        print(f"going on with {count} worker(s)", flush=True)
        for row, (went, tensor) in workers.run(gone_on, count, paths, rows, folder, timeout=3600)[0].items():
            try:
                cells[row, count] = judge(row, count, whole[row], went, tensor)
            except ArithmeticError as error:
                wrong.append(str(error))
    return cells, wrong


def tables(plan: argparse.Namespace, cells: dict[tuple[Row, int], Cell]) -> Iterator[str]:
    """One table for each family and precision."""
    for case, dtype in product(plan.case, plan.dtype):
        of_case = {place: cell for place, cell in cells.items() if place[0][:2] == (case, dtype)}
        moved = [cell for (row, count), cell in of_case.items() if count != row.workers]
        same = sum(count == row.workers for row, count in of_case)
        told = f"{same} cells with the same number of workers: bitwise, losses and every tensor."
        if moved:
            gaps, beyond = [cell.relative for cell in moved], sum(not cell.kept for cell in moved)
            told += f" {len(moved)} others: largest {max(gaps):.1e}, median {statistics.median(gaps):.1e};"
            verdict = "met" if as_promised(of_case) else f"MISSED, {beyond} cells beyond it"
            told += f" promised: {promise(case, dtype).text}: {verdict}."
        header = ["ZeRO", "saved by", *(f"on {count}" for count in plan.goes_on)]
        lines = []
        for stage, saved in product(plan.stage, plan.saves):
            row = Row(case, dtype, stage, saved)
            lines.append([str(stage), str(saved), *(shown(cells.get((row, n)), saved == n) for n in plan.goes_on)])
        yield f"## {case}, {dtype}\n\n{told}\n\n{report.table(header, lines)}\n"


def shown(cell: Cell | None, same: bool) -> str:
    if cell is None:
        return "FAILED"
    return "bitwise" if same else f"{cell.relative:.1e}{'' if cell.kept else ' !'}"


def as_promised(cells: dict[tuple[Row, int], Cell]) -> bool:
    """Each cell, and the median over those of one family and precision that changed the number of workers."""
    moved: dict[tuple[str, str], list[float]] = {}
    for (row, count), cell in cells.items():
        if count != row.workers:
            moved.setdefault((row.case, row.dtype), []).append(cell.relative)
    medians = all(statistics.median(found) <= promise(*place).median for place, found in moved.items())
    return medians and all(cell.kept for cell in cells.values())


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare runs that went on with runs without a break")
    parser.add_argument("--case", choices=cases.RESUMED, action="append", help="instead of all; may be repeated")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="instead of both; may be repeated")
    parser.add_argument("--stage", type=int, choices=range(4), action="append", help="of ZeRO; may be repeated")
    parser.add_argument("--from", dest="saves", type=int, choices=WORKERS, action="append", help="workers that save")
    parser.add_argument("--to", dest="goes_on", type=int, choices=WORKERS, action="append", help="that go on")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/resume-matrix-<date>.md")
    plan = parser.parse_args()
    plan.case, plan.dtype = plan.case or list(cases.RESUMED), plan.dtype or list(DTYPES)
    plan.stage, plan.saves, plan.goes_on = plan.stage or range(4), plan.saves or WORKERS, plan.goes_on or WORKERS
    os.environ["OMP_NUM_THREADS"] = "1"
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="millstream-resume-matrix-") as folder:
        cells, wrong = matrix(plan, Path(folder))
    body = "\n".join([*tables(plan, cells), *(f"FAILED: {line}" for line in wrong)])
    print(body)
    if plan.save:
        facts = [
            f"Saved after {SAVED_AT} of {END} steps; told is the largest relative difference of a loss after that",
            "Samples and learning rate are equal in every step of every cell",
        ]
        print(f"saved in {report.save('resume-matrix', report.page('What a resume changes', facts, body, load))}")
    return 0 if not wrong and as_promised(cells) else 1


if __name__ == "__main__":
    raise SystemExit(main())
