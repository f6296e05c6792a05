"""What `millstream doctor` says of seeded mutations of the shipped configurations, beside what a real run does.

    configs/*.yaml -> a seed draws: which file, what is changed -> doctor: would it fail?
                                                              '-> `train` in one plain process, two steps: does it?

Data are the first samples of the real sets (`launch/example-data digits`, speech, stdlib, stdlib-long, mnist); networks
are as large as the configurations have them, and a process has the memory of one worker. A configuration fails when it
is refused, when Ray could not hold its workers on this machine, or when the run ends with an error. What takes more
than TIMEOUT seconds of the processor is undecided, and said so.

    python benchmarks/doctor.py --seed 1 --save
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import doctor_mutations as mutations
import report

ROOT = Path(__file__).parents[1]
COUNT, TRAIN, TEST, STEPS, TIMEOUT = 200, 192, 32, 2, 20
AGAIN = 3  # exit code of a process that another has to go on for
SETS = ("digits", "speech", "stdlib", "stdlib-long", "mnist")


class Undecided(BaseException):
    """It takes too long."""


def small_set(source: Path, target: Path, count: int) -> None:
    """The first samples of a packed set in two shards, with the files beside the tars."""
    import io
    import shutil
    import tarfile

    from pipeline.data import index
    from pipeline.data.reader import open_dataset

    target.mkdir(parents=True)
    with open_dataset(source) as dataset:
        count = min(count, len(dataset))
        for shard in range(2):
            with tarfile.open(target / f"shard-{shard}.tar", "w") as tar:
                for number in range(shard * count // 2, (shard + 1) * count // 2):
                    sample = dataset.sample(number)
                    for name in sample.fields:
                        content = bytes(sample.raw(name))
                        member = tarfile.TarInfo(f"{number:05d}.{name}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    for path in source.glob("*.json"):
        shutil.copy(path, target)
    index.build(target)


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises Undecided in what takes more seconds of the processor, whatever else the machine does."""

    def ring(number: int, frame: object) -> None:
        raise Undecided

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def said(path: Path, folder: Path) -> list[str]:
    """Errors of the doctor. Its real step, which the command takes in a process of its own, is taken in this one."""
    from pipeline import config as configs
    from pipeline.doctor import step
    from pipeline.doctor.examine import examine

    found = examine(path, quick=True)
    if not found.fails:
        config = configs.load(path)
        small = step.shrunken(config, found.figures.get("network", {}).get("parameters"))
        if small is not None:
            one = folder / "step.yaml"
            one.write_text(configs.dump(small.model_copy(update={"runs": folder / "step-runs"})))
            step.judge(found, 0, json.dumps(step.run(one)), "")
    return [f"{each.problem.place}: {each.problem.message}" for each in found.of("error")]


def truth(path: Path, folder: Path) -> str | None:
    """What a real run of two steps dies of, or None."""
    from pipeline import config as configs
    from pipeline.cluster import ray, worker
    from pipeline.cluster.board import Board
    from pipeline.doctor.examine import before

    try:
        config = configs.resolve(configs.load(path))
        if problems := before(config).of("error"):
            return str(problems[0].problem)
        if config.cluster.workers:
            ray.require(config, {"CPU": float(len(os.sched_getaffinity(0)))})
        Path(config.runs).mkdir(parents=True, exist_ok=True)
        alone = config.cluster.model_copy(update={"workers": 0, "min_workers": None})
        config = config.model_copy(update={"steps": min(config.steps, STEPS), "cluster": alone})
        run = folder / "run"
        run.mkdir()
        board = Board(run / "journal.jsonl", 1)
        try:
            outcome = worker.run(config, run, 1, board.deliver)
        finally:
            board.close()
        return None if outcome == "done" else f"ended as {outcome}"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def results_in(work: Path) -> list[dict[str, Any]]:
    """All results so far."""
    return [json.loads(line) for path in work.glob("results-*.jsonl") for line in path.read_text().splitlines()]


def child(plan: Path, results: Path, share: int) -> None:
    """Judge the mutations that nobody has claimed; leaves with AGAIN after one that took too long."""
    import psutil

    have = psutil.virtual_memory().total // 2  # the shipped configurations have two workers
    resource.setrlimit(resource.RLIMIT_DATA, (have, have))
    entries = json.loads(plan.read_text())
    done = {each["number"] for each in results_in(plan.parent)}
    for number in (number for number in range(len(entries)) if number not in done):
        try:
            (plan.parent / f"{number}.claimed").touch(exist_ok=False)
        except FileExistsError:
            continue
        entry: dict[str, Any] = {"number": number, "said": None, "truth": "the process died", "undecided": False}
        with tempfile.TemporaryDirectory(prefix="millstream-mutation-", dir=plan.parent) as folder:
            path = plan.parent / f"{number}.yaml"
            path.write_text(entries[number]["text"])
            mark = plan.parent / f"at-{share}.json"
            began = time.perf_counter()
            try:
                with at_most(TIMEOUT):
                    entry["said"] = said(path, Path(folder))
                entry["seconds"] = time.perf_counter() - began
                mark.write_text(json.dumps(entry))
                with at_most(TIMEOUT):
                    entry["truth"] = truth(path, Path(folder))
            except Undecided:
                entry["undecided"] = True
        with results.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        mark.unlink(missing_ok=True)
        if entry["undecided"]:
            raise SystemExit(AGAIN)
        gc.collect()


def judge_all(entries: list[dict[str, Any]], work: Path, processes: int, seconds: float) -> list[dict[str, Any]]:
    """Results of all, or of as many as so many seconds allow, each with its entry.

    Processes that end before all is done are started again.
    """
    give_up = time.monotonic() + seconds
    plan = work / "plan.json"
    plan.write_text(json.dumps(entries))

    def start(share: int) -> subprocess.Popen[bytes]:
        log = (work / f"log-{share}").open("ab")
        command = [sys.executable, str(Path(__file__).resolve()), "--child", str(plan), str(share)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        return subprocess.Popen(command, cwd=work, stdout=log, stderr=log, env=environment)

    running = {share: start(share) for share in range(processes)}
    while running:
        time.sleep(0.5)
        if time.monotonic() > give_up:
            for process in running.values():
                process.kill()
                process.wait()
            break
        for share, process in list(running.items()):
            if process.poll() is None:
                continue
            if not process.returncode:
                del running[share]
                continue
            if process.returncode != AGAIN:  # it died of one: which, and of what the doctor had said
                mark = work / f"at-{share}.json"
                if not mark.exists():
                    raise SystemExit((work / f"log-{share}").read_text()[-2000:])
                with (work / f"results-{share}.jsonl").open("a") as file:
                    file.write(mark.read_text() + "\n")
                mark.unlink()
            running[share] = start(share)
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{len(results_in(work))} of {len(entries)}")
    return sorted((entries[result["number"]] | result for result in results_in(work)), key=lambda r: r["number"])


def table(results: list[dict[str, Any]]) -> tuple[list[str], str]:
    """Facts, and the Markdown of what came of each kind, with every miss and every false alarm."""
    decided = [r for r in results if not r["undecided"]]
    fails, runs = [r for r in decided if r["truth"]], [r for r in decided if not r["truth"]]
    missed, alarms = [r for r in fails if not r["said"]], [r for r in runs if r["said"]]
    later = [r for r in fails if not r["truth"].startswith("InvalidConfig")]
    seconds = sorted(r["seconds"] for r in decided if "seconds" in r)
    facts = [
        f"{len(results)} mutations judged: {len(fails)} fail, {len(runs)} do not, "
        f"{len(results) - len(decided)} undecided (over {TIMEOUT} s of the processor)",
        f"Found {len(fails) - len(missed)} of {len(fails)} that fail; {len(alarms)} false alarms on {len(runs)}",
        f"{len(fails) - len(later)} of those that fail are refused when the configuration is read, by code that the "
        f"doctor shares, so they are found by construction; of the {len(later)} that fail later it found "
        f"{sum(bool(r['said']) for r in later)}",
        f"Seconds of the doctor, in a process that has its libraries: median {seconds[len(seconds) // 2]:.1f}, "
        f"longest {seconds[-1]:.1f}",
    ]
    kinds = collections.Counter(r["kind"] for r in decided)
    rows = [
        [
            kind,
            str(sum(r["kind"] == kind for r in fails)),
            str(sum(r["kind"] == kind and bool(r["said"]) for r in fails)),
            str(sum(r["kind"] == kind for r in runs)),
            str(sum(r["kind"] == kind for r in alarms)),
        ]
        for kind in sorted(kinds)
    ]
    body = report.table(["mutation", "fail", "found", "do not fail", "false alarms"], rows)
    for title, chosen in (
        ("Missed", missed),
        ("False alarms", alarms),
        ("Undecided", [r for r in results if r["undecided"]]),
    ):
        if chosen:
            body += f"\n\n{title}:\n"
            for r in chosen:
                why = r["said"][0] if r["said"] else r["truth"]
                body += f"\n- {r['config']}, {r['kind']}: {r['what']}" + ("" if r["undecided"] else f" -> {why[:200]}")
    return facts, body


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="where launch/example-data has packed")
    parser.add_argument("--note", action="append", default=[], help="a fact that stands above the result")
    parser.add_argument("--seconds", type=float, default=math.inf, help="judge as many as can be in so many")
    parser.add_argument("--work", type=Path, help="folder of a measurement that was broken off, to go on in")
    parser.add_argument("--keep", type=Path, help="write all results there, as JSON")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        plan, share = given.child
        child(Path(plan), Path(plan).parent / f"results-{share}.jsonl", int(share))
        return
    load_before = os.getloadavg()[0]
    place = (
        contextlib.nullcontext(given.work) if given.work else tempfile.TemporaryDirectory(prefix="millstream-doctor-")
    )
    with place as folder:
        work = Path(folder)
        there = [name for name in SETS if (given.data / name / "train").is_dir()]
        for name in there if not given.work else ():
            small_set(given.data / name / "train", work / "data" / name / "train", TRAIN)
            small_set(given.data / name / "test", work / "data" / name / "test", TEST)
        texts = {path.name: path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))}
        texts = {name: text for name, text in texts.items() if any(f"data/{each}/" in text for each in there)}
        results = judge_all(mutations.draw(texts, given.seed, given.count), work, given.processes, given.seconds)
    if given.keep:
        given.keep.write_text(json.dumps(results, indent=1))
    facts, body = table(results)
    facts = [f"Seed {given.seed}, {given.count} drawn; configurations: {', '.join(texts)}", *facts, *given.note]
    text = report.page("Mutations of the shipped configurations", facts, body, load_before)
    print(text)
    if given.save:
        print(f"saved to {report.save('doctor', text)}")


if __name__ == "__main__":
    main()
