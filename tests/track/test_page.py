"""The page as a file and as a server, without a browser: what is in it, what is asked for, what is refused."""

from __future__ import annotations

import base64
import html
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from pipeline.errors import RunError
from pipeline.track.page import document, model, words
from pipeline.track.page.reading import Reading
from pipeline.track.page.serve import HEADERS, Server
from tests.test_benchmarks import cells, script
from tests.track.small_story import Story, crash_loop, killed_once, run_folder, shown

PATIENCE = 300  # seconds, on a busy machine
EVIL = "</script><img src=x onerror=alert(1)>\u2028<!-- & \"quoted\" 'single'"

OUTSIDE = (
    "../config.yaml",
    "00000010/../../config.yaml",
    "/etc/passwd",
    "00000010/link.png",
    "00000010/none.png",
    EVIL,
)


def told(page: str) -> dict[str, Any]:
    """The numbers of a page."""
    match = re.search(r'<script type="application/json" id="told">(.*?)</script>', page, re.DOTALL)
    assert match
    return json.loads(match[1])


def evil(folder: Path) -> Path:
    """A run whose name, configuration, metrics and messages are hostile."""
    run = run_folder(folder / EVIL.replace("/", "|"), 10, evaluate={"best": EVIL, "mode": EVIL}, note={EVIL: EVIL})
    story = Story(run)
    story.begin(0)
    story.steps(0, 10, metrics={f"train/{EVIL}": 1.0})
    story.write("evaluation", step=10, metrics={f"eval/{EVIL}": 0.5}, seconds=1.0)
    story.write("warning", message=EVIL)
    rows = [{EVIL: EVIL, "picture": {"picture": name}, "list": [EVIL]} for name in OUTSIDE]
    story.write("samples", step=10, sets={EVIL: rows})
    story.write(EVIL, message=EVIL)
    story.write("failure", message=f"giving up: {EVIL}\n{EVIL}", exit_code=1)
    return run


def test_a_report_holds_all_and_loads_nothing(tmp_path: Path) -> None:
    runs = [killed_once(tmp_path / "a"), killed_once(tmp_path / "b", seed=1), run_folder(tmp_path / "empty", 5)]
    size = document.write(runs, tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert size == len(page.encode()) and page.startswith("<!doctype html>")
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//)|url\(|@import""", page.partition('id="told"')[0])
    assert "default-src 'none'" in page and "connect-src 'none'" in page
    data = told(page)
    assert [run["name"] for run in data["runs"]] == ["a", "b", "empty"]
    assert [row["state"] for row in data["list"]] == ["done", "done", "not begun"]
    loss = data["runs"][0]["curves"]["train/loss"]
    assert loss["x"] == list(range(600)) and loss["mean"][420] is None and loss["bad"] == 1 and loss["points"] == 600
    assert set(data["runs"][0]["goodput"]) >= {"useful", "rework"} and data["runs"][0]["ranks"].keys() == {"0", "1"}
    assert data["runs"][0]["config"]["optim.lr"] == "0.001"


def test_samples_are_in_the_report_with_their_pictures(tmp_path: Path) -> None:
    run = shown(tmp_path / "a")
    data = told(document.report([run]))["runs"][0]
    assert [moment["step"] for moment in data["samples"]] == [200, 400, 600]
    assert "samples" not in {event[3] for event in data["events"]} and data["curves"]["system/n2/cpu"]["mean"] == [0.5]
    rows = data["samples"][2]["sets"]["test"]
    picture = (run / "samples" / "00000600" / "test-7-0.png").read_bytes()
    address = "data:image/png;base64," + base64.b64encode(picture).decode()
    assert rows[7]["picture"] == {"picture": "00000600/test-7-0.png", "data": address}
    assert [rows[7][name] for name in ("label", "prediction")] == [7, 6]
    many = [run, *(shown(tmp_path / str(number)) for number in range(12))]
    kept = [[moment["step"] for moment in each["samples"]] for each in told(document.report(many))["runs"]]
    assert kept == [[600]] * 13, "of many runs only the newest evaluation"


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = evil(tmp_path)
    (run / "samples" / "00000010").mkdir(parents=True)
    (run / "samples" / "00000010" / "link.png").symlink_to(run / "config.yaml")
    page = document.report([run])
    assert page.count("</script>") == len(document.SCRIPTS) + 1 and "<img" not in page
    assert f"<title>{html.escape(run.name)} - millstream</title>" in page
    data = told(page)
    own = data["runs"][0]
    assert own["name"] == run.name and f"train/{EVIL}" in own["curves"] and own["config"][f"note.{EVIL}"] == EVIL
    [samples] = own["samples"]
    assert [row["picture"] for row in samples["sets"][EVIL]] == [{"picture": name} for name in OUTSIDE], "none is read"
    assert [event[5] for event in own["events"]][-3:] == [EVIL, EVIL, f"giving up: {EVIL}"]


def test_no_script_makes_html_of_text() -> None:
    for name in document.SCRIPTS[1:]:
        code = (Path(document.__file__).parent / "assets" / name).read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", code), (
            name
        )


def test_the_report_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="name another file with --out"):
        document.write([run_folder(tmp_path / "a", 5)], tmp_path / "no" / "out.html")


def test_runs_of_the_same_name_are_told_apart() -> None:
    folders = [Path("/x/first/digits"), Path("/x/second/digits"), Path("/x/other")]
    assert [model.title(folder, folders) for folder in folders] == ["first/digits", "second/digits", "other"]


def test_a_kind_of_event_that_is_not_known_is_told_by_its_fields() -> None:
    assert words.event({"kind": "new", "attempt": 1, "host": "n7", "share": 0.5}) == ("host n7, share 0.5", "")
    assert words.event({"kind": "stall", "message": "worker 1", "stacks": {"1": "a\nb"}}) == (
        "worker 1",
        "worker 1\na\nb",
    )
    assert words.event({"kind": "empty"}) == ("empty", "")
    assert [words.duration(seconds) for seconds in (0.44, 37, 723, 12_000, 187_200)] == [
        "0.4 s", "37 s", "12 min 3 s", "3 h 20 min", "2 d 4 h",
    ]  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server of three runs, on loopback."""
    folder = tmp_path / "runs"
    shown(folder / "digits")
    crash_loop(folder / "broken")
    evil(folder)
    outside = killed_once(tmp_path / "outside")
    (folder / "link").symlink_to(outside)
    made = Server(folder, "127.0.0.1", 0)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    for reading in list(made.shelf.runs.values()):
        reading.all()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=PATIENCE)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()
    finally:
        connection.close()


def test_the_server_answers_and_says_nothing_but_that(server: Server) -> None:
    status, headers, body = ask(server, "/")
    assert status == 200 and told(body.decode())["live"] is True
    assert headers.items() >= HEADERS.items() and headers["Server"].strip() == "millstream"
    for part in ("default-src 'none'", "connect-src 'self'", "img-src 'self'", "frame-ancestors 'none'"):
        assert part in headers["Content-Security-Policy"]
    rows = json.loads(ask(server, "/api/runs")[2])["runs"]
    assert {row["name"]: row["state"] for row in rows} == {
        "digits": "done", "broken": "crash loop", EVIL.replace("/", "|"): "given up",
    }  # fmt: skip
    hostile = json.loads(ask(server, f"/api/run?name={quote(EVIL.replace('/', '|'))}")[2])
    assert hostile["last_step"] == 10
    status, headers, body = ask(server, "/api/picture?name=digits&file=00000600/test-7-0.png")
    picture = server.shelf.folder / "digits" / "samples" / "00000600" / "test-7-0.png"
    assert (status, headers["Content-Type"], body) == (200, "image/png", picture.read_bytes())
    status, headers, body = ask(server, "/api/runs", "HEAD")
    assert status == 200 and int(headers["Content-Length"]) > 0 and body == b""


@pytest.mark.parametrize(
    "path", ["/../outside", "/api/run?name=../outside", "/api/run?name=%2Fetc", "/api/run?name=link", "/api/run",
             "/api/run?name=digits%00", "/api/run?name=.", "/digits/config.yaml", "//etc/passwd", "/api/",
             *(f"/api/picture?name=digits&file={quote(name)}" for name in OUTSIDE), "/api/picture?name=digits",
             "/api/picture?name=link&file=00000600/test-7-0.png", "/api/picture?file=00000600/test-7-0.png"],
)  # fmt: skip
def test_what_is_not_listed_is_not_there(server: Server, path: str) -> None:
    assert ask(server, path)[0] == 404


def test_requests_that_are_refused(server: Server) -> None:
    assert ask(server, "/api/runs", Host="evil.example")[0] == 403
    assert ask(server, "/api/runs", Host="localhost:1")[0] == 200
    assert ask(server, "/api/runs", Host="[")[0] == 400 and ask(server, "http://[", Host="localhost")[0] == 400
    assert ask(server, "/api/runs", "POST")[0] == 501
    assert ask(server, "/api/run?name=digits&width=x")[0] == 400
    for width in ("-5", "0", "3", "1e9", str(10**30)):
        assert ask(server, f"/api/run?name=digits&width={width}")[0] in (200, 400)


def test_only_what_is_new_is_sent(server: Server) -> None:
    story = Story(run_folder(server.shelf.folder / "young", 1000))
    story.begin(0)
    story.steps(0, 250)
    reading = Reading(story.folder).all()
    whole = model.run("young", reading, 4)
    have = whole["next"], whole["generation"], whole["event_count"]
    assert have[0] == 248, "the last range is not full, it comes again"
    story.steps(250, 300)
    story.write("warning", message="late")
    reading.all()
    news = model.run("young", reading, 4, *have)
    assert news["begin"] == 248 and [event[5] for event in news["events"]] == ["late"]
    assert len(model.text(news["curves"])) < len(model.text(whole["curves"])) / 3
    after = model.run("young", reading, 4)
    for name, curve in after["curves"].items():
        kept = [at < 248 for at in whole["curves"].get(name, {"x": []})["x"]].count(True)
        for column in ("x", "mean"):
            joined = [*whole["curves"].get(name, {column: []})[column][:kept], *news["curves"][name][column]]
            assert joined == curve[column], (name, column)
    story.begin(200)  # goes back: what the page has is wrong now, so all comes
    reading.all()
    again = model.run("young", reading, 4, news["next"], news["generation"], news["event_count"])
    assert again["begin"] == 0 and again["curves"]["train/loss"]["x"][-1] == 196 and len(again["events"]) == 5


def test_the_command_serves_until_ctrl_c(tmp_path: Path) -> None:
    killed_once(tmp_path / "runs" / "digits")
    command = [sys.executable, "-m", "pipeline", "dashboard", str(tmp_path / "runs"), "--port", "0"]
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            assert process.stdout
            first = process.stdout.readline()
            match = re.search(r"1 run at http://127\.0\.0\.1:(\d+)/", first)
            assert match, first
            connection = http.client.HTTPConnection("127.0.0.1", int(match[1]), timeout=PATIENCE)
            connection.request("GET", "/api/runs")
            assert json.loads(connection.getresponse().read())["runs"][0]["name"] == "digits"
            taken = subprocess.run([*command[:-1], match[1]], capture_output=True, text=True)
            assert taken.returncode == 1 and "choose another port with --port" in taken.stderr
            process.send_signal(number)  # while a connection is open
            rest, _ = process.communicate(timeout=PATIENCE)
            assert (process.returncode, rest) == (0, "ended\n")
            connection.close()
        finally:
            process.kill()
            process.wait()


def test_the_report_command(tmp_path: Path) -> None:
    killed_once(tmp_path / "runs" / "digits")
    command = [sys.executable, "-m", "pipeline", "report", "runs/digits", "runs/digits"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("report.html: 1 run, "), done.stdout + done.stderr
    assert told((tmp_path / "report.html").read_text())["runs"][0]["name"] == "digits"
    wrong = subprocess.run([*command[:-2], "runs"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 1 and "runs in it: digits" in wrong.stderr


def test_the_list_of_runs(tmp_path: Path) -> None:
    killed_once(tmp_path / "runs" / "digits")
    run_folder(tmp_path / "runs" / "new", 5)
    command = [sys.executable, "-m", "pipeline", "runs"]
    wide = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=wide)
    shown = done.stdout.splitlines()
    assert re.match(r"digits +done +600/600 +test/accuracy 0.9552 +1 +\d+% +2023-11-1", shown[1]), shown
    assert re.match(r"new +not begun +0/5 +- +0 +- +- *$", shown[2]), shown
    found = json.loads(subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, check=True).stdout)
    assert [row["name"] for row in found] == ["digits", "new"] and found[0]["best"] == ["test/accuracy", 0.9551916, 600]
    assert found[1]["heard"] is None and found[1]["best"] is None


def test_the_page_is_measured(tmp_path: Path) -> None:
    (row, other) = cells(script("page.py", "--size toy", tmp_path))
    assert (row[0], other[0]) == ("1 x 3,000", "3 x 1,000") and row[5] == "-", "no browser was asked for"
    assert all(float(cell.split()[0]) > 0 for each in (row, other) for cell in (*each[1:5], *each[6:]))
