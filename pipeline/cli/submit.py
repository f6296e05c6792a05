"""`millstream submit`: a run sent to a cluster, and what becomes of it there. See __init__.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.submit.submission import State
    from pipeline.submit.submit import Plan, Request, Sent

app = typer.Typer(
    no_args_is_help=True,
    help="Send a run to a cluster: Ray jobs, Slurm or Kubernetes. launch/README.md and k8s/README.md are guides.",
    epilog="Example: millstream submit slurm configs/digits.yaml -o nodes=2",
)
SLURM = """Example: millstream submit slurm configs/digits.yaml -o nodes=2 -o time=4:00:00 -o partition=gpu

Example: millstream submit slurm configs/digits.yaml optim.lr=1e-3,3e-3 seed=0,1,2 --sweep"""
EXIT = {"done": 0, "stopped": 75, "failed": 1, "unknown": 1}

CONFIG = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file that describes the run.")]
OVERRIDES = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys set for this time.")]
FOLDER = Annotated[
    Path | None,
    typer.Option(help="Shared folder at the target where relative paths begin; without it the one you are in."),
]
INSTALLED = Annotated[bool, typer.Option("--installed", help="Send no code of Millstream: the target has it.")]
OPTION = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help="An option of the target's own.")
]
RENDER = Annotated[bool, typer.Option("--render", help="Show what would be sent, and send nothing.")]
TO = Annotated[Path | None, typer.Option(metavar="FOLDER", help="With --render: write it there instead.")]
WATCH = Annotated[bool, typer.Option("--watch", help="Show its state and what it says until it ends.")]
FORCE = Annotated[bool, typer.Option("--force", help="Send it though problems were found.")]
NAME = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run, as in its configuration.")]


@app.command(epilog="Example: millstream submit ray configs/digits.yaml --address http://127.0.0.1:8265 --watch")
def ray(
    config: CONFIG,
    overrides: OVERRIDES = None,
    address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="The dashboard of its head, http://HOST:8265.")
    ] = None,
    folder: FOLDER = None,
    installed: INSTALLED = False,
    option: OPTION = None,
    render: RENDER = False,
    to: TO = None,
    watch: WATCH = False,
    force: FORCE = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Send it to a head that lets in whoever reaches it.")
    ] = False,
) -> None:
    """Send a run to a Ray cluster that is up, as a job.

    The token is read from the file that RAY_AUTH_TOKEN_PATH names. Options (-o):
    python=PATH, stop_seconds=600.
    """
    from pipeline.submit.submit import Request

    options = _options(option, ("python", "stop_seconds")) | ({"insecure": "yes"} if insecure else {})
    request = Request(
        target="ray",
        config=config,
        overrides=tuple(overrides or ()),
        folder=folder,
        where=address,
        own_code=not installed,
        options=options,
    )
    _submit(request, render, to, watch, force)


@app.command(epilog=SLURM)
def slurm(
    config: CONFIG,
    overrides: OVERRIDES = None,
    folder: FOLDER = None,
    image: Annotated[str | None, typer.Option(help="Container: FILE.sif for apptainer, any other for pyxis.")] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="A run for each combination of KEY=V1,V2,V3, as a job array.")
    ] = False,
    installed: INSTALLED = False,
    option: OPTION = None,
    render: RENDER = False,
    to: TO = None,
    watch: WATCH = False,
    force: FORCE = False,
) -> None:
    """Queue a run with Slurm; it is queued again by itself until it is done.

    Options (-o): nodes=1, python=PATH, warning=120, secrets=FILE, container=pyxis
    or apptainer; any other is a long option of sbatch.
    """
    from pipeline.submit import submit

    fixed, grid = submit.sweep(overrides or ()) if sweep else (tuple(overrides or ()), {})
    request = submit.Request(
        target="slurm",
        config=config,
        overrides=fixed,
        sweep=grid,
        folder=folder,
        image=image,
        own_code=not installed,
        options=_options(option),
    )
    _submit(request, render, to, watch, force)


@app.command(epilog="Example: millstream submit k8s configs/digits.yaml --folder /storage --image REGISTRY/NAME:1.0")
def k8s(
    config: CONFIG,
    folder: Annotated[Path, typer.Option(help="Where the claim is mounted; relative paths begin there.")],
    image: Annotated[str, typer.Option(help="Image that holds Millstream and your own code, by digest.")],
    overrides: OVERRIDES = None,
    context: Annotated[str | None, typer.Option(help="Of kubectl; without it the one that is set.")] = None,
    option: OPTION = None,
    render: RENDER = False,
    to: TO = None,
    watch: WATCH = False,
    force: FORCE = False,
) -> None:
    """Send a run to Kubernetes, as a RayJob of KubeRay.

    Options (-o): nodes=1, namespace=training, claim, secret, queue, spot ...;
    k8s/README.md has them all.
    """
    from pipeline.submit.kubernetes.target import OPTIONS
    from pipeline.submit.submit import Request

    request = Request(
        target="k8s",
        config=config,
        overrides=tuple(overrides or ()),
        folder=folder,
        image=image,
        where=context,
        own_code=False,
        users_code=False,
        options=_options(option, tuple(OPTIONS)),
    )
    _submit(request, render, to, watch, force)


@app.command(epilog="Example: millstream submit status digits")
def status(run: NAME) -> None:
    """Show what became of a run that was sent. Exit code: 0 unless it failed."""
    from pipeline.cli import terminal
    from pipeline.submit import submit

    sent = submit.find(run)
    state = sent.target.status(sent.id)
    terminal.say(f"{run}  {state.word}: {state.detail}")
    terminal.say(f"job {sent.id}")
    raise typer.Exit(1 if state.word == "failed" else 0)


@app.command(epilog="Example: millstream submit logs digits --watch")
def logs(run: NAME, watch: WATCH = False) -> None:
    """Show what a run that was sent has said so far."""
    from pipeline.cli import terminal
    from pipeline.submit import submit

    sent = submit.find(run)
    if watch:
        raise typer.Exit(_watch(sent))
    terminal.say(sent.target.logs(sent.id).rstrip("\n"))


@app.command(epilog="Example: millstream submit stop digits --watch")
def stop(run: NAME, watch: WATCH = False) -> None:
    """Ask a run that was sent to finish its step, save, and end."""
    from pipeline.cli import terminal
    from pipeline.submit import submit

    sent = submit.find(run)
    state = sent.target.status(sent.id)
    if state.over:
        terminal.say(f"{run} has ended already, {state.word}: {state.detail}")
        return
    sent.target.stop(sent.id)
    terminal.say(f"{run} is asked to stop; `millstream submit resume {run}` goes on with it later")
    if watch:
        raise typer.Exit(_watch(sent))


@app.command(epilog="Example: millstream submit resume digits steps=1400")
def resume(
    run: NAME, overrides: OVERRIDES = None, render: RENDER = False, watch: WATCH = False, force: FORCE = False
) -> None:
    """Send a run again to where it was, by the configuration that was sent; it goes on from its newest checkpoint."""
    from pipeline.submit import submit

    _submit(submit.again(submit.find(run), overrides or ()), render, None, watch, force)


def _options(given: list[str] | None, known: tuple[str, ...] | None = None) -> dict[str, str]:
    """NAME=VALUE; NAME alone is a flag. Raises ConfigError for one that is not `known`, where that is said."""
    from pipeline.errors import ConfigError
    from pipeline.problems import nearest

    options = {}
    for text in given or ():
        name, _, value = text.partition("=")
        if known is not None and name not in known:
            raise ConfigError(f"-o {text}: there is no such option; {nearest(name, known) or ', '.join(known)}")
        if name in options:
            raise ConfigError(f"-o {name} is given twice")
        options[name] = value
    return options


def _submit(request: Request, render: bool, to: Path | None, watch: bool, force: bool) -> None:
    """Prepare, show or send. Exit code 78 with all problems, unless `force`."""
    from pipeline.cli import terminal
    from pipeline.problems import InvalidConfig
    from pipeline.submit import code, submit

    plan = submit.prepare(request)
    if render:
        _show(plan, to)
    for note in (*plan.notes, *plan.warnings):
        terminal.warn(str(note))
    if plan.problems:
        error = InvalidConfig(str(request.config), plan.problems)
        if not force:
            raise error
        terminal.warn(f"sent all the same: {error}")
    if render:
        return
    sent = submit.send(plan, terminal.warn)
    size = code.report(plan.run.files).rstrip("\n").rpartition("\n")[2].strip()
    along = f"{size} of code, and " if plan.run.files else ""
    terminal.say(f"sent {along}{len(plan.rendered)} files that are kept in {sent.home}")
    terminal.say(f"job {sent.id}", "bold")
    if watch:
        raise typer.Exit(_watch(sent))
    terminal.say(f"next: millstream submit logs {plan.run.name} --watch")


def _show(plan: Plan, to: Path | None) -> None:
    from pipeline.cli import terminal
    from pipeline.submit import code

    if to is not None:
        to.mkdir(parents=True, exist_ok=True)
        for name, text in plan.rendered.items():
            (to / name).write_text(text)
        return
    for name, text in plan.rendered.items():
        terminal.say(f"------ {name}", "bold")
        terminal.say(text.rstrip("\n"))
    if plan.run.files:
        terminal.say("------ code that goes along: bytes, sha256, name", "bold")
        terminal.say(code.report(plan.run.files).rstrip("\n"))


def _watch(sent: Sent) -> int:
    """Exit code of what became of it; Ctrl-C leaves it alone."""
    from pipeline.cli import terminal
    from pipeline.submit import submit

    try:
        state: State = submit.watch(sent, terminal.say)
    except KeyboardInterrupt:
        terminal.say(f"\nit goes on without you: millstream submit logs {sent.home.name} --watch")
        return 0
    return EXIT[state.word]
