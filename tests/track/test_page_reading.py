"""What the page reads is what the journal says: rewinds, torn and damaged lines, any cut into pieces."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.cluster.driver import CRASH_LOOP, after
from pipeline.cluster.failure import Failure
from pipeline.config import Config
from pipeline.track import goodput, journal, summary
from pipeline.track.page import model, verdict
from pipeline.track.page.reading import Reading
from pipeline.track.page.thin import ALL_POINTS, LEAST_POINTS, POINTS, extremes, thin, width_for
from tests.track.small_story import BEGAN, RANKS, Story, crash_loop, killed_once, run_folder


def chaotic(folder: Path, seed: int) -> Path:
    """A run whose attempts end and go on at random places; some fail before they begin, some are not noted."""
    dice, done = random.Random(seed), 0
    story = Story(run_folder(folder, 1000), seed)
    for _ in range(dice.randint(1, 6)):
        resumed = 0 if not done else dice.choice([0, done, done // 2, done // 100 * 100])
        if dice.random() < 0.2:
            story.attempt += 1
            story.write("attempt", workers=2, restarts=1, relaunch=True)
        else:
            story.begin(resumed, workers=dice.choice([0, 1, 2, 4]))
            done = resumed + dice.randint(0, 250)
            story.steps(resumed, done, dice.choice([0.1, 0.5]))
            if dice.random() < 0.6:
                story.write("time", ranks=RANKS)
        if dice.random() < 0.7:
            story.write("failure", message="worker 0 was lost", exit_code=None)
        story.now += dice.choice([0.0, 3.0])
    if dice.random() < 0.5:
        story.write("end", reason="stopped", step=done)
    return folder


def same(reading: Reading, records: list[journal.Record]) -> None:
    """The reading against the journal's own readers, that keep every record."""
    names = {name for record in records for name in record.get("metrics", ())}
    assert names or not reading.curves()
    for name in names:
        steps, values = journal.curve(records, name)
        curve = reading.curves()[name]
        assert list(curve.steps) == steps, name
        np.testing.assert_array_equal(list(curve.values), values, err_msg=name)
    facts = summary.summary(records, "test/accuracy", "max")
    assert reading.last_step == facts["last_step"] and len(reading.spans) == facts["attempts"]
    assert verdict.wall_seconds(reading) == pytest.approx(facts["wall_seconds"])
    assert verdict.waited(reading) == pytest.approx(facts["data_wait_share"])
    assert verdict.usual(reading.done.get("throughput/samples_per_second")) == facts["samples_per_second"]
    assert sorted(map(tuple, verdict.scores(reading))) == sorted(facts["evaluations"])
    assert reading.shares() == pytest.approx(goodput.shares(records))


@pytest.mark.parametrize("seed", range(16))
def test_a_journal_read_in_pieces_says_what_it_says_as_a_whole(tmp_path: Path, seed: int) -> None:
    """Also while it is being written: pieces end anywhere, inside lines too."""
    whole = (chaotic(tmp_path / "run", seed) / "journal.jsonl").read_bytes()
    growing = run_folder(tmp_path / "growing", 1000) / "journal.jsonl"
    reading, dice, size = Reading(growing.parent), random.Random(seed), 0
    while size < len(whole):
        size = min(len(whole), size + dice.randint(1, len(whole) // 4 + 1))
        growing.write_bytes(whole[:size])
        reading.all()
        records = journal.read(growing).records
        if records:
            same(reading, records)
    assert reading.position == len(whole) and reading.damaged == 0 and not reading.advance()
    same(Reading(tmp_path / "run").all(), journal.read(tmp_path / "run" / "journal.jsonl").records)


def test_what_is_done_again_stands_once(tmp_path: Path) -> None:
    reading = Reading(killed_once(tmp_path / "run"))
    assert reading.generation == 0
    reading.all()
    assert reading.generation == 1, "who has drawn the undone steps must learn of it"
    assert list(reading.done["train/loss"].steps) == list(range(600))
    assert list(reading.after["eval/test/accuracy"].steps) == list(range(100, 700, 100))
    saves = [step for _, kind, step in reading.marks if kind == "save"]
    assert saves == list(range(100, 700, 100))
    assert [(span.first, span.last) for span in reading.spans] == [(0, 350), (300, 600)]


def test_damaged_lines_are_counted_and_torn_ends_are_not_there_yet(tmp_path: Path) -> None:
    path = killed_once(tmp_path / "run") / "journal.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[100] = lines[100].replace(b"train/loss", b"train/lass")
    lines[200] = b"\xff\x00 not json"
    path.write_bytes(b"\n".join(lines[:500]) + b"\n" + lines[500][:40])
    reading = Reading(path.parent).all()
    assert reading.damaged == 2 and len(reading.done["train/loss"].steps) == reading.last_step - 2
    assert "2 damaged lines" in " ".join(verdict.judge(reading, None).notes)
    before = reading.last_step
    path.write_bytes(b"\n".join(lines[:501]) + b"\n")
    assert reading.advance() and reading.last_step == before + 1


def test_records_that_are_not_what_they_should_be_are_counted_and_passed_over(tmp_path: Path) -> None:
    story = Story(run_folder(tmp_path / "run", 1000))
    story.begin(0)
    for wrong in ({}, {"metrics": None}, {"step": "x", "metrics": {"train/loss": 1.0}}):
        story.write("step", **wrong)
    story.write("attempt")
    story.steps(0, 10)
    reading = Reading(story.folder).all()
    assert reading.damaged == 4 and reading.last_step == 10


def test_a_journal_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    folder = killed_once(tmp_path / "run")
    reading = Reading(folder).all()
    killed_once(tmp_path / "other", seed=5)
    shutil.copy(tmp_path / "other" / "journal.jsonl", folder)
    (folder / "journal.jsonl").write_bytes((folder / "journal.jsonl").read_bytes()[:-200])
    generation = reading.generation
    reading.all()
    assert reading.generation > generation
    same(reading, journal.read(folder / "journal.jsonl").records)


def test_an_empty_run_and_one_without_a_journal(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", 10)
    for _ in range(2):
        judged = verdict.judge(Reading(folder).all(), None)
        assert (judged.state, judged.tone, judged.notes) == ("not begun", "plain", [])
        (folder / "journal.jsonl").touch()


def test_thinning_keeps_extremes_gaps_and_ends() -> None:
    dice = np.random.default_rng(0)
    for _ in range(200):
        count = int(dice.integers(1, 5000))
        steps = np.sort(dice.choice(20_000, count, replace=False))
        values = dice.normal(size=count) * 10 ** dice.uniform(-6, 6)
        values[dice.random(count) < dice.choice([0, 0.01, 0.9])] = dice.choice([math.nan, math.inf, -math.inf])
        width = 1 << int(dice.integers(0, 13))
        points = thin(steps, values, width)
        assert points.steps[0] == steps[0] and (np.diff(points.steps // width) > 0).all()
        assert len(points.steps) == len(np.unique(steps // width))
        for at, mean, low, high in zip(*points):
            own = values[steps // width == at // width]
            own = own[np.isfinite(own)]
            assert (low, high) == (own.min(), own.max()) if len(own) else math.isnan(low) and math.isnan(high)
            assert low <= mean <= high if len(own) else math.isnan(mean)
        whole = extremes(steps, values)
        finite = values[np.isfinite(values)]
        assert whole.bad == count - len(finite) and (whole.lowest is None) == (len(finite) == 0)
        if len(finite):
            assert whole.lowest and whole.highest and whole.last
            assert (whole.lowest[1], whole.highest[1], whole.last[1]) == (finite.min(), finite.max(), finite[-1])


def test_a_peak_of_one_step_in_a_million_is_seen() -> None:
    values = np.ones(1_000_000)
    values[765_432] = 99.0
    points = thin(np.arange(1_000_000), values, width_for(1_000_000, 1))
    assert len(points.steps) <= POINTS + 1 and points.high.max() == 99.0
    assert points.steps[points.high.argmax()] <= 765_432 < points.steps[points.high.argmax() + 1]


def test_the_width_is_a_power_of_two_and_bounds_the_points() -> None:
    for last_step in (0, 1, 127, 1024, 1025, 10**6, 10**9):
        for curves in (1, 7, 100, 5000):
            width = width_for(last_step, curves)
            assert width & (width - 1) == 0
            assert last_step / width <= max(LEAST_POINTS, min(POINTS, ALL_POINTS / curves))


def test_verdicts(tmp_path: Path) -> None:
    done = verdict.judge(Reading(killed_once(tmp_path / "done")).all(), None)
    assert (done.state, done.tone) == ("done", "good") and "Best test/accuracy 0.9552 at step 600." in done.sentence
    told = "\n".join(done.notes)
    for part in ("not finite at 1 step.", "1 attempt failed and the run went on; the last: worker 1 was lost",
                 "1 skipped step, 1 warning", "Worker 1 is slow: 1.20 times"):  # fmt: skip
        assert part in told, told
    looping = verdict.judge(Reading(crash_loop(tmp_path / "loop")).all(), None)
    assert (looping.state, looping.tone) == ("crash loop", "bad") and "ValueError: bad sample" in looping.sentence

    story = Story(run_folder(tmp_path / "open", 1000))
    story.begin(0)
    story.steps(0, 200, seconds=3.0, metrics={"data/wait_seconds": 1.0})
    reading = Reading(story.folder).all()
    assert verdict.judge(reading, None).state == "interrupted"
    training = verdict.judge(reading, "process 7 on here")
    assert training.state == "training" and "about 40 min to go; by process 7 on here" in training.sentence
    assert any("33% of the step time went into waiting for data" in note for note in training.notes)
    for message, code, state in (("stopped", 75, "stopped"), ("x", 78, "refused"), ("giving up", 1, "given up")):
        story.write("failure", message=message, exit_code=code)
        assert verdict.judge(Reading(story.folder).all(), None).state == state
    story.write("end", reason="stopped", step=200)
    assert verdict.judge(Reading(story.folder).all(), None).state == "stopped"


def test_the_pace_of_every_rank_is_shown_when_it_is_recorded(tmp_path: Path) -> None:
    story = Story(run_folder(tmp_path / "run", 1000))
    story.begin(0, workers=4)
    story.steps(0, 50)
    story.write("pace", step=19, steps=20, seconds=1.0, compute=[0.3, 0.3, 0.3, 0.3], data=[0.1, 0.1, 0.1, 0.1])
    story.write("pace", step=39, steps=20, seconds=1.0, compute=[0.3, 0.3, 0.6, 0.3], data=[0.1, 0.4, 0.1, 0.1])
    reading = Reading(story.folder).all()
    assert list(reading.done["pace/slowest_compute"].values) == pytest.approx([1.0, 2.0])
    assert list(reading.done["pace/slowest_data_share"].values) == pytest.approx([0.0, 0.3])
    assert "Worker 2 is slow: 2.00 times" in " ".join(verdict.judge(reading, None).notes)
    ranks = model.run("run", reading, 1)["ranks"]
    assert ranks["1"] == {"computes": 0.3, "waits": 0.4} and list(ranks) == ["0", "1", "2", "3"]


def test_going_back_within_an_attempt_cuts_too(tmp_path: Path) -> None:
    story = Story(run_folder(tmp_path / "run", 1000))
    story.begin(0)
    story.steps(0, 50)
    story.write("rollback", step=40, last=49, from_step=50, to_step=30, number=1, message="gone back")
    reading = Reading(story.folder).all()
    assert list(reading.done["train/loss"].steps) == list(range(40)) and reading.last_step == 40


def test_an_old_best_is_worth_a_look(tmp_path: Path) -> None:
    story = Story(run_folder(tmp_path / "run", 1000), now=BEGAN)
    story.begin(0)
    for number in range(1, 9):
        story.write(
            "evaluation", step=100 * number, metrics={"eval/test/accuracy": 0.9 - 0.01 * abs(number - 2)}, seconds=1
        )
    (note,) = verdict.judge(Reading(story.folder).all(), None).notes
    assert note.startswith("test/accuracy was best at step 200, 6 evaluations ago; now it is 0.84.")


def test_the_driver_says_crash_loop_in_words_that_the_verdict_knows() -> None:
    """What the driver records after the same failure at the same step."""
    failure = Failure("ValueError", "worker 0: bad sample", 40, "Traceback")
    config = Config.model_construct(cluster=Config.model_fields["cluster"].default)
    code, message = after([failure] * CRASH_LOOP, config, False)
    assert code == 1 and "the same failure" in message


def test_samples_of_what_is_done_again_go_and_of_very_many_some_stay(tmp_path: Path) -> None:
    story = Story(run_folder(tmp_path / "run", 1000))
    story.begin(0)
    for step in range(1, 101):
        story.write("samples", step=step, sets={"test": [{"text": "x" * 9000, "loss": None}]})
    reading = Reading(story.folder).all()
    kept = [moment["step"] for moment in reading.samples]
    assert kept == sorted(kept) and kept[0] == 1 and kept[-1] == 100 and len(kept) == 24
    assert max(np.diff(kept)) <= 12 and len(reading.events) == 2
    told = model.run("run", reading, 1)["samples"]
    assert told[-1]["step"] == 100 and len(told) <= model.MOMENTS and len(told[0]["sets"]["test"][0]["text"]) < 9000
    story.begin(50)
    assert max(moment["step"] for moment in reading.all().samples) <= 50
