"""What Slurm would refuse, ignore or regret in a batch script, found before it is queued.

The rules are those of sbatch(1) and scontrol(1), and of what the body of the script relies on. What it gives up: what
only one site knows (its partitions, accounts and limits) is said by its own sbatch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from pipeline.problems import Problem, nearest
from pipeline.submit import config_lint, secrecy
from pipeline.submit.slurm_script import RENDER, SCRIPT, VARIABLES, Script, take_apart

SHORTEST_WARNING, LONGEST_WARNING = 60, 65535  # seconds; Slurm keeps them in 16 bits
FLAGS = ("contiguous", "exclusive", "hold", "ignore-pbs", "no-kill", "requeue", "reboot", "spread-job")
FLAGS += ("use-min-nodes", "overcommit", "oversubscribe", "quiet", "verbose", "get-user-env")
VALUED = tuple(
    [
        "account",
        "acctg-freq",
        "array",
        "batch",
        "bb",
        "bbf",
        "begin",
        "chdir",
        "cluster-constraint",
        "clusters",
        "comment",
        "constraint",
        "container",
        "core-spec",
        "cores-per-socket",
        "cpu-freq",
        "cpus-per-gpu",
        "cpus-per-task",
        "deadline",
        "delay-boot",
        "dependency",
        "distribution",
        "error",
        "exclude",
        "export",
        "extra-node-info",
        "gpu-bind",
        "gpu-freq",
        "gpus",
        "gpus-per-node",
        "gpus-per-socket",
        "gres",
        "gres-flags",
        "hint",
        "input",
        "job-name",
        "kill-on-invalid-dep",
        "licenses",
        "mail-type",
        "mail-user",
        "mcs-label",
        "mem",
        "mem-bind",
        "mem-per-cpu",
        "mem-per-gpu",
        "mincpus",
        "network",
        "nice",
        "nodelist",
        "nodes",
        "ntasks-per-node",
        "open-mode",
        "output",
        "partition",
        "power",
        "prefer",
        "priority",
        "profile",
        "propagate",
        "qos",
        "reservation",
        "signal",
        "sockets-per-node",
        "switches",
        "thread-spec",
        "threads-per-core",
        "time",
        "time-min",
        "tmp",
        "wait-all-nodes",
        "wckey",
    ]
)
REFUSED = {
    "no-requeue": "then a preempted job is lost; `submit stop` ends one for good",
    "ntasks": "each node has one task, Ray; workers are cluster.workers",
    "ntasks-per-gpu": "each node has one task, Ray; workers are cluster.workers",
    "wrap": "it replaces the script",
    "uid": "a job runs as who submits it",
    "gid": "a job runs as who submits it",
    "test-only": "nothing would be queued",
    "wait": "`--watch` waits",
    "parsable": "it changes what sbatch prints, not the job",
    "export-file": "an environment from a file may hold secrets; -o secrets=FILE is read by the job itself",
}
NEEDED = ("job-name", "nodes", "ntasks-per-node", "cpus-per-task", "signal", "requeue", "open-mode", "export", "output")
TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")
MAILS = ("NONE", "BEGIN", "END", "FAIL", "REQUEUE", "ALL", "INVALID_DEPEND", "STAGE_OUT")
MAILS += ("TIME_LIMIT", "TIME_LIMIT_90", "TIME_LIMIT_80", "TIME_LIMIT_50", "ARRAY_TASKS")


def lint(rendered: Mapping[str, str]) -> list[Problem]:
    """Problems of a rendered `job.sbatch` and of the configurations beside it."""
    configs, problems = config_lint.read(rendered)
    if SCRIPT not in rendered:
        return [*problems, Problem(SCRIPT, "is not among what is sent", suggestion=RENDER)]
    script = Script(rendered[SCRIPT], configs)
    take_apart(script)
    for rule in (_options, _variables, *RULES):
        rule(script)
    problems += config_lint.problems(configs)
    return [*script.found, *problems, *secrecy.problems(rendered)]


def _options(script: Script) -> None:
    for name in NEEDED:
        if name not in script.options:
            script.say(f"--{name}", "is missing", RENDER)
    for name, (_, value) in script.options.items():
        if name in REFUSED:
            script.say(f"--{name}", f"cannot be: {REFUSED[name]}", "leave it out")
        elif name in FLAGS:
            if value and name not in ("exclusive", "no-kill", "get-user-env"):
                script.say(f"--{name}", "takes no value", f"write --{name}")
        elif name not in VALUED:
            script.say(f"--{name}", "is no option of sbatch", nearest(name, [*FLAGS, *VALUED]) or "see sbatch(1)")
        elif not value or value != value.strip():
            script.say(f"--{name}", "has no value" if not value.strip() else "has spaces around", "write --name=value")


def _variables(script: Script) -> None:
    for name in VARIABLES:
        if name not in script.values:
            script.say(name, "is not set, or not so that it can be read", RENDER)
    for name in ("FOLDER", "JOB"):
        if name in script.values and not PurePosixPath(script.word(name)).is_absolute():
            script.say(name, f"{script.word(name)!r} is not the same place on every node", "write it from / on")
    for name in ("SLOTS", "GPUS", "GRACE"):
        if name in script.values and script.number(name) is None:
            script.say(name, f"{script.word(name)!r} is no number", RENDER)
    python, folder = Path(script.word("PYTHON")), Path(script.word("FOLDER"))
    if folder.is_dir() and python.is_relative_to(folder) and not python.exists():  # elsewhere only the nodes know
        mend = "launch/setup makes .venv in that folder; another one is named by -o python=/path/to/bin/python"
        script.say("PYTHON", f"there is no {python}", mend)


def _size(script: Script) -> None:
    nodes, tasks, cpus = (script.option(name) for name in ("nodes", "ntasks-per-node", "cpus-per-task"))
    if nodes is not None and not re.fullmatch(r"[1-9]\d*", nodes):
        script.say("--nodes", f"{nodes!r} is not one number of nodes", "set it to one: -o nodes=2")
    if tasks is not None and tasks != "1":
        script.say("--ntasks-per-node", f"{tasks} would start Ray {tasks} times on a node", "set it to 1")
    slots = script.number("SLOTS")
    if cpus is not None and slots is not None and not (cpus.isdigit() and int(cpus) > slots):
        mend = f"set it to {slots + 1}: one for the driver and Ray itself"
        script.say("--cpus-per-task", f"{cpus} are too few for the {slots} CPU slots of a node", mend)
    for name, values in script.configs.items():
        if slots and nodes and nodes.isdigit():
            workers = config_lint.workers(values)
            want = workers * (config_lint.value(values, "cluster.threads_per_worker") or 1)
            if want != int(nodes) * slots:
                message = f"{workers} workers do not share {nodes} node(s) evenly"
                script.say("--nodes", f"{message} ({want} CPU slots, {int(nodes) * slots} there; {name})", "-o nodes=N")


def _gpus(script: Script) -> None:
    gpus = script.number("GPUS")
    asked = script.option("gpus-per-node") or script.option("gres") or ""
    count = re.search(r"(?:^|gpu|:)(\d+)$", asked.partition("(")[0].partition(",")[0])
    if gpus and (not count or int(count[1]) < gpus):
        mend = f"write --gpus-per-node={gpus}"
        script.say("--gpus-per-node", f"{asked or 'none'} asked for, {gpus} GPUs needed on a node", mend)
    if gpus == 0 and (count or script.option("gpus")):
        mend = "set cluster.gpu=true, or ask for none"
        script.say("--gpus-per-node", "GPUs are asked for, and no worker would use one", mend)
    wants = [name for name, values in script.configs.items() if config_lint.value(values, "cluster.gpu") is True]
    if gpus == 0 and wants:
        script.say("GPUS", f"is 0, and {wants[0]} has cluster.gpu: true", RENDER)


def _warning(script: Script) -> None:
    signal, time, grace = script.option("signal"), script.option("time"), script.number("GRACE")
    seconds = None
    if signal is not None:
        match = re.fullmatch(r"B:(?:SIG)?USR1@(\d+)", signal)
        if not match:
            mend = "write --signal=B:USR1@120: B: for the script, which tells the driver"
            script.say("--signal", f"{signal!r} never reaches the script as USR1", mend)
        else:
            seconds = int(match[1])
            if not SHORTEST_WARNING <= seconds <= LONGEST_WARNING:
                mend = f"from {SHORTEST_WARNING} to {LONGEST_WARNING}: -o warning=120"
                script.say("--signal", f"{seconds} s are no time in which a save is sure to end", mend)
            if grace is not None and grace != seconds:
                script.say("GRACE", f"is {grace}, and the warning comes {seconds} s before", RENDER)
    if time is not None:
        limit = seconds_of(time)
        if not limit:
            script.say("--time", f"{time!r} is no time limit", "such as 30 (minutes), 4:00:00 or 2-12:00:00")
        elif seconds is not None and limit <= 2 * seconds:
            mend = "give it more time; it is queued again until it is done"
            script.say("--time", f"{limit} s leave no time to train before the warning, {seconds} s", mend)


def seconds_of(text: str) -> int:
    """A time limit of Slurm in seconds (m, m:s, h:m:s, d-h, d-h:m, d-h:m:s); 0 when it is none."""
    match = TIME.fullmatch(text)
    if not match:
        return 0
    days, a, b, c = (int(match[name] or 0) for name in "dabc")
    if match["d"] is not None:
        return ((days * 24 + a) * 60 + b) * 60 + c
    return (a * 60 + b) * 60 + c if match["c"] else a * 60 + b


def _log(script: Script) -> None:
    log, many = script.option("output"), script.option("array") is not None
    if log:
        mark = "%A_%a" if many else "%j"
        if not PurePosixPath(log).is_absolute():
            script.say("--output", f"{log} is another place on each node", "write it from / on")
        if mark not in log:
            script.say("--output", f"{log} is the log of every job", f"put {mark} into its name")
        if script.word("JOB") and str(PurePosixPath(log).parent) != script.word("JOB"):
            mend = f"write --output={script.word('JOB')}/{mark}.log"
            script.say("--output", "is not where `logs` looks; Slurm runs without a log where it has no folder", mend)
    if (mode := script.option("open-mode")) not in (None, "append"):
        script.say("--open-mode", f"{mode} empties the log at every start", "set it to append")


def _array(script: Script) -> None:
    array, members = script.option("array"), sorted(name for name in script.configs if name.startswith("config-"))
    if array is None and members:
        script.say("--array", f"is missing, and there are {len(members)} configurations", RENDER)
    if array is not None:
        match = re.fullmatch(r"0-(\d+)(?:%[1-9]\d*)?", array)
        if not match:
            script.say("--array", f"{array!r} does not count from 0", "such as 0-5, or 0-5%2 for two at a time")
        elif int(match[1]) + 1 != len(members):
            message = f"{int(match[1]) + 1} members, {len(members)} configurations"
            script.say("--array", message, RENDER)
    wanted = "config-" if array is not None else "config.yaml"
    if "CONFIG" in script.values and wanted not in script.word("CONFIG"):
        script.say("CONFIG", f"is {script.word('CONFIG')}, which is not what is sent", RENDER)


def _memory(script: Script) -> None:
    asked = [name for name in ("mem", "mem-per-cpu", "mem-per-gpu") if name in script.options]
    if len(asked) > 1:
        script.say(f"--{asked[1]}", f"excludes --{asked[0]}", "keep one")
    for name in (*asked, *(["tmp"] if "tmp" in script.options else [])):
        if not re.fullmatch(r"\d+(?:[KMGT]B?)?", script.option(name) or "", re.IGNORECASE):
            script.say(f"--{name}", f"{script.option(name)!r} is no size", "such as 64G")


def _leaks(script: Script) -> None:
    export = script.option("export")
    for name in (export or "").split(","):
        if name == "ALL" or "=" in name or secrecy.CALLED.search(name):
            mend = "write --export=HOME,PATH; the job reads its secrets itself, from -o secrets=FILE"
            said = "all of this terminal's environment" if name == "ALL" else name.partition("=")[0]
            script.say("--export", f"puts {said} into the job's record", mend)
    if secrets := script.word("SECRETS"):
        if not PurePosixPath(secrets).is_absolute():
            script.say("SECRETS", f"{secrets} is another place on each node", "write it from / on")
        elif Path(secrets).is_file() and Path(secrets).stat().st_mode & 0o077:
            script.say("SECRETS", f"{secrets} can be read by others", f"chmod 600 {secrets}")


def _names(script: Script) -> None:
    name = script.option("job-name")
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        script.say("--job-name", f"{name!r} is no name", "letters, digits, . _ -")
    for mail in (script.option("mail-type") or "").split(","):
        if mail and mail.upper() not in MAILS:
            script.say("--mail-type", f"{mail} is none of sbatch's", nearest(mail.upper(), MAILS) or ", ".join(MAILS))
    if (folder := script.option("chdir")) and not PurePosixPath(folder).is_absolute():
        script.say("--chdir", f"{folder} is another place elsewhere", "write it from / on")
    depends = script.option("dependency")
    kinds = r"(?:after(?:any|ok|notok|corr|burstbuffer)?(?::\d+(?:\+\d+)?)+|singleton|expand:\d+)"
    if depends and not re.fullmatch(rf"{kinds}(?:[,?]{kinds})*", depends):
        script.say("--dependency", f"{depends!r} is none", "such as afterok:1234 or singleton")
    if len(script.values.get("INSIDE", (0, []))[1]) and len(script.values.get("STEP", (0, []))[1]):
        script.say("INSIDE", "is a container, and STEP another", "keep one: -o container=pyxis or apptainer")


RULES: list[Callable[[Script], None]] = [_size, _gpus, _warning, _log, _array, _memory, _leaks, _names]
