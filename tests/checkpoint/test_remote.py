"""A second home: what is there is whole, whatever was cut; what is missing here comes back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.checkpoint import format
from pipeline.checkpoint.format import MANIFEST, checkpoint_name
from pipeline.checkpoint.remote import Refused, Remote
from pipeline.checkpoint.retention import Retention
from pipeline.checkpoint.uploads import Outbox
from tests.checkpoint.power import Disk, PowerCut, lose, no_waiting
from tests.checkpoint.small_checkpoint import found_step, save

__all__ = ["no_waiting"]  # a fixture

OPERATIONS = ("_send", "_create", "_remove")


@pytest.fixture(params=["file", "memory"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    url = f"file://{tmp_path}/far" if request.param == "file" else f"memory:/{tmp_path}/far"
    return Remote(url, "run")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "near"


def everything(home: Remote) -> dict[str, bytes]:
    store, top = home._store, home._root
    return {path.removeprefix(f"{top}/"): store.cat_file(path) for path in store.find(top)}


def whole(home: Remote, work: Path) -> list[int]:
    """Steps of what the store says is there; each is fetched and every byte compared."""
    shutil.rmtree(work, ignore_errors=True)
    steps = home.steps()
    for step in steps:
        manifest, damage = home.fetch(step, work)
        if manifest is not None:  # else its manifest was torn, so it does not exist
            assert damage == [], f"step {step} is there and is not whole"
    return [step for step in steps if (work / checkpoint_name(step)).exists()]


def change(home: Remote, name: str, content: bytes) -> None:
    home._store.pipe_file(f"{home._root}/{name}", content)


# --- there and back ---


def test_what_was_sent_comes_back_as_it_was(home: Remote, root: Path) -> None:
    paths = [save(root, step) for step in (10, 20)]
    before = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
    assert [home.put(path) for path in paths] == [3000, 3000]
    assert [home.put(path) for path in paths] == [0, 0]
    assert everything(home) == before
    shutil.rmtree(root)
    found = format.find(root, home=home)
    assert found is not None and found.step == 20 and found.notes == [f"fetched from {home.url}"]
    found = format.find(root, step=10, home=home)
    assert found is not None and found.step == 10
    assert {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()} == before
    assert format.find(root, step=30, home=home) is None


def test_the_newest_of_both_is_found_and_nothing_is_fetched_for_nothing(home: Remote, root: Path) -> None:
    home.put(save(root, 10))
    save(root, 20)
    found = format.find(root, home=home)
    assert found is not None and (found.step, found.notes) == (20, [])
    home.put(save(root, 30))
    shutil.rmtree(root / checkpoint_name(30))
    found = format.find(root, home=home)
    assert found is not None and (found.step, len(found.notes)) == (30, 1)


def test_a_damaged_one_here_is_mended_from_there(home: Remote, root: Path) -> None:
    save(root, 10)
    path = save(root, 20)
    home.put(path)
    (path / "rank-00001.safetensors").write_bytes(bytes(1500))
    found = format.find(root, home=home)
    assert found is not None and (found.step, found.path) == (20, path)
    assert [damage.file for damage in found.bad] == ["rank-00001.safetensors"] and format.verify(path) == []


@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "manifest", "no manifest"])
def test_damage_there_is_named_and_the_one_before_is_used(home: Remote, root: Path, harm: str) -> None:
    home.put(save(root, 10))
    home.put(save(root, 20))
    shutil.rmtree(root)
    name = f"{checkpoint_name(20)}/{MANIFEST if 'manifest' in harm else 'rank-00001.safetensors'}"
    content = everything(home)[name]
    if harm in ("gone", "no manifest"):
        home._remove(name)
    else:
        change(home, name, content[:700] if harm == "cut" else content[:-9] + b"!" + content[-8:])
    found = format.find(root, home=home)
    assert found is not None and found.step == 10
    assert [str(damage).split("/")[-2] for damage in found.bad] == [checkpoint_name(20)] * (harm != "no manifest")
    assert all(str(damage).startswith(home.url) for damage in found.bad)
    assert [path.name for path in root.iterdir()] == [checkpoint_name(10)]


# --- whose it is ---


def test_a_newer_attempt_replaces_and_an_older_one_is_refused(home: Remote, root: Path, tmp_path: Path) -> None:
    home.put(save(root, 10, attempt=1))
    late = tmp_path / "late"
    shutil.copytree(root, late)
    newer = save(root, 10, attempt=2)
    home.put(newer)
    assert everything(home)[f"{newer.name}/{MANIFEST}"] == (newer / MANIFEST).read_bytes()
    with pytest.raises(Refused, match="of attempt 2; this one is of attempt 1"):
        Remote(home.url.rpartition("/")[0], "run").put(late / newer.name)
    assert whole(home, tmp_path / "work") == [10]


def test_what_is_damaged_here_is_not_sent(home: Remote, root: Path) -> None:
    path = save(root, 10)
    (path / "rank-00001.safetensors").write_bytes(bytes(1500))
    outbox = Outbox(root, home, Retention())
    [sent] = outbox.send()
    assert sent.refused is not None and "does not match its sha256" in sent.refused
    assert home.steps() == [] and outbox.pending() == []
    save(root, 20)
    assert [each.step for each in outbox.send()] == [20]


# --- retention there ---


def test_both_homes_keep_the_same(home: Remote, root: Path) -> None:
    rules = Retention(keep=2, keep_every=30, keep_best=1, best="train/loss", mode="min")
    outbox = Outbox(root, home, rules)
    for step in range(10, 80, 10):
        save(root, step)
        assert [sent.step for sent in outbox.send()] == [step]
    assert home.steps() == [10, 30, 60, 70]
    change(home, f"{checkpoint_name(20)}/rank-00000.safetensors", b"left by an upload that was cut")
    save(root, 80)
    assert [sent.step for sent in outbox.send()] == [80]
    assert home.folders().keys() == {10, 30, 60, 70, 80}


def test_the_newest_goes_first_and_only_what_is_kept(home: Remote, root: Path) -> None:
    for step in (10, 20, 30):
        save(root, step)
    outbox = Outbox(root, home, Retention(keep=2))
    assert outbox.waiting() == [20, 30]
    assert [sent.step for sent in outbox.send()] == [30, 20] and outbox.waiting() == []


# --- cut at every operation ---


class Cut:
    """Ends a process at the `last`-th operation in the store, before or after it; afterwards none works any more."""

    def __init__(self, last: int, moment: str) -> None:
        self.last, self.moment, self.count = last, moment, 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in OPERATIONS:
            patch.setattr(Remote, name, self._cut(getattr(Remote, name)))

    def _cut(self, operation: Callable) -> Callable:
        def run(*arguments):
            self.count += 1
            if self.count > self.last or (self.count == self.last and self.moment == "before"):
                raise PowerCut
            if self.count == self.last and self.moment == "half" and len(arguments) == 3:
                store, what, name = arguments if isinstance(arguments[1], Path) else (*arguments[::2], arguments[1])
                content = what.read_bytes() if isinstance(what, Path) else what
                change(store, name, content[: len(content) // 2])  # as a disk may; an object store has all or nothing
                raise PowerCut
            operation(*arguments)
            if self.count == self.last:
                raise PowerCut

        return run


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_sending_cut_at_every_operation_leaves_only_what_is_whole(
    home: Remote, tmp_path: Path, moment: str, no_waiting: None
) -> None:
    """A send that replaces an older attempt's checkpoint, sends two new ones and deletes three."""
    rules, url, cuts = Retention(keep=2), home.url.rpartition("/")[0], 0
    old, new = tmp_path / "old", tmp_path / "new"
    for step in (10, 20, 30):
        save(old, step)
    for step, attempt in ((30, 2), (40, 2)):
        save(new, step, attempt=attempt)
    while True:
        cuts += 1
        here = Remote(url, f"run-{moment}-{cuts}")
        for path in sorted(old.iterdir()):
            here.put(path)
        with pytest.MonkeyPatch.context() as patch:
            Cut(cuts, moment).install(patch)
            try:
                list(Outbox(new, here, rules).send())
                done = True
            except PowerCut:
                done = False
        found = whole(here, tmp_path / "work")
        assert {40, 20} & set(found) and set(found) <= {10, 20, 30, 40}, f"cut {moment} operation {cuts}: {found}"
        again = Remote(url, here.url.rpartition("/")[2])
        list(Outbox(new, again, rules).send())
        assert whole(again, tmp_path / "work") == [30, 40], f"cut {moment} operation {cuts}"
        assert again.manifest(30) == (new / checkpoint_name(30) / MANIFEST).read_bytes()
        if done:
            break
    assert cuts > 12


@pytest.mark.parametrize("half", [False, True])
def test_fetching_cut_at_every_operation(tmp_path: Path, half: bool, no_waiting: None) -> None:
    """Step 20 is damaged here and whole there; 10 is whole here. Always one of them loads, and the next try has 20."""
    pristine, crashed, root, last = tmp_path / "pristine", tmp_path / "crashed", tmp_path / "root", 0
    home = Remote(f"file://{tmp_path}/far", "run")
    save(pristine, 10)
    broken = save(pristine, 20)
    home.put(broken)
    (broken / "rank-00000.safetensors").write_bytes(bytes(1500))
    done = False
    while not done:
        last += 1
        shutil.copytree(pristine, crashed)
        cut = Disk(last, half)
        with pytest.MonkeyPatch.context() as patch:
            cut.install(patch)
            try:
                format.find(crashed, home=home)
                done = True
            except PowerCut:
                pass
        for loss in [[]] if done else cut.losses() if cut.halved or not half else []:
            shutil.copytree(crashed, root)
            lose(loss, crashed, root)
            assert found_step(root) in (10, 20), f"cut at operation {last}, lost {loss}"
            found = format.find(root, home=home)
            assert found is not None and found.step == 20 and format.verify(found.path) == []
            save(root, 90, attempt=5)
            assert sorted(path.name for path in root.iterdir()) == [checkpoint_name(step) for step in (10, 20, 90)]
            shutil.rmtree(root)
        shutil.rmtree(crashed)
    assert last > 15
