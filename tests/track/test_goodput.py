"""The ledger of a run's time: every second of every rank is counted once."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.track import goodput


def record(kind: str, attempt: int, time: float, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "attempt": attempt, "time": time, **fields}


def step(number: int, attempt: int, time: float, seconds: float = 1.0, wait: float = 0.25) -> dict[str, Any]:
    metrics = {"time/step_seconds": seconds, "data/wait_seconds": wait}
    return record("step", attempt, time, step=number, metrics=metrics)


def killed_once(noted: bool) -> list[dict[str, Any]]:
    """Two ranks: 10 s of start, 8 steps, killed; noticed after 2 s; 3 s later again from step 5; 5 steps."""
    first = [record("attempt", 1, 100.0, workers=2, relaunch=False), record("start", 1, 110.0, step=0)]
    first += [step(k, 1, 111.0 + k) for k in range(8)]
    spent = {"start": 0.0, "data": 2.0, "forward": 2.0, "backward": 3.0, "step": 1.0, "silent": 2.0}
    if noted:
        first.append(record("time", 1, 120.0, ranks={"0": spent, "1": spent}))
    first.append(record("failure", 1, 120.0, message="worker 1 was lost", exit_code=None))
    second = [record("attempt", 2, 123.0, workers=2, relaunch=True), record("restore", 2, 126.0, step=5)]
    second += [step(k, 2, 122.0 + k) for k in range(5, 10)]
    spent = {"restore": 1.0, "data": 1.25, "forward": 1.25, "backward": 1.5, "step": 1.0, "save": 0.5, "silent": 0.0}
    if noted:
        second.append(record("time", 2, 133.0, ranks={"0": spent, "1": spent}))
    second.append(record("end", 2, 133.0, reason="done", step=10))
    return first + second


@pytest.mark.parametrize("noted", [True, False])
def test_the_ledger_adds_up_to_the_wall_time_of_all_ranks(noted: bool) -> None:
    spent = goodput.ledger(killed_once(noted))
    assert sum(spent.values()) == pytest.approx(2 * (133.0 - 100.0))
    assert all(seconds >= 0 for seconds in spent.values())


def test_steps_done_again_and_the_time_to_notice_are_rework() -> None:
    spent = goodput.ledger(killed_once(noted=True))
    assert spent["rework"] == pytest.approx(2 * (3 * 1.0 + 2.0))  # steps 5, 6, 7, and 2 s of silence
    assert spent["useful"] == pytest.approx(2 * (6.0 - 3 * 0.75 + 3.75))
    assert spent["save"] == pytest.approx(1.0) and spent["restore"] == pytest.approx(2.0)
    assert spent["start"] == pytest.approx(2 * (10.0 + 3.0 + 3.5))


def test_a_pause_between_two_commands_is_idle() -> None:
    records = killed_once(noted=True)
    for each in records:
        if each["attempt"] == 2:
            each["time"] += 1000.0
            each.pop("relaunch", None)
    spent = goodput.ledger(records)
    assert spent["idle"] == pytest.approx(2 * 1003.0)
    assert sum(goodput.shares(records).values()) == pytest.approx(1.0)


def test_nothing_begun_has_no_shares() -> None:
    assert goodput.shares([]) == {}
