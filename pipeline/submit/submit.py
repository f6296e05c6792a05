"""A run sent to a cluster: checked here as `train` would check it there, rendered, read over, kept, and only then sent.

    CONFIG, options -> prepare -> Plan (rendered files, problems, notes) -> send -> submitted/<name>/job.json

What was sent stays in submitted/<name>, with the id of the job: by the run's name it is found again for status, logs,
stop and resume. What it gives up: data and runs that lie where this machine cannot look are checked by the job itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pipeline import config as configs
from pipeline.cluster import history, lease
from pipeline.cluster import sweep as sweeps
from pipeline.config import Config
from pipeline.doctor import samples
from pipeline.doctor.examine import before
from pipeline.doctor.findings import Report
from pipeline.errors import CheckpointError, ConfigError, RunError
from pipeline.problems import InvalidConfig, Problem
from pipeline.submit import code, jobs, secrecy, slurm
from pipeline.submit.kubernetes import target as kubernetes
from pipeline.submit.submission import CONFIG, SENT, State, Submission, Target

TARGETS: dict[str, Target] = {"ray": jobs, "slurm": slurm, "k8s": kubernetes}
RECORD = "job.json"
LOOK_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Request:
    """What a person asks for, kept beside what was sent so that `resume` can ask again."""

    target: str
    config: Path
    overrides: tuple[str, ...] = ()
    sweep: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)  # key -> values; a run each
    folder: Path | None = None  # at the target; None: the working directory, which is shared
    image: str | None = None
    where: str | None = None
    own_code: bool = True  # whether Millstream's own code goes along
    users_code: bool = True  # whether that of the run's own task and decoders does
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Plan(NamedTuple):
    """What would be sent. warnings: by which it may be worth less.  notes: what is well to know, but no mistake."""

    request: Request
    run: Submission
    rendered: dict[str, str]
    problems: list[Problem]
    warnings: list[Problem]
    notes: list[str]

    @property
    def home(self) -> Path:
        """The folder here that keeps what was sent."""
        folder = Path(self.run.folder)
        return (folder if folder.is_dir() else Path.cwd()) / SENT / self.run.name


class Sent(NamedTuple):
    """A job that has left."""

    home: Path
    target: Target
    id: str
    request: Request


def prepare(request: Request) -> Plan:
    """Check, render and lint. Raises ConfigError for what keeps it from being rendered at all."""
    folder = (request.folder or Path.cwd()).absolute()
    config, problems = load(request, folder, request.overrides)
    members, seen = [], folder.is_dir()
    for overrides in combinations(config.name, request.sweep):
        member, wrong = load(request, folder, (*request.overrides, *overrides))
        members.append(member)
        problems += wrong
    code_found = code.collect(config, own=request.own_code, users=request.users_code)
    run = Submission(
        name=config.name,
        source=request.config,
        overrides=request.overrides,
        text=configs.dump(config),
        workers=config.cluster.workers,
        threads=config.cluster.threads_per_worker,
        gpus=int(bool(config.cluster.gpu)),
        folder=PurePosixPath(folder),
        image=request.image,
        files=code_found.files,
        elastic=(config.cluster.min_workers or config.cluster.workers) < config.cluster.workers,
        sweep=tuple(map(configs.dump, members)),
        where=request.where,
        options=request.options,
    )
    target = TARGETS[request.target]
    rendered = target.render(config, run)
    problems += [*target.lint(rendered), *code.problems(run.files)]
    problems += secrecy.problems({name: path.read_text() for name, path in run.files.items()}, code=True)
    asked = Report()
    if seen and not any(problem.place.startswith("data") for problem in problems):
        asked = before(config)
    else:  # the data are looked at where the job runs
        samples.decoders(config, asked)
    problems += [finding.problem for finding in asked.of("error") if finding.problem not in problems]
    warnings = [finding.problem for finding in asked.of("warning")]
    if seen:
        problems += [problem for each in members or [config] for problem in run_state(each)]
    plan = Plan(request, run, rendered, problems, warnings, list(notes(config, code_found, seen)))
    plan.problems.extend(still_there(plan.home))
    return plan


def load(request: Request, folder: Path, overrides: Iterable[str]) -> tuple[Config, list[Problem]]:
    """The configuration as it leaves, every path absolute, and what is wrong with its folders where they can be seen.

    Raises InvalidConfig for what is wrong with itself.
    """
    if folder != Path.cwd():
        config = configs.resolve(configs.load_resolved(request.config, overrides), folder)
        return config, configs.unseen(config) if folder.is_dir() else []
    try:
        return configs.resolve(configs.load(request.config, overrides)), []
    except InvalidConfig as error:
        try:
            return configs.resolve(configs.load_resolved(request.config, overrides)), error.problems
        except InvalidConfig:
            raise error from None


def sweep(overrides: Sequence[str]) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """KEY=VALUE for all runs, and the values of each KEY=V1,V2, in the words of `millstream sweep`.

    Raises ConfigError where there are none, or none that every member of an array can be given.
    """
    fixed, grid, drawn = sweeps.read(overrides)
    if drawn:
        mend = "give values, KEY=V1,V2; `millstream sweep` draws"
        raise ConfigError(f"{', '.join(drawn)}: nothing is drawn from a range for a job array; {mend}")
    if not grid:
        raise ConfigError("nothing to sweep over: give a key several values, KEY=V1,V2, such as optim.lr=1e-3,3e-4")
    if "name" in grid:
        raise ConfigError("name: a sweep sets that itself, for each of its runs")
    return fixed, grid


def combinations(name: str, grid: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    """Overrides of each member of a sweep: every combination of values, and a name of its own, <name>.<number>."""
    members = itertools.product(*([f"{key}={value}" for value in values] for key, values in grid.items()))
    return [(*values, f"name={name}.{number}") for number, values in enumerate(members)] if grid else []


def run_state(config: Config) -> list[Problem]:
    """What the run's folder says against a start, as `train` would find it."""
    place = "name"
    try:
        folder = history.run_folder(config, fresh=False)
        if owner := beating(folder):
            return [Problem(place, f"{folder} is being trained: {owner}", suggestion="stop it first, or wait")]
        if folder.is_dir():
            if history.finished(config, folder):
                mend = "raise steps, or choose another name"
                return [Problem(place, f"{folder} is done: step {config.steps} is committed", suggestion=mend)]
            history.expect_checkpoint(config, folder)
    except CheckpointError as error:
        return [Problem(place, str(error))]
    return []


def beating(folder: Path) -> str | None:
    """Who trains a run now, heard by the beat of its lease; one that was killed elsewhere has left a silent one."""
    owner, path = lease.owner(folder), folder / "lease.json"
    give_up = time.monotonic() + 2 * lease.BEAT_SECONDS
    with suppress(FileNotFoundError):
        first = path.read_bytes() if owner else b""
        while owner and time.monotonic() < give_up:
            if path.read_bytes() != first:
                return owner
            time.sleep(lease.LOOK_SECONDS)
    return None


def still_there(home: Path) -> list[Problem]:
    """Whether the last job of this run has not ended yet."""
    if not (home / RECORD).is_file():
        return []
    before = find(home.name, home.parent)
    try:
        state = before.target.status(before.id)
    except (RunError, ConfigError) as error:
        message = f"its last job, {before.id}, cannot be asked about: {error}"
        return [Problem("name", message, suggestion="see that it has ended, then --force")]
    if state.word not in ("waiting", "running"):
        return []
    mend = f"millstream submit stop {home.name}"
    return [Problem("name", f"job {before.id} of this run is {state.word} ({state.detail})", suggestion=mend)]


def notes(config: Config, found: code.Code, seen: bool) -> Iterable[str]:
    if not seen:
        yield "the target's folder cannot be seen from here: data and earlier runs are checked by the job"
    if config.cluster.gpu is None:
        yield "no GPU is asked for, since cluster.gpu is null; cluster.gpu=true asks for one per worker"
    if found.needed:
        yield f"the target must have {', '.join(found.needed)}: it is not sent"


def send(plan: Plan, say: Callable[[str], None]) -> Sent:
    """Knock, keep what leaves, then send it; `say` hears what should be known of the target.

    Raises RunError or ConfigError when the target refuses.
    """
    home, run, target = plan.home, plan.run, TARGETS[plan.request.target]
    for note in target.reach(run):
        say(note)
    home.mkdir(parents=True, exist_ok=True)
    for old in home.glob("config*.yaml"):
        old.unlink()
    for name, text in {**plan.rendered, CONFIG: run.text}.items():
        (home / name).write_text(text)
    sent = Sent(home, target, target.submit(plan.rendered, run), plan.request)
    asked = dataclasses.asdict(plan.request)
    record = {"id": sent.id, "sent": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "request": asked}
    draft = home / f"{RECORD}.tmp"
    draft.write_text(json.dumps(record, indent=2, default=str) + "\n")
    draft.replace(home / RECORD)
    return sent


def find(name: str, folder: Path | None = None) -> Sent:
    """The newest job of the run `name`. Raises RunError when none was sent from here."""
    home = (folder or Path.cwd() / SENT) / Path(name).name
    try:
        record: dict[str, Any] = json.loads((home / RECORD).read_text())
    except OSError:
        known = sorted(path.parent.name for path in home.parent.glob(f"*/{RECORD}"))
        mend = f"sent were: {', '.join(known)}" if known else "send one with `millstream submit ray|slurm|k8s CONFIG`"
        raise RunError(f"no job of a run {name!r} is kept in {home.parent}; {mend}") from None
    asked = record["request"]
    request = Request(
        target=asked["target"],
        config=Path(asked["config"]),
        overrides=tuple(asked["overrides"]),
        sweep=asked["sweep"],
        folder=Path(asked["folder"]) if asked["folder"] else None,
        image=asked["image"],
        where=asked["where"],
        own_code=asked["own_code"],
        users_code=asked["users_code"],
        options=asked["options"],
    )
    return Sent(home, TARGETS[request.target], record["id"], request)


def again(sent: Sent, overrides: Iterable[str] = ()) -> Request:
    """The request that goes on with a run: the configuration that was sent, with keys that are set from now on."""
    folder = sent.request.folder or sent.home.parent.parent
    return dataclasses.replace(sent.request, config=sent.home / CONFIG, overrides=tuple(overrides), folder=folder)


def watch(sent: Sent, say: Callable[[str], None], *, wait: Callable[[float], object] = time.sleep) -> State:
    """Tell of every change of a job's state and of all that it says, until it is over."""
    last, told = None, 0
    while True:
        state = sent.target.status(sent.id)
        if state != last:
            say(f"{state.word}: {state.detail}")
            last = state
        if state.word != "waiting":
            text = sent.target.logs(sent.id)
            if len(text) > told:
                say(text[told:].rstrip("\n"))
                told = len(text)
        if state.over or state.word == "unknown":
            return state
        wait(LOOK_SECONDS)
