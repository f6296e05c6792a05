"""Peak memory and time of an export, beside transformers' `save_pretrained` of the whole network.

A Llama with random weights is written as the checkpoint of 4 ranks at ZeRO-3, with the state of AdamW, by the project's
own code. Then, in processes of their own:

    millstream           checkpoint -> folder: reads and hashes all of it, the optimizer's state too, rounds and writes
    save_pretrained      the whole network, in memory already -> folder: only its writing is timed

Peak memory is VmHWM of the process, Python, torch and transformers included; the bound is 1.2 times the largest file
plus 200 MB. Files were just written, so they are read from the page cache.

    python benchmarks/export.py --save
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report

RANKS = 4
STATES = ("master", "exp_avg", "exp_avg_sq")
SIZES = {  # hidden, intermediate, layers
    "toy": (64, 128, 2),
    "1GB": (1536, 4096, 8),
}
VOCABULARY = 16_000


def network(size: str) -> Any:
    """transformers' configuration."""
    from transformers import LlamaConfig

    hidden, intermediate, layers = SIZES[size]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )


def write_checkpoint(folder: Path, size: str) -> tuple[Path, int]:
    """(folder of the checkpoint, bytes of the fp32 weights); each rank has an even part of every parameter."""
    import torch
    from transformers import LlamaForCausalLM

    from pipeline.checkpoint import format, fragments
    from pipeline.checkpoint.fragments import Fragment
    from pipeline.checkpoint.manifest import Manifest
    from pipeline.models import exported

    with torch.device("meta"):
        module = LlamaForCausalLM(network(size))
    staging = format.stage(folder, 1, 1)
    files, places = {}, []
    generator = torch.Generator().manual_seed(0)
    for rank in range(RANKS):
        name, held = f"rank-{rank:05d}.safetensors", []
        for parameter, tensor in module.named_parameters():
            begin, end = tensor.numel() * rank // RANKS, tensor.numel() * (rank + 1) // RANKS
            values = torch.randn(end - begin, generator=generator) / 50
            held += [Fragment(parameter, key, begin, values) for key in STATES]
        files[name] = format.write(staging / name, fragments.file_chunks(held))
        places += [fragment.place(name) for fragment in held]
    manifest = Manifest(
        step=1,
        attempt=1,
        world_size=RANKS,
        zero_stage=3,
        dtype="bf16",
        parameters={name: tuple(tensor.shape) for name, tensor in module.named_parameters()},
        fragments=tuple(places),
        files=files,
        aliases={"lm_head.weight": "model.embed_tokens.weight"},
        config={"name": "benchmark"},
        network=exported.describe(module),
    )
    path = format.commit(folder, staging, manifest, newest_attempt=lambda: 1)
    return path, sum(4 * tensor.numel() for tensor in module.parameters())


def peak_bytes() -> int:
    """VmHWM of this process."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def measured(what: str, source: Path, folder: Path, dtype: str, shard_bytes: int) -> dict[str, float]:
    """Of one export in this process: seconds, those of the processor, peak memory, size of the largest file."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

    assert GenerationConfig and LlamaForCausalLM  # imported now, for both alike, and not while the clock runs
    if what == "millstream":
        from pipeline.checkpoint.export import export

        began, processor = time.perf_counter(), time.process_time()
        export(source, folder, dtype=dtype, shard_bytes=shard_bytes)  # type: ignore[arg-type]
    else:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # in memory, as after training, not a map of the file
        began, processor = time.perf_counter(), time.process_time()
        model.save_pretrained(folder, max_shard_size=shard_bytes)
        for file in folder.iterdir():  # Millstream waits for the disk too
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"seconds": seconds, "processor": processor, "peak": peak_bytes(), "largest": largest}


def in_process(*arguments: Any) -> dict[str, float]:
    """`measured` in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps([str(argument) for argument in arguments])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(work: Path, checkpoint: Path, plan: argparse.Namespace) -> list[list[str]]:
    """One row a case; `save_pretrained` writes what the first export gave."""
    rows, whole = [], work / "whole"
    in_process("millstream", checkpoint, whole, "float32", 5_000_000_000)
    for dtype in ("float32", "bfloat16"):
        for shard_mb in plan.shard_mb:
            for what, source in (("millstream", checkpoint), ("save_pretrained", whole)):
                found = []
                for _ in range(plan.repeats):
                    found.append(in_process(what, source, work / "out", dtype, shard_mb * 1_000_000))
                    shutil.rmtree(work / "out")
                seconds, peak = min(each["seconds"] for each in found), max(each["peak"] for each in found)
                processor = min(each["processor"] for each in found)
                bound = 1.2 * found[0]["largest"] + 200e6
                verdict = f"{'met' if peak <= bound else 'MISSED'} ({bound / 1e6:,.0f})" if what == "millstream" else ""
                cells = [
                    f"{found[0]['largest'] / 1e6:,.0f}",
                    f"{peak / 1e6:,.0f}",
                    verdict,
                    f"{seconds:.2f}",
                    f"{processor:.2f}",
                ]
                rows.append([what, dtype, *cells])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure memory and time of an export")
    parser.add_argument("--size", choices=SIZES, default="1GB")
    parser.add_argument("--shard-mb", type=int, nargs="+", default=[5000, 250], help="largest files, in MB")
    parser.add_argument("--repeats", type=int, default=3, help="of each; the fastest counts, and the largest peak")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/export-<date>.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    plan = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if plan.one:
        what, source, folder, dtype, shard_bytes = json.loads(plan.one)
        print(json.dumps(measured(what, Path(source), Path(folder), dtype, int(shard_bytes))))
        return 0
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="millstream-export-") as folder:
        checkpoint, size = write_checkpoint(Path(folder) / "checkpoints", plan.size)
        read = sum(file.stat().st_size for file in checkpoint.iterdir())
        rows = rows_of(Path(folder), checkpoint, plan)
    header = ["what", "dtype", "largest file, MB", "peak memory, MB", "bound, MB", "seconds", "CPU seconds"]
    body = report.table(header, rows)
    print(body)
    if plan.save:
        facts = [
            f"Network: Llama, tied, {size / 1e9:.2f} GB in fp32; checkpoint of {RANKS} ranks, {read / 1e9:.2f} GB",
            f"Fastest of {plan.repeats}, largest peak of {plan.repeats}",
        ]
        print(f"saved: {report.save('export', report.page('Export', facts, body, load))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
