"""What every test relies on: an allow-list of skips, and who may run beside whom.

A skip hides a check, so one that is not in tests/allowed_skips.txt fails the whole run. `launch/test` runs two
tests at a time (pytest-xdist): those of one file never beside each other, because they share what a fixture has
started, and those that need root never beside each other, because they change the machine.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ALLOWED = Path(__file__).with_name("allowed_skips.txt")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def needs_root(item: pytest.Item) -> bool:
        return item.get_closest_marker("root") is not None

    for item in items:
        item.add_marker(pytest.mark.xdist_group("root" if needs_root(item) else item.location[0]))
    # What takes longest begins first, so that both end together: root's, the loop's, then those of the packages.
    items.sort(key=lambda item: (not needs_root(item), item.location[0].count("/")))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for node in _unexpected(terminalreporter):
        terminalreporter.write_line(f"skipped, and not in {ALLOWED.name}: {node}", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and _unexpected(reporter) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _unexpected(reporter: pytest.TerminalReporter) -> list[str]:
    allowed = {line.split("#")[0].strip() for line in ALLOWED.read_text().splitlines()} - {""}
    skipped = {_name(report.nodeid) for report in reporter.stats.get("skipped", [])}
    return sorted(skipped - allowed)


def _name(nodeid: str) -> str:
    """The node id as pytest has it; pytest-xdist adds `@` and the group."""
    file = nodeid.partition("::")[0]
    return nodeid.removesuffix(f"@{file}").removesuffix("@root")
