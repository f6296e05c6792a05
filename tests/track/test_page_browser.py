"""The page in a real Chromium: looks, errors, accessibility as axe judges it, keyboard and mouse, while a run trains.

Chromium is Debian's, installed when it is missing (therefore `root`). Screenshots stay in pytest's temporary folder.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from pipeline.track.page import document
from tests import debian, small_data
from tests.test_train import RESNET
from tests.track.small_story import Story, crash_loop, killed_once, run_folder, shown
from tests.track.test_page import EVIL, evil

pytestmark = [pytest.mark.slow, pytest.mark.root]

WIDTHS, SCHEMES = (400, 1280), ("light", "dark")
PATIENCE_MS = 300_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    debian.require(("chromium",), ("chromium",))
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield opened
        opened.close()


@contextmanager
def opened(browser: Browser, url: str, width: int = 1280, scheme: Any = "light") -> Iterator[Page]:
    """A page that has been loaded; fails when it said anything to the console, threw, or asked elsewhere."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
    page.on("request", lambda asked: wrong.append(asked.url) if not asked.url.startswith(url) else None)
    page.goto(url)
    yield page
    context.close()
    assert wrong == []


def serious(page: Page) -> list[str]:
    """Faults that axe-core calls serious or critical, each with the elements that have it."""
    faults = Axe().run(page).response["violations"]
    assert isinstance(faults, list)
    return [
        f"{fault['id']}: {fault['help']}: {[node['html'][:200] for node in fault['nodes']][:3]}"
        for fault in faults
        if fault["impact"] in ("serious", "critical")
    ]


def drawn(page: Page) -> list[int]:
    """By chart: pixels of its canvas that are no background, axis or grid, but of a colour."""
    pictures = page.locator("figure canvas").all()
    counts = []
    for picture in pictures:
        pixels = np.asarray(Image.open(io.BytesIO(picture.screenshot())).convert("RGB")).astype(int)
        counts.append(int((np.ptp(pixels, axis=2) > 40).sum()))
    return counts


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of four runs, one of them hostile."""
    folder = tmp_path_factory.mktemp("report")
    runs = [
        shown(folder / "digits"),
        killed_once(folder / "digits-2", 1),
        crash_loop(folder / "broken"),
        evil(folder),
    ]
    document.write(runs, folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_file_looks_right_and_axe_finds_no_serious_fault(
    browser: Browser, file: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    with opened(browser, file.as_uri(), width, scheme) as page:
        assert page.locator("figure canvas").count() == 12 and min(drawn(page)) > 10
        expect(page.locator("#verdict .state")).to_have_text(["done", "done", "crash loop", "given up"])
        page.get_by_text("as a table").first.click()
        page.get_by_text("attempts as a table").first.click()
        page.get_by_text("checkpoint: 3 more").click()
        expect(page.locator("figure canvas")).to_have_count(15)  # what is folded away is drawn when it is unfolded
        assert serious(page) == []
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{wide} pixels have to be scrolled to the side"
        picture = page.screenshot(path=tmp_path / "page.png", full_page=True)
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("L"))
        assert (np.median(pixels) > 200) if scheme == "light" else (np.median(pixels) < 60)


def test_hostile_text_is_shown_as_text(browser: Browser, file: Path) -> None:
    with opened(browser, file.as_uri()) as page:
        assert page.locator("#samples img").count() == page.locator("img").count() == 8
        assert page.evaluate("[...document.images].filter((each) => each.src.startsWith('data:image/png')).length") == 8
        for place in ("#events", "#runs", "#charts", "#config", "#verdict"):
            assert EVIL[9:].partition("\u2028")[0] in page.locator(place).inner_text(), place
        assert page.title().startswith("4 runs")


def test_the_policy_in_the_file_stops_what_is_not_the_page_s(browser: Browser, file: Path, tmp_path: Path) -> None:
    """A script that somebody put into the file does not run, and the file can ask nobody."""
    changed = tmp_path / "changed.html"
    changed.write_text(file.read_text().replace("</body>", "<script>document.title = 'taken'</script></body>"))
    page = browser.new_page()
    page.goto(changed.as_uri())
    assert page.title().startswith("4 runs") and page.locator("figure canvas").count() == 12
    asked = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => String(error))")
    assert "Failed to fetch" in asked
    page.close()


def test_keyboard_and_mouse(browser: Browser, file: Path) -> None:
    with opened(browser, file.as_uri()) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        plot = page.get_by_role("slider", name="train/loss by step")
        plot.focus()
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        first = json.loads(plot.get_attribute("aria-valuenow") or "")
        assert 1 <= first <= 8 and (plot.get_attribute("aria-valuetext") or "").startswith(f"step {first}: digits 2.")
        page.keyboard.press("End")
        assert json.loads(plot.get_attribute("aria-valuenow") or "") >= 592
        for _ in range(3):
            page.keyboard.press("+")
        steps = page.evaluate("charts.get('train/loss').u.data[0]")
        near = [step for step in steps if step >= 560]
        assert near == list(range(near[0], near[-1] + 1)), "close enough, every step is there"
        page.keyboard.press("Escape")
        assert page.evaluate("zoom") is None
        box = page.locator(".plot .u-over").first.bounding_box()
        assert box
        page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 50)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
        page.mouse.up()
        seen = page.evaluate("[...charts.values()].map((chart) => chart.u && chart.u.scales.x.min)")
        assert all(abs(low - 150) < 20 for low in seen if low is not None), "all charts show the same steps"
        page.locator(".plot .u-over").first.dblclick()
        assert page.evaluate("zoom") is None
        for button in page.locator("figure .top button:visible").all():
            button.press("Enter")
        assert page.evaluate("charts.get('train/loss').u.scales.y.distr") == 3
        page.get_by_role("checkbox", name="show broken").uncheck()
        expect(page.locator("#verdict .card")).to_have_count(3)
        page.get_by_role("button", name="step", exact=True).press("Enter")
        assert page.locator("#runs tbody th").first.inner_text().startswith("digits")
        page.get_by_role("button", name="step", exact=True).press("Enter")
        assert page.locator("#runs tbody td:nth-child(4)").first.inner_text() == "10 of 10"
        slider = page.get_by_role("slider", name="evaluation of digits")
        slider.press("ArrowLeft")
        assert slider.get_attribute("aria-valuetext") == "step 400"
        assert (
            page.locator("#samples .sample.wrong").count() == 5 and "x + x +" in page.locator("#samples").inner_text()
        )
        page.get_by_label("Filter").fill("crash")
        expect(page.locator("#runs tbody tr")).to_have_count(1)
        page.get_by_label("Kind", exact=True).select_option("skip")
        expect(page.locator("#events tbody tr")).to_have_count(2)


def test_a_hundred_runs(browser: Browser, tmp_path: Path) -> None:
    runs = []
    for number in range(100):
        runs.append(run_folder(tmp_path / f"run-{number:02d}", 200, seed=number))
        story = Story(runs[-1], number)
        story.begin(0)
        story.steps(0, 200)
    document.write(runs, tmp_path / "report.html")
    with opened(browser, (tmp_path / "report.html").as_uri()) as page:
        assert min(drawn(page)) > 10 and page.locator("#runs tbody tr").count() == 100
        assert "and 92 more" in page.locator(".readout").first.inner_text()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """`millstream dashboard` of a folder, ended with Ctrl-C."""
    command = [sys.executable, "-m", "pipeline", "dashboard", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout
        match = re.search(r"http://\S+/", process.stdout.readline())
        assert match
        yield match[0]
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, rest) == (0, "ended\n")


def until(page: Page, code: str, wanted: Callable[[Any], bool]) -> Any:
    """What the page says to `code` once it is what is wanted."""
    end = time.monotonic() + PATIENCE_MS / 1000
    while not wanted(found := page.evaluate(code)):
        assert time.monotonic() < end, f"{code} stayed {found}"
        page.wait_for_timeout(200)
    return found


def test_the_live_page_follows_journals(browser: Browser, tmp_path: Path) -> None:
    shown(tmp_path / "digits")
    story = Story(run_folder(tmp_path / "young", 1000), 5, now=time.time())
    story.begin(0)
    story.steps(0, 250)
    seen = "runs.has('young') ? runs.get('young').curves['train/loss'].x.at(-1) : -1"
    with served(tmp_path) as url, opened(browser, url) as page:
        until(page, seen, lambda last: last == 249)
        until(page, "[...document.images].map((each) => each.naturalWidth)", lambda widths: widths == [8] * 8)
        page.get_by_role("checkbox", name="show young").focus()
        story.show(200)
        story.steps(250, 330)
        until(page, seen, lambda last: last == 329)
        assert page.evaluate("runs.get('young').curves['train/loss'].x") == list(range(330))
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "show young", "the focus stays"
        expect(page.locator("#samples img")).to_have_count(16)
        story.begin(300)
        story.steps(300, 310)
        until(page, seen, lambda last: last == 309)
        assert page.evaluate("runs.get('young').curves['train/loss'].x") == list(range(310))
        crash_loop(tmp_path / "late")
        page.get_by_role("checkbox", name="show late").check(timeout=PATIENCE_MS)
        expect(page.locator("#verdict .card")).to_have_count(3)
        assert serious(page) == []
        page.reload()
        expect(page.locator("#verdict .card")).to_have_count(3)
        page.screenshot(path=tmp_path / "live.png", full_page=True)


def test_the_live_page_says_when_nobody_answers(browser: Browser, tmp_path: Path) -> None:
    killed_once(tmp_path / "digits")
    page = browser.new_page()
    with served(tmp_path) as url:
        page.goto(url)
        expect(page.locator("#verdict .card")).to_have_count(1)
    expect(page.locator("#made")).to_contain_text("no answer from the server", timeout=PATIENCE_MS)
    page.close()


def test_the_live_page_follows_a_run_that_trains(browser: Browser, tmp_path: Path) -> None:
    """From before its folder is there until it is done."""
    pictures, runs = small_data.images(tmp_path / "pictures"), tmp_path / "runs"
    task = RESNET | {"name": "tests.slow_task"}
    small_data.config(tmp_path / "toy.yaml", task, pictures, runs=str(runs), steps=12, cluster={"workers": 0})
    runs.mkdir()
    command = [sys.executable, "-m", "pipeline", "train", str(tmp_path / "toy.yaml")]
    with served(runs) as url, opened(browser, url) as page, (tmp_path / "output").open("w") as output:
        training = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            state = "list.length ? [list[0].state, list[0].last_step] : ['', 0]"
            early = until(page, state, lambda found: found[0] == "training" and 0 < found[1] < 12)
            later = until(page, state, lambda found: found[1] > early[1])
            assert later[1] <= 12
            assert training.wait(timeout=200) == 0, (tmp_path / "output").read_text()
        finally:
            training.kill()
            training.wait()
        until(page, state, lambda found: found == ["done", 12])
        until(page, "runs.get('toy').curves['train/loss'].x", lambda steps: steps == list(range(12)))
        expect(page.locator("#verdict .state")).to_have_text(["done"])
