"""What is around a run: versions, processors, GPUs, a cluster's address, W&B, secrets (by name only), variables.

What it gives up: what an image holds is not looked into; the versions that images are built from are those of
constraints.txt.
"""

from __future__ import annotations

import os
import re
import socket
import urllib.parse
from importlib import metadata
from pathlib import Path

from pipeline.cluster import nodes
from pipeline.config import Config
from pipeline.doctor.findings import Report
from pipeline.problems import nearest
from pipeline.submit import secrecy
from pipeline.track.wandb import account
from pipeline.zero import DEEPSPEED_VERSION

PART = "environment"
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
MATTER = ("torch", "deepspeed", "ray", "transformers", "numpy", "safetensors", "tokenizers", "pydantic", "wandb")
MODES = ("online", "offline", "disabled", "dryrun", "shared")
REACH_SECONDS = 2.0
STORES = {  # of a store -> variables of which one at least is usually set
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS",),
    "az": ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_CLIENT_ID"),
}
FILES = {"s3": "~/.aws/credentials", "gs": "~/.config/gcloud/application_default_credentials.json", "az": "~/.azure"}


def look(config: Config, report: Report, target: str | None, world_size: int) -> None:
    """Note what is around; `target` is where the run goes, where this machine does not count for all.

    None: nobody is asked, and nothing said of what the start of a run tells by itself.
    """
    _versions(report)
    _wandb(config, report, asking=target is not None)
    _secrets(config, report)
    if os.environ.get("MILLSTREAM_KILL"):
        message = "is set: workers will be killed on purpose, as in a test"
        report.add("warning", PART, "MILLSTREAM_KILL", message, "unset MILLSTREAM_KILL")
    if target == "local":
        _machine(config, report, world_size)


def _versions(report: Report) -> None:
    """Those here against those that were tested together, from which images are built too."""
    lines = CONSTRAINTS.read_text().splitlines() if CONSTRAINTS.is_file() else []
    wanted = dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))
    for name in MATTER:
        try:
            have = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            report.add("error", PART, "versions", f"{name} is not installed", "launch/setup, or pip install millstream")
            continue
        want = DEEPSPEED_VERSION if name == "deepspeed" else wanted.get(name, "").split()[:1]
        want = want if isinstance(want, str) else "".join(want).partition("+")[0]
        if want and have != want:
            level = "error" if name == "deepspeed" else "warning"
            why = "checkpoints read its insides" if name == "deepspeed" else "tested, and in the images, is"
            message = f"{name} {have} is installed; {why} {want}"
            report.add(level, PART, "versions", message, f"pip install {name}=={want}")


def _wandb(config: Config, report: Report, asking: bool) -> None:
    place, said = "track.wandb", os.environ.get("WANDB_MODE")
    if said and said not in MODES and config.track.wandb == "auto":
        mend = nearest(said, MODES) or f"one of: {', '.join(MODES)}"
        report.add(
            "warning", PART, "WANDB_MODE", f"{said!r} is no mode of W&B, so nothing is sent: offline or off", mend
        )
    mode = account.mode(config.track.wandb)
    report.figures["wandb"] = mode
    if mode != "online":
        return
    key = account.key()
    if key is None and asking:
        message = "there is no key, so the run is written offline"
        report.add("warning", PART, place, message, "wandb login, or set WANDB_API_KEY; or track.wandb: offline")
    elif key is not None and len(key.rpartition("-")[2]) < 40:
        report.add(
            "warning", PART, "WANDB_API_KEY", "is shorter than W&B's keys, which have 40 characters", "wandb login"
        )
    if not asking:
        return
    url = urllib.parse.urlsplit(account.server())
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname or "", port), REACH_SECONDS).close()
    except OSError as error:
        message = f"{url.netloc} cannot be reached from here ({error}); the run would be written offline"
        report.add("warning", PART, place, message, "track.wandb: offline, and `millstream track sync` later")


def _secrets(config: Config, report: Report) -> None:
    """Which there are, by name; never a value."""
    report.figures["secrets"] = sorted(name for name in os.environ if secrecy.CALLED.search(name))
    kind = (config.checkpoint.url or "").partition("://")[0]
    found = any(os.environ.get(name) for name in STORES.get(kind, ()))
    if kind in STORES and not found and not Path(FILES[kind]).expanduser().exists():
        message = f"no secret for {kind}:// is here: none of {', '.join(STORES[kind])}, no {FILES[kind]}"
        report.add("warning", PART, "checkpoint.url", message, "set one, unless the machines have a role of their own")


def _machine(config: Config, report: Report, world_size: int) -> None:
    """Processors, GPUs and cluster of this machine."""
    cluster = config.cluster
    if cluster.address:
        try:
            nodes.reach(cluster.address)
        except (OSError, ValueError) as error:
            message = f"nobody answers at {cluster.address}: {error}"
            report.add("error", PART, "cluster.address", message, "start the cluster, or leave it out")
        return
    if cluster.gpu is True:
        import torch

        if torch.cuda.device_count() < max(1, cluster.workers):
            message = (
                f"{max(1, cluster.workers)} workers want a GPU each, and torch sees {torch.cuda.device_count()} here"
            )
            report.add("error", PART, "cluster.gpu", message, "leave cluster.gpu out, or give --target")
    have = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = max(1, world_size) * cluster.threads_per_worker
    if cluster.workers and wanted > have:
        place = "cluster.threads_per_worker" if cluster.threads_per_worker > 1 else "cluster.workers"
        each = f"{max(1, world_size)} workers of {cluster.threads_per_worker} threads"
        message = f"{each} want {wanted} processors; there are {have}"
        fits = cluster.workers * cluster.threads_per_worker <= have
        level = "warning" if fits else "error"  # --world-size asks of another machine
        report.add(level, PART, place, message, "lower it, or give --target of where it will run")


def size(text: str) -> int | None:
    """Bytes of `4Gi`, `64G`, `500M` as Kubernetes writes them; None for anything else."""
    match = re.fullmatch(r"(\d+)([KMGTP]i?)?", text)
    if not match:
        return None
    unit = match[2] or ""
    power = "KMGTP".index(unit[0]) + 1 if unit else 0
    return int(match[1]) * (1024 if unit.endswith("i") else 1000) ** power
