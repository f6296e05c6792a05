"""A million small samples from one .jsonl into shards: rate, memory, and whether kills on the way change a byte.

    millstream            `millstream data pack`, as a person runs it: checks, shuffles, writes, indexes with digests
    webdataset            the script that its documentation shows: ShardWriter over the lines, in their order
    litdata               `litdata.optimize` over ranges of lines, chunks of 32 MB, in their order

Every case is a command of its own. Rates count from its start to its end, imports too; "CPU" is the processor time of
it and its children. Peak memory is that of the largest process (ru_maxrss). With --kills the packing is killed
(SIGKILL) while it reads and again while it writes; what the third start gives is compared with an undisturbed packing.

litdata needs other versions of libraries than Millstream: --peers-python names an interpreter that has it.

    python benchmarks/packing.py --kills --peers-python /path/to/peers/bin/python --save
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import report

WEBDATASET = """
import json, sys, warnings
import webdataset
with webdataset.ShardWriter(sys.argv[2] + "/%06d.tar", maxsize=32e6, maxcount=10**9, verbose=0) as shards:
    for number, line in enumerate(open(sys.argv[1])):
        row = json.loads(line)
        shards.write({"__key__": f"{number:09d}", "txt": row["text"], "cls": row["label"]})
"""
LITDATA = """
import json, sys
from functools import partial
import litdata

def rows(path, part):
    first, last = part
    with open(path, "rb") as file:
        file.seek(first)
        while file.tell() < last:
            row = json.loads(file.readline())
            yield {"text": row["text"], "label": row["label"]}

if __name__ == "__main__":
    path, out, workers, parts = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
    litdata.optimize(partial(rows, path), parts, out, chunk_bytes="32MB", num_workers=workers)
"""


class Case(NamedTuple):
    """One command, and how many processes work in it."""

    name: str
    workers: int
    command: list[str]


class Cost(NamedTuple):
    """Of one command: seconds, those of the processor, bytes of the largest process."""

    seconds: float
    processor: float
    peak: int


def write_lines(path: Path, samples: int) -> None:
    """Text of 5 to 40 words, drawn from a seed, and one of ten classes."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(5000)]
    with path.open("w") as file:
        for number in range(samples):
            row = {"text": " ".join(rng.choices(words, k=rng.randint(5, 40))), "label": number % 10}
            file.write(json.dumps(row) + "\n")


def ranges(path: Path, count: int) -> list[tuple[int, int]]:
    """Bytes [first, last) of about equal parts that end with a line."""
    size, edges = path.stat().st_size, [0]
    with path.open("rb") as file:
        for part in range(1, count):
            file.seek(part * size // count)
            file.readline()
            edges.append(file.tell())
    return list(zip(edges, [*edges[1:], size]))


def cases(lines: Path, work: Path, peers_python: str | None, workers: list[int]) -> list[Case]:
    """All that is measured; each writes into `work`/out."""
    out = str(work / "out")
    pack = [sys.executable, "-m", "pipeline", "data", "pack", str(lines), out, "--kind", "table", "--threads", "1"]
    found = [Case("millstream", each, [*pack, *(["--workers", str(each)] if each > 1 else [])]) for each in workers]
    found.append(Case("webdataset", 1, [sys.executable, "-c", WEBDATASET, str(lines), out]))
    if peers_python:
        script = work / "litdata_pack.py"  # optimize's workers import it
        script.write_text(LITDATA)
        parts = json.dumps(ranges(lines, 32))
        found += [
            Case("litdata", each, [peers_python, str(script), str(lines), out, str(each), parts]) for each in workers
        ]
    return found


def run(case: Case, out: Path) -> Cost:
    """Run a command to its end."""
    shutil.rmtree(out, ignore_errors=True)
    if case.name != "millstream":
        out.mkdir()
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(case.command, stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{case.name}: exit {process.returncode}\n{said.read().decode()[-3000:]}")
    return Cost(time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def digest(folder: Path) -> str:
    """Of the names and bytes of all files but the card, which has the command in it."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "card.json":
            found.update(str(path.relative_to(folder)).encode())
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def killed_twice(case: Case, out: Path) -> tuple[str, list[str]]:
    """Kill a packing while it reads and while it writes, start it a third time: its digest, and what was there."""
    shutil.rmtree(out, ignore_errors=True)
    half_made, seen = out.with_name(f".{out.name}.packing"), []
    for pattern, word in (("spool/*.json", "units of the source"), ("out/train/*.tar", "shards")):
        process = subprocess.Popen(case.command, stdout=subprocess.DEVNULL, start_new_session=True)
        while len(list(half_made.glob(pattern))) < 2:
            if process.poll() is not None:
                raise RuntimeError(f"the packing ended ({process.returncode}) before it had two {word}")
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        seen.append(f"{len(list(half_made.glob(pattern)))} {word}")
    subprocess.run(case.command, check=True, stdout=subprocess.DEVNULL)
    return digest(out), seen


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the packing of small samples")
    parser.add_argument("--samples", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes that read")
    parser.add_argument("--repeats", type=int, default=3, help="of each; the fastest counts, and the largest peak")
    parser.add_argument("--kills", action="store_true", help="also kill a packing twice, at the largest size")
    parser.add_argument("--peers-python", help="an interpreter that has litdata")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/packing-<date>.md")
    plan = parser.parse_args()
    load, rows, facts = os.getloadavg()[0], [], []
    with tempfile.TemporaryDirectory(prefix="millstream-packing-") as folder:
        work = Path(folder)
        lines, out = work / "in.jsonl", work / "out"
        for samples in plan.samples:
            write_lines(lines, samples)
            facts.append(f"{samples:,} samples: {lines.stat().st_size / 1e6:,.0f} MB of .jsonl")
            every = cases(lines, work, plan.peers_python, plan.workers)
            costs: dict[tuple[str, int], list[Cost]] = {}
            for _ in range(plan.repeats):
                for case in every:
                    costs.setdefault((case.name, case.workers), []).append(run(case, out))
            for (name, workers), found in costs.items():
                seconds, processor = min(c.seconds for c in found), min(c.processor for c in found)
                peak = max(c.peak for c in found)
                cells = [f"{samples / seconds:,.0f}", f"{samples / processor:,.0f}", f"{peak / 1e6:,.0f}"]
                rows.append([name, str(workers), f"{samples:,}", *cells])
            if plan.kills and samples == plan.samples[-1]:
                case = every[0]
                run(case, out)
                whole = digest(out)
                again, seen = killed_twice(case, out)
                verdict = "the same bytes" if again == whole else "OTHER BYTES"
                facts.append(f"Killed with {seen[0]} done, then with {seen[1]} done: {verdict} as undisturbed")
    body = report.table(["what", "processes", "samples", "samples/s", "samples/CPU-s", "peak memory, MB"], rows)
    print(body, *facts, sep="\n")
    if plan.save:
        print(f"saved: {report.save('packing', report.page('Packing', facts, body, load))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
