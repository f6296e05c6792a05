"""What every test relies on: an allow-list of skips, and in which order they run.

A skip hides a check, so one that is not in tests/allowed_skips.txt fails the whole run. `launch/test` runs two tests at
a time (pytest-xdist), those of one file one after the other, because they share what a fixture has started. Slow ones,
and those that need root, run alone when they kill what runs, or wait for what is lost to be noticed in time.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ALLOWED = Path(__file__).with_name("allowed_skips.txt")
ALONE = ("tests/cluster/", "tests/test_chaos.py")
ALONE += ("tests/test_benchmarks.py::test_a_fault_stands_beside_a_cold_start",)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that both end together: the loop's tests, then those of the packages."""
    for item in items:
        if item.nodeid.startswith(ALONE):
            item.add_marker("alone")
    items.sort(key=lambda item: item.location[0].count("/"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for node in _unexpected(terminalreporter):
        terminalreporter.write_line(f"skipped, and not in {ALLOWED.name}: {node}", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and _unexpected(reporter) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _unexpected(reporter: pytest.TerminalReporter) -> list[str]:
    allowed = {line.split("#")[0].strip() for line in ALLOWED.read_text().splitlines()} - {""}
    return sorted({report.nodeid for report in reporter.stats.get("skipped", [])} - allowed)
