"""The ledger of a run's time: every second of every rank is counted once."""

from __future__ import annotations

import random
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


def test_steps_after_the_last_note_of_a_killed_driver_count() -> None:
    """One rank, noted after 30 s, killed after 50: the steps in between are known one by one."""
    records = [record("attempt", 1, 0.0, workers=1, relaunch=False), record("start", 1, 10.0, step=0)]
    records += [step(k, 1, 11.0 + k) for k in range(20)]
    spent = {"start": 10.0, "data": 5.0, "forward": 14.0, "silent": 1.0}
    records.append(record("time", 1, 30.5, ranks={"0": spent}))
    records += [step(k, 1, 11.5 + k) for k in range(20, 38)]  # one save of half a second among them
    counted = goodput.ledger(records)
    assert sum(counted.values()) == pytest.approx(48.5)
    assert counted["data"] == pytest.approx(5.0 + 18 * 0.25) and counted["save"] == 0
    assert counted["useful"] == pytest.approx(38 - 38 * 0.25, abs=0.5) and counted["rework"] == pytest.approx(
        0, abs=0.5
    )


def test_steps_are_undone_by_whichever_attempt_goes_on_before_them() -> None:
    """The attempt after the killed one is killed too, before it has read its checkpoint."""
    lost = [record("attempt", 2, 121.0, workers=2, relaunch=True), record("failure", 2, 122.0, exit_code=None)]
    records = killed_once(noted=True)
    expected = goodput.ledger(records)["useful"]
    for each in records:
        each["attempt"] += each["attempt"] == 2
    at = next(place for place, each in enumerate(records) if each["attempt"] == 3)
    spent = goodput.ledger(records[:at] + lost + records[at:])
    assert spent["useful"] == pytest.approx(expected)
    assert sum(spent.values()) == pytest.approx(2 * (133.0 - 100.0))


def under_chaos(seed: int) -> list[dict[str, Any]]:
    """Two ranks; attempts of random lengths that end in random ways: by a failure, a stop, a killed driver."""
    draw, records, now, saved, killed = random.Random(seed), [], 1000.0, 0, False
    for attempt in range(1, draw.randint(2, 12)):
        relaunch = attempt > 1 and not killed
        now += draw.uniform(0, 9)
        records.append(record("attempt", attempt, now, workers=2, relaunch=relaunch))
        began = now = now + draw.uniform(0, 9)
        if draw.random() < 0.8:
            records.append(record("restore" if saved else "start", attempt, now, step=saved))
            spent = {"start": now - began, "data": 0.0, "forward": 0.0, "save": 0.0}
            for number in range(saved, saved + draw.randint(0, 90)):
                seconds, wait = draw.uniform(0.1, 1.0), draw.uniform(0, 0.1)
                now += seconds
                spent["data"] += wait
                spent["forward"] += seconds - wait
                records.append(step(number, attempt, now, seconds, wait))
                if draw.random() < 0.2:
                    spent["save"] += 0.1
                    now, saved = now + 0.1, number + 1
                if draw.random() < 0.03:
                    silent = {"0": spent | {"silent": 0.0}, "1": spent | {"silent": 0.0}}
                    records.append(record("time", attempt, now, ranks=silent))
        how = draw.choice(["failure", "end", "driver"])
        killed = how != "failure"
        if how != "driver":
            now += draw.uniform(0, 5)
            fields = {"step": saved, "reason": "stopped"} if how == "end" else {"exit_code": None}
            records.append(record(how, attempt, now, **fields))
    return records


@pytest.mark.parametrize("seed", range(40))
def test_the_ledger_adds_up_whatever_happens(seed: int) -> None:
    records = under_chaos(seed)
    spent = goodput.ledger(records)
    assert sum(spent.values()) == pytest.approx(2 * (records[-1]["time"] - records[0]["time"]))
    assert all(seconds >= -1e-6 for seconds in spent.values()), spent


def test_nothing_begun_has_no_shares() -> None:
    assert goodput.shares([]) == {}
