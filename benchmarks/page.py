"""How long the page takes over long journals and many runs: as a file, live, and drawn by a browser.

    report               `millstream report`, the whole command
    dashboard, first     from the command to the answer that has every journal read to its end
    dashboard, list      one answer of the list afterwards; a page asks for it every two seconds
    dashboard, news      one answer with what 100 more steps have brought
    drawn                a browser (--browser PATH, through playwright) from opening the file to its last chart

Journals are made up: nine numbers a step, an evaluation and a checkpoint every 1,000 steps, a restart that does 500
steps again. Peak memory is VmHWM of the command's process. Journals were just written: the page cache has them.

    python benchmarks/page.py --save
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report

from pipeline.track.journal import Journal, Record

CASES = {"toy": [(1, 3_000), (3, 1_000)], "full": [(1, 1_000_000), (100, 10_000), (10, 100_000)]}
MILLSTREAM = [sys.executable, "-m", "pipeline"]
EVERY, AGAIN = 1000, 500
WAIT_SECONDS = 600.0


def records(steps: int) -> Iterator[Record]:
    """A run of two attempts."""
    killed = steps // 2
    for begin, end in ((0, killed), (max(killed - AGAIN, 0), steps)):
        yield {"kind": "attempt", "workers": 8, "restarts": int(begin > 0), "relaunch": begin > 0}
        yield {"kind": "restore", "step": begin, "notes": []} if begin else {"kind": "start", "step": 0, "notes": []}
        for step in range(begin, end):
            yield one(step)
            if (step + 1) % EVERY == 0:
                yield {"kind": "evaluation", "step": step + 1, "metrics": {"eval/test/accuracy": 0.9}, "seconds": 1.0}
                saved = {"checkpoint/bytes": 1e9, "checkpoint/save_seconds": 9.0, "checkpoint/blocked_seconds": 0.1}
                yield {"kind": "save", "step": step + 1, "path": f"checkpoint-{step + 1:08d}", "metrics": saved}
    yield {"kind": "end", "reason": "done", "step": steps}


def one(step: int) -> Record:
    """A step's record; numbers with as many digits as real ones have."""
    noise = (step * 2654435761 % 2**32) / 2**32
    metrics = {
        "train/loss": 2.0 + noise, "train/accuracy": noise / 3, "train/perplexity": 7.3 + noise,
        "train/grad_norm": 1.1 + noise, "optim/lr": 1e-3 * noise, "throughput/samples_per_second": 1000.0 + noise,
        "throughput/mfu": 0.4 + noise / 10, "time/step_seconds": 0.25 + noise / 100, "data/wait_seconds": noise / 100,
    }  # fmt: skip
    return {"kind": "step", "step": step, "metrics": metrics, "samples": step * 2654435761 % 2**48}


def write(folder: Path, runs: int, steps: int) -> list[Path]:
    """So many run folders, all with the same journal."""
    made = []
    for number in range(runs):
        made.append(folder / f"run-{number:03d}")
        made[-1].mkdir(parents=True)
        (made[-1] / "config.yaml").write_text(f"name: run-{number:03d}\nsteps: {steps}\nseed: {number}\n")
        if number:
            os.link(made[0] / "journal.jsonl", made[-1] / "journal.jsonl")
            continue
        journal, batch = Journal(made[0] / "journal.jsonl", 1), []
        for record in records(steps):
            if record["kind"] == "attempt" and record["restarts"]:
                journal.write_many(batch)
                journal.close()
                journal, batch = Journal(made[0] / "journal.jsonl", 2), []
            batch.append(record)
            if len(batch) == 10_000:
                journal.write_many(batch)
                batch = []
        journal.write_many(batch)
        journal.close()
    return made


def report_of(runs: list[Path], out: Path) -> tuple[float, float, float]:
    """(seconds, CPU seconds, peak memory in MB) of the command."""
    told = "import atexit; atexit.register(lambda: print(open('/proc/self/status').read()))"
    command = [sys.executable, "-c", f"{told}; from pipeline.cli import main; main()"]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    arguments = ["report", *map(str, runs), "--out", str(out)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, processor, _peak(done.stdout)


def dashboard_of(runs: list[Path]) -> dict[str, tuple[float, float]]:
    """{what: (seconds, bytes of the answer)}; "first": (seconds, CPU seconds), "memory": (0, peak in MB)."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [*MILLSTREAM, "dashboard", str(runs[0].parent), "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        match = re.search(r"http://\S+/", process.stdout.readline())
        assert match, "the dashboard did not say where it is"
        while any(row["read"] < 1 for row in json.loads(_ask(f"{match[0]}api/runs")[1])["runs"]):
            if time.perf_counter() - began > WAIT_SECONDS:
                raise TimeoutError("the dashboard did not read the journals")
            time.sleep(0.2)
        found = {"first": (time.perf_counter() - began, _processor(process.pid))}
        seconds, content = _fastest(f"{match[0]}api/runs")
        found["list"] = seconds, len(content)
        width = _width(json.loads(content)["runs"])
        query = f"{match[0]}api/run?name={runs[0].name}&width={width}"
        known = json.loads(_ask(query)[1])
        journal = Journal(runs[0] / "journal.jsonl", 2)
        journal.write_many(one(known["last_step"] + step) for step in range(100))
        journal.close()
        time.sleep(2.0)
        have = f"&begin={known['next']}&generation={known['generation']}&events={known['event_count']}"
        seconds, content = _fastest(query + have)
        assert json.loads(content)["last_step"] == known["last_step"] + 100
        found["news"] = seconds, len(content)
        found["memory"] = 0.0, _peak(Path(f"/proc/{process.pid}/status").read_text())
        return found
    finally:
        process.terminate()
        process.wait(30)


def drawn_by(browser: str, page: Path) -> float:
    """Seconds from opening the file until every chart is drawn and the browser is idle again."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        shown = opened.new_page(viewport={"width": 1280, "height": 900})
        began = time.perf_counter()
        shown.goto(page.as_uri())
        shown.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
        seconds = time.perf_counter() - began
        opened.close()
        return seconds


def row_of(folder: Path, runs: int, steps: int, browser: str | None) -> list[str]:
    """One row of the table."""
    made, out = write(folder, runs, steps), folder / "report.html"
    size = (made[0] / "journal.jsonl").stat().st_size * runs
    seconds, processor, peak = report_of(made, out)
    drawn = f"{drawn_by(browser, out):.2f}" if browser else "-"
    live = dashboard_of(made)
    megabytes = f"{out.stat().st_size / 1e6:.2f}"
    first = [f"{live['first'][0]:.2f} ({live['first'][1]:.2f})", f"{live['memory'][1]:,.0f}"]
    command = f"{seconds:.2f} ({processor:.2f})"
    answers = [f"{1000 * live[what][0]:,.0f} ({live[what][1] / 1e3:,.1f})" for what in ("list", "news")]
    return [f"{runs} x {steps:,}", f"{size / 1e6:,.0f}", command, f"{peak:,.0f}", megabytes, drawn, *first, *answers]


def _fastest(url: str) -> tuple[float, bytes]:
    """Of five."""
    return min((_ask(url) for _ in range(5)), key=lambda answer: answer[0])


def _processor(pid: int) -> float:
    """CPU seconds of a process so far."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _ask(url: str) -> tuple[float, bytes]:
    began = time.perf_counter()
    with urllib.request.urlopen(url, timeout=WAIT_SECONDS) as answer:
        content = answer.read()
    return time.perf_counter() - began, content


def _width(rows: list[dict[str, Any]]) -> int:
    from pipeline.track.page.thin import width_for

    return width_for(max(row["last_step"] for row in rows), len(rows))


def _peak(status: str) -> float:
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(match[1]) * 1024 / 1e6 if match else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the page")
    parser.add_argument("--size", choices=CASES, default="full")
    parser.add_argument("--browser", help="path of a Chromium; without it nothing is drawn")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/page-<date>.md")
    plan = parser.parse_args()
    load, rows = os.getloadavg()[0], []
    for runs, steps in CASES[plan.size]:
        with tempfile.TemporaryDirectory(prefix="millstream-page-") as folder:
            rows.append(row_of(Path(folder), runs, steps, plan.browser))
    header = ["runs x steps", "journals, MB", "report, s (CPU s)", "its peak, MB", "its file, MB", "drawn, s"]
    header += ["dashboard, first, s (CPU s)", "its peak, MB", "list, ms (kB)", "news, ms (kB)"]
    body = report.table(header, rows)
    print(body)
    if plan.save:
        facts = ["Each once, answers the fastest of five. Runs are drawn at the width that a page of all of them has"]
        print(f"saved: {report.save('page', report.page('The page', facts, body, load))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
