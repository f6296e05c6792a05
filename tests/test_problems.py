"""Each kind of mistake in a configuration: one message that says where, what, and how to mend it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import rules
from pipeline.config import Config, load
from pipeline.problems import ELSEWHERE, Problem, places
from tests.small_project import problems, project, written

__all__ = ["project"]  # a fixture for every test here


@pytest.mark.parametrize(
    ("override", "place", "says", "suggests"),
    [
        ("steps=yes", "steps", "should be a whole number, not 'yes'", None),
        ("steps=true", "steps", "should be a whole number, not 'true'", None),
        ("data.lanes=true", "data.lanes", "should be a whole number, not 'true'", None),
        ("optim.lr=.nan", "optim.lr", "should be a number, not nan", None),
        ("optim.lr=0", "optim.lr", "must be more than 0, not 0", None),
        ("steps=15e-1", "steps", "should be a whole number, not 1.5", None),
        ("steps=1.5", "steps", "should be a whole number, not 1.5", None),
        ("compile=maybe", "compile", "should be true or false, not 'maybe'", None),
        ("name=7", "name", "should be text, not 7", "put it in quotes: '7'"),
        ("name=a/b", "name", "'a/b' is not a name", "use letters, digits"),
        ("optim=adamw", "optim", "should be a section with keys of its own, not 'adamw'", None),
        ("track.tags=nightly", "track.tags", "should be a list, not 'nightly'", None),
        ("precision.dtype=float32", "precision.dtype", "'float32' is none of: fp32, bf16, fp16", None),
        ("precision.dtype=fp23", "precision.dtype", "'fp23' is none of", "did you mean fp32?"),
        ("optim.name=adamm", "optim.name", "'adamm' is none of: adamw, adam,", "did you mean adam?"),
        ("optim.name=adafactor", "optim.name", "adafactor cannot serve: it looks at whole matrices", None),
        ("ema.decay=1", "ema.decay", "must be less than 1, not 1", None),
        ("ema.dekay=0.9", "ema.dekay", "there is no such key", "did you mean decay?"),
        (
            "zero={stage: 0, offload_optimizer: cpu}",
            "zero.offload_optimizer",
            "stage 0 keeps the optimizer's state with the weights",
            "1, 2 or 3",
        ),
        ("zero.offload_optimizer=nvme", "zero.offload_optimizer", "'nvme' is none of: cpu", None),
        ("zero.stage=4", "zero.stage", "4 is none of: 0, 1, 2, 3", None),
        ("optim.betas=[0.9]", "optim.betas.1", "is missing", None),
        ("cluster.wokers=3", "cluster.wokers", "there is no such key", "did you mean workers?"),
        ("warmup=3", "warmup", "there is no such key", "did you mean optim.schedule.warmup?"),
        ("epochs=3", "epochs", "there is no such key", "epochs x samples / global_batch_size"),
        ("guard.x=1", "guard.x", "there is no such key", "known here: non_finite, max_skipped"),
        ("task.widht=3", "task.widht", "there is no such key", "did you mean width?"),
        ("task.width=0", "task.width", "must be at least 1, not 0", None),
        ("task=house.blobs", "task", "should be a section", "write `task:`"),
        ("task.name=blob", "task.name", "there is no task 'blob'", "the tasks are: audio_classification"),
        ("task.name=house.blob", "task.name", "No module named 'house.blob'", "PYTHONPATH"),
        ("task.name=json.decoder", "task.name", "json.decoder is no task", "a class Config and a class Task"),
        ("task.vocabulary=nowhere.json", "task.vocabulary", "there is no nowhere.json in", "check the path"),
        ("micro_batch_size=24", "micro_batch_size", "64 is not a multiple of micro_batch_size 24", "16 or 32"),
        (
            "cluster.workers=5",
            "cluster.workers",
            "5 workers share 4 micro batches per step (64 / 16)",
            "micro_batch_size to 8",
        ),
        ("data.lanes=12", "data.lanes", "12 lanes do not divide global_batch_size 64", "8 or 16"),
        ("optim.schedule.name=wsd", "optim.schedule", "wsd needs to know when to fall", "add `decay"),
        ("optim.schedule.decay=5", "optim.schedule.decay", "is not read by the cosine schedule", "to wsd"),
        ("optim.schedule.warmup=101", "optim.schedule", "warmup 101 is longer than the 100 steps", "at least 101"),
        ("optim={name: sgd, lr: 1, nesterov: true, momentum: 0}", "optim.nesterov", "needs momentum", "above 0"),
        ("checkpoint={every: 3, keep_every: 10}", "checkpoint.keep_every", "10 is not a multiple of", "9 or 12"),
        ("evaluate.best=tset/accuracy", "evaluate.best", "'tset' is not a set", "did you mean test/accuracy?"),
        ("evaluate.best=accuracy", "evaluate.best", "'accuracy' is not set/metric", "such as test/accuracy"),
        ("evaluate={every: 5}", "evaluate.every", "data.evaluate is empty", "leave evaluate.every out"),
        ("precision={dtype: fp16}", "precision.dtype", "fp16 needs a GPU", "bf16 or fp32"),
    ],
)
def test_each_mistake_has_one_message(override: str, place: str, says: str, suggests: str | None) -> None:
    needs = {"evaluate.every": ["data.evaluate={}"], "precision.dtype": ["cluster.gpu=false"]}.get(place, [])
    (problem,) = problems(override, *needs)
    assert problem.place == f"command line: {place}" and problem.line is None
    assert says in problem.message
    assert (suggests or "") in (problem.suggestion or "") and (suggests is not None or problem.suggestion is None)


def test_muon_is_refused_where_it_would_be_another() -> None:
    found = problems("optim={name: muon, lr: 1}", "zero={stage: 2, offload_optimizer: cpu}")
    mends = {problem.place.removeprefix("command line: "): problem.suggestion for problem in found}
    assert mends == {
        "zero.stage": "set it to 0 or 3",
        "optim.clip": "set it to null",
        "zero.offload_optimizer": "leave it out",
    }
    assert load("good.yaml", ["optim={name: muon, lr: 1, clip: null}", "zero={stage: 3}"]).optim.name == "muon"


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("name: a\nsteps: [1, 2\n", 3, "is not YAML"),
        ("name: a\n\tsteps: 3\n", 2, "a tab where"),
        ("", None, "is empty"),
        ("just words\n", None, "holds no `key: value` lines"),
        ("- a\n- b\n", None, "holds no `key: value` lines"),
        ("name: !!python/object:os.system x\n", 1, "is not YAML"),
    ],
)
def test_files_that_are_not_read(text: str, line: int | None, says: str) -> None:
    (problem,) = problems(path=written(text))
    assert problem.line == line and says in problem.message


def test_missing_and_unreadable_files() -> None:
    (problem,) = problems(path="goood.yaml")
    assert "No such file" in problem.message and problem.suggestion == "did you mean good.yaml?"
    (problem,) = problems(path="steps=3")
    assert problem.suggestion and problem.suggestion.startswith("the YAML file comes first")
    Path("other.yaml").write_bytes(b"name: \xff\n")
    assert "not UTF-8" in problems(path="other.yaml")[0].message


def test_a_key_given_twice_is_named_with_both_lines() -> None:
    path = written(Path("good.yaml").read_text() + "steps: 7\n")
    (problem,) = problems(path=path)
    assert problem.place == "steps" and problem.line == Path(path).read_text().count("\n")
    assert "first on line 2" in problem.message


def test_aliases_that_go_round_end() -> None:
    assert problems(path=written("name: &a [*a]\n"))


@pytest.mark.parametrize(
    ("override", "place", "says"),
    [
        ("steps", "command line", "'steps' is not an override"),
        ("=3", "command line", "'=3' is not an override"),
        ("optim.lr=[1", "command line: optim.lr", "'[1' is not YAML"),
        ("optim.lr.x=1", "command line: optim.lr.x", "goes through something that is not a section"),
        ("optim.groups.3.match=a", "command line: optim.groups.3.match", "there is no such key"),
    ],
)
def test_overrides_that_are_none(override: str, place: str, says: str) -> None:
    found = problems(override)
    assert (found[0].place, len(found)) == (place, 1) or override.startswith("optim.groups"), found
    assert override.startswith("optim.groups") or says in found[0].message


def test_data_folders() -> None:
    Path("data/bare").mkdir()
    Path("data/tars").mkdir()
    Path("data/tars/a.tar").write_bytes(b"")
    (bare,), (tars,), (gone,) = (
        problems("data.train=data/bare"),
        problems("data.train=data/tars"),
        problems("data.train=away/train"),
    )
    assert "neither shards.idx nor tar" in bare.message and "data pack" in (bare.suggestion or "")
    assert "no index" in tars.message and tars.suggestion == "run `millstream data index data/tars`"
    assert str(Path.cwd()) in gone.message and gone.suggestion == "make it with `millstream data pack SOURCE away`"
    (named,) = problems("data.evaluate.test=data/tset")
    assert named.place == "command line: data.evaluate.test" and named.suggestion == "did you mean data/test?"


def test_a_task_that_breaks_on_import() -> None:
    Path("house/broken.py").write_text("1 / 0\n")
    (problem,) = problems("task.name=house.broken")
    assert "ZeroDivisionError" in problem.message and "python -c 'import house.broken'" in (problem.suggestion or "")


def test_other_trainers_words_lead_to_keys_that_exist() -> None:
    known = set(places(Config))
    assert {re.split(r"[ (]", place)[0] for place in ELSEWHERE.values()} <= known
    assert not known & set(ELSEWHERE)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 8))
def test_suggested_batch_sizes_work(batch: int, micro: int, workers: int) -> None:
    def found(batch: int, micro: int) -> list[Problem]:
        values = {"global_batch_size": batch, "micro_batch_size": micro, "cluster": {"workers": workers}}
        return rules.numbers(rules.Known(values))

    for problem in found(batch, micro):
        for key, sizes in re.findall(r"(micro|global)_batch_size to ([\d or]+)", problem.suggestion or ""):
            for size in map(int, re.findall(r"\d+", sizes)):
                assert not (found(batch, size) if key == "micro" else found(size, micro))
