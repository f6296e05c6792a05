"""Which rank is to blame, and that slow but healthy ranks raise no alarm. A real hang is in test_runs.py."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pipeline.cluster import watchdog
from pipeline.sections import Stall

LIMITS = Stall()


def beat(phase: str, step: int, seconds: float, silent: float = 0.5, usual: float | None = 0.5) -> dict[str, Any]:
    return {
        "phase": phase,
        "step": step,
        "phase_seconds": seconds,
        "silent_seconds": silent,
        "step_seconds": usual,
        "host": "here",
        "pid": 7,
    }


def test_the_rank_that_is_behind_is_to_blame() -> None:
    beats = {0: beat("step", 30, 9.5), 1: beat("forward", 30, 9.6), 2: beat("step", 30, 9.4)}
    found = watchdog.find(beats, LIMITS)
    assert found is not None and (found.rank, found.phase, found.silent) == (1, "forward", False)
    beats = {0: beat("data", 31, 9.5, usual=None), 1: beat("save", 31, 1900.0)}
    found = watchdog.find(beats, LIMITS)
    assert found is not None and (found.rank, found.phase) == (1, "save")


def test_a_silent_rank_is_to_blame_wherever_it_was() -> None:
    beats = {0: beat("backward", 30, 9.5), 1: beat("step", 30, 0.2, silent=9.8)}
    found = watchdog.find(beats, LIMITS)
    assert found is not None and (found.rank, found.silent) == (1, True)
    assert "worker 1 (process 7 on here) is silent" in str(found)


@pytest.mark.parametrize("phase", ["start", "restore", "evaluation", "save", "data", "step"])
def test_each_phase_has_a_limit(phase: str) -> None:
    limit = getattr(LIMITS, phase)
    assert watchdog.find({0: beat(phase, 0, limit - 1, usual=None)}, LIMITS) is None
    assert watchdog.find({0: beat(phase, 0, limit + 1, usual=None)}, LIMITS) is not None


def test_the_limit_of_a_step_is_learnt() -> None:
    assert watchdog.limit_of(beat("backward", 30, 0, usual=0.1), LIMITS) == 10.0 - watchdog.LATE_SECONDS
    assert watchdog.limit_of(beat("backward", 30, 0, usual=4.0), LIMITS) == 40.0 - watchdog.LATE_SECONDS
    assert watchdog.limit_of(beat("backward", 3, 0, usual=None), LIMITS) == LIMITS.step


def test_a_thousand_slow_but_healthy_phases_raise_no_alarm() -> None:
    """Two ranks seen once a second, each by heartbeats up to 2 s old, in phases of up to the limit less those 2 s."""
    draw = random.Random(3)
    place, began, length = [0, 0], [0.0, 0.0], [0.0, 0.0]
    seen: dict[int, dict[str, Any]] = {}
    heard, next_beat = [0.0, 0.0], [0.0, 0.0]
    names, now = [*watchdog.STEP_PHASES, "save", "evaluation"], 0.0
    while min(place) < 1000:
        for rank in (0, 1):
            if now - began[rank] >= length[rank]:
                place[rank] += 1
                began[rank] = now
                limit = watchdog.limit_of(beat(names[place[rank] % 6], 0, 0), LIMITS)
                length[rank] = draw.uniform(0.5, min(limit, 60.0) - 2.5)
            if now >= next_beat[rank]:
                heard[rank], next_beat[rank] = now, now + draw.choice([0.5, 2.0])
                seen[rank] = beat(names[place[rank] % 6], place[rank] // 6, now - began[rank])
        beats = {rank: held | {"silent_seconds": now - heard[rank]} for rank, held in seen.items()}
        assert watchdog.find(beats, LIMITS) is None
        now += 0.5


@pytest.mark.parametrize("silent", [False, True])
def test_a_hang_is_found_within_ten_seconds_or_ten_median_steps(silent: bool) -> None:
    """Rank 1 of two hangs at some moment of some phase of a step, or its process stops; heartbeats come every 0.5 and
    2 s at any phase of the clock, looks a moment late, as supervise makes them. All in seconds that are counted here.
    """
    draw = random.Random(11)
    for _ in range(300):
        usual = draw.choice([0.01, 0.3, 1.0, 2.5, 30.0])
        place = draw.choice(["forward", "backward", "step"])
        inside = draw.uniform(0.0, usual)  # of the phase, when it hangs
        beats_from = [draw.uniform(0.0, every) for every in (0.5, 2.0)]
        look, found = draw.uniform(0.0, watchdog.LOOK_SECONDS), None
        while found is None:
            seen = {}
            for rank, (every, since) in enumerate(zip((0.5, 2.0), beats_from)):
                heard = look - (look + since) % every  # the last heartbeat before this look
                if rank == 1 and silent:
                    heard = min(heard, -since)  # the last one before it stopped
                spent = inside + heard if rank == 1 else max(heard, 0.0)
                phase = (place, max(spent, 0.0)) if rank == 1 else ("step", spent)
                seen[rank] = beat(phase[0], 30, phase[1], silent=look - heard, usual=usual)
            found = watchdog.find(seen, LIMITS)
            last, look = look, look + draw.uniform(watchdog.LOOK_SECONDS, watchdog.LOOK_SECONDS + 0.4)
        assert found.rank == 1
        assert last <= max(10.0, 10 * usual), (usual, place, last)
