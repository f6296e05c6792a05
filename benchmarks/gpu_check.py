"""Whether Millstream trains on this machine's GPUs as it does on a CPU: one line per step, ok or failed, with a figure.

    devices     what there is, and the versions
    bandwidth   all-reduce over all local devices
    loading     pinned batches, rate of the loader's thread, host to device
    training    a convnet and a language model at ZeRO 0 to 3, in fp32, bf16 and fp16
    resume      saved on all devices, gone on with on all of them and on one, at every ZeRO stage
    memory      peak of each ZeRO stage

launch/gpu-check installs what is needed and calls this. Exit code 1 when a step failed, 78 when there is no GPU. With
--cpu the same code runs on CPU with gloo, at toy size: that shows that the code runs, and nothing about any GPU.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import cases
import report

if TYPE_CHECKING:
    from checks import Step, Trained

STEPS = ("devices", "bandwidth", "loading", "training", "resume", "memory")
SAVED_STAGE = 2
CPU_NOTE = "On CPU with gloo, at toy size: this shows that the code of the check runs. It says nothing about GPUs."
# Relative difference of losses that is allowed: ZeRO stages among each other, and a run that goes on elsewhere.
STAGES_AGREE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}
RESUME_AGREES = {("language", "fp32"): 1e-6, ("convnet", "fp32"): 1e-3}  # smooth; ReLU, where a kink can flip
LOW_PRECISION_AGREES = 1e-2


class CheckFailed(Exception):
    """A figure is not what it must be."""


class Check:
    """Options, the data, and what has been found so far."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        import torch

        self.cuda = not options.cpu
        self.training_steps, self.resume_steps = (10, 23) if self.cuda else (4, 9)
        self.workers: int = options.workers or (torch.cuda.device_count() if self.cuda else 2)
        self.stages: list[int] = options.stage or [0, 1, 2, 3]
        self.dtypes: list[str] = options.dtype or ["fp32", "bf16", *(["fp16"] if self.cuda else [])]
        self.runs = folder / "runs"
        self.paths: dict[str, Path] = {}
        self.peaks: dict[str, dict[int, int]] = {}  # language, by dtype and stage
        size = options.size or ("small" if self.cuda else "toy")
        for case, sizes in (("convnet", cases.CONVNETS), ("language", cases.LANGUAGES)):
            global_batch, micro_batch = sizes[size]["batch"]
            batch = max(global_batch, 2 * micro_batch * self.workers)
            # cuBLAS and cuDNN repeat themselves bit by bit only when asked; max-pooling's backward has no such form
            exact = self.cuda and case == "language"
            self.paths[case] = cases.write(folder, case, size, global_batch_size=batch, deterministic=exact)

    def devices(self) -> str:
        import torch.cuda.nccl

        if not self.cuda:
            return f"{self.workers} processes on {report.processor()}, {torch.backends.cpu.get_cpu_capability()}"
        names = set()
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            names.add(f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, sm_{facts.major}{facts.minor}")
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        return f"{torch.cuda.device_count()} x {' / '.join(sorted(names))}; CUDA {torch.version.cuda}, NCCL {nccl}"

    def bandwidth(self) -> str:
        import checks
        from workers import run

        mebibytes = 256 if self.cuda else 4
        rate = run(checks.bandwidth, self.workers, mebibytes)[0]
        if self.workers == 1:
            return "one device, nothing to reduce over"
        kind = "NCCL" if self.cuda else "gloo"
        return f"{kind} over {self.workers}: {rate:.2f} GB/s bus bandwidth, all-reduce of {mebibytes} MiB, sums right"

    def loading(self) -> str:
        import checks
        from workers import run

        found = run(checks.loading, self.workers, self.paths["convnet"])
        if any(rank["pinned"] != self.cuda for rank in found):
            raise CheckFailed(
                f"batches pinned: {[rank['pinned'] for rank in found]}, expected {self.cuda} on all ranks"
            )
        rate = f"{min(rank['samples_per_second'] for rank in found):.0f} images/s with one thread"
        if not self.cuda:
            return f"no device to copy to, so batches are not pinned; {rate}"
        slowest = min(found, key=lambda rank: rank["pinned_rate"])
        copies = f"{slowest['pinned_rate']:.1f} GB/s to the device (pageable {slowest['pageable_rate']:.1f} GB/s)"
        return f"batches pinned, {copies}; {rate}"

    def training(self, dtype: str) -> str:
        """All stages have finite losses, and the same ones."""
        import checks
        from workers import run

        trained = run(checks.training, self.workers, self.paths, dtype, self.training_steps, self.stages, self.runs)[0]
        figures = []
        for case, by_stage in trained.items():
            first = by_stage[self.stages[0]]
            worst = 0.0
            for stage, found in by_stage.items():
                losses = [step.loss for step in found.steps.values()]
                if len(losses) != self.training_steps or not all(map(math.isfinite, losses)) or not found.applied:
                    raise CheckFailed(f"{case} at ZeRO-{stage}: losses {losses}, {found.applied} steps applied")
                # fp16 looks for its loss scale first, and each stage may skip other steps meanwhile
                compared = [0] if dtype == "fp16" else list(found.steps)
                worst = max(worst, *(difference(found.steps[k], first.steps[k]) for k in compared))
            if not worst <= STAGES_AGREE[dtype]:
                raise CheckFailed(f"{case}: losses of the ZeRO stages differ by {worst:.1e}, > {STAGES_AGREE[dtype]:g}")
            rates = "/".join(f"{found.samples_per_second:.0f}" for found in by_stage.values())
            figures.append(f"{case} {rates} samples/s, stages within {worst:.0e}")
        self.peaks[dtype] = {stage: found.peak_bytes for stage, found in trained["language"].items()}
        return f"ZeRO {'/'.join(map(str, self.stages))}: {'; '.join(figures)}"

    def resume(self, dtype: str) -> str:
        """Losses after a checkpoint are those of the run without a break: same bits in the same place, else close."""
        import checks
        from workers import run

        stages = [SAVED_STAGE, *(stage for stage in self.stages if stage != SAVED_STAGE)]
        plan = (self.paths, dtype, self.resume_steps, stages, self.runs)
        straight, went = run(checks.reference, self.workers, *plan)[0]
        groups = {self.workers: went} | ({1: run(checks.resumed, 1, *plan)[0]} if self.workers > 1 else {})
        figures: dict[str, list[str]] = {case: [] for case in self.paths}
        for workers, by_case in groups.items():
            for case, by_stage in by_case.items():
                for stage, found in by_stage.items():
                    same = (workers, stage) == (self.workers, SAVED_STAGE)
                    exact = same and (not self.cuda or case == "language")
                    bound = 0.0 if exact else RESUME_AGREES.get((case, dtype), LOW_PRECISION_AGREES)
                    worst = compare(f"{case}, {workers} x ZeRO-{stage}", straight[case], found, bound, dtype)
                    figures[case].append(f"{workers}xZ{stage} {'same bits' if worst == 0 else f'{worst:.0e}'}")
        told = "; ".join(f"{case}: {', '.join(of_case)}" for case, of_case in figures.items())
        return f"from {self.workers}xZ{SAVED_STAGE} to {told}"

    def memory(self) -> str:
        if not self.cuda:
            children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
            return f"host memory only: a worker took up to {children:.2f} GiB, libraries included"
        if not self.peaks:
            raise CheckFailed("nothing was trained, so there is no peak to tell")
        told = []
        for dtype, by_stage in self.peaks.items():
            told += [f"{dtype} " + "/".join(f"{peak / 2**30:.2f}" for peak in by_stage.values()) + " GiB"]
        return f"language, peak of one device at ZeRO {'/'.join(map(str, self.stages))}: {'; '.join(told)}"


def difference(found: Step, expected: Step) -> float:
    """Relative, of two losses; infinite when one is not a number."""
    if found.loss == expected.loss:
        return 0.0
    gap = abs(found.loss / expected.loss - 1)
    return gap if math.isfinite(gap) else math.inf


def compare(where: str, expected: Trained, found: Trained, bound: float, dtype: str) -> float:
    """Largest relative difference of the losses after the checkpoint. Raises CheckFailed."""
    from checks import SAVED_AT

    steps = list(range(SAVED_AT, len(expected.steps)))
    if list(found.steps) != steps:
        raise CheckFailed(f"{where}: went on with steps {list(found.steps)[:3]}..., expected {steps[0]} to {steps[-1]}")
    for step in steps:
        if found.steps[step][1:] != expected.steps[step][1:]:
            raise CheckFailed(f"{where}: step {step} has other samples or another learning rate")
    first = difference(found.steps[SAVED_AT], expected.steps[SAVED_AT])
    worst = max(difference(found.steps[step], expected.steps[step]) for step in steps)
    if not worst <= bound or (dtype == "fp32" and not first <= 1e-6):
        raise CheckFailed(f"{where}: first loss differs by {first:.1e}, later ones by up to {worst:.1e} (> {bound:g})")
    return worst


def perform(name: str, function: Callable[[], str], details: list[str]) -> str:
    """One line: ok or failed, the step, its figure or the reason. The whole reason goes to `details`."""
    try:
        verdict, figure = "ok", function()
    except Exception as error:  # one failed step must not hide the others
        verdict, figure = "failed", str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        details.append(f"{name}: {error}")
    line = f"{verdict:8}{name:16}{figure}"
    print(line, flush=True)
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description="Check this machine's GPUs")
    parser.add_argument("--cpu", action="store_true", help="run the code on CPU with gloo; says nothing about GPUs")
    parser.add_argument("--workers", type=int, help="processes, one per device (default: all GPUs, or 2 with --cpu)")
    parser.add_argument("--size", choices=cases.SIZES, help="of the networks (default: small, or toy with --cpu)")
    parser.add_argument("--only", choices=STEPS, action="append", help="this step, instead of all; may be repeated")
    parser.add_argument("--stage", type=int, choices=range(4), action="append", help="ZeRO stage; may be repeated")
    parser.add_argument("--dtype", choices=tuple(STAGES_AGREE), action="append", help="precision; may be repeated")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/gpu-check-<date>.md")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if not options.cpu and not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU here. --cpu exercises the code of the check on CPU.", file=sys.stderr)
        return 78
    load, lines, details = os.getloadavg()[0], [], []
    if options.cpu:
        print(CPU_NOTE, flush=True)
    with tempfile.TemporaryDirectory(prefix="millstream-gpu-check-") as folder:
        check = Check(options, Path(folder))
        for name in [step for step in STEPS if step in (options.only or STEPS)]:
            if name in ("training", "resume"):
                for dtype in check.dtypes:
                    lines.append(perform(f"{name} {dtype}", partial(getattr(check, name), dtype), details))
            else:
                lines.append(perform(name, getattr(check, name), details))
    for detail in details:
        print(f"\n{detail}", file=sys.stderr)
    if options.save:
        body = "\n".join(["```", *lines, "```", *(f"\n```\n{detail}\n```" for detail in details)])
        title, facts = ("gpu-check --cpu", [CPU_NOTE]) if options.cpu else ("gpu-check", [])
        print(f"saved in {report.save('gpu-check', report.page(title, facts, body, load))}")
    if options.cpu:
        print(CPU_NOTE)
    return 1 if details else 0


if __name__ == "__main__":
    raise SystemExit(main())
