"""What is trained, built in the order that matters: task, network, its first weights, engine; then restored.

    seed -> network -> (first weights of a pretrained folder) -> engine -> (the newest good checkpoint)

What it gives up: without a pretrained folder every rank builds the whole network once, whatever the ZeRO stage.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline import checkpoint, jit, tasks
from pipeline import engine as engines
from pipeline.batch_norm import RunningStatistics
from pipeline.checkpoint import Restored, uploads
from pipeline.checkpoint import format as checkpoints
from pipeline.config import Config
from pipeline.data.stream import Stream
from pipeline.engine import Engine
from pipeline.randomness import Randomness
from pipeline.session import Session
from pipeline.throughput import Throughput


@dataclass
class Learner:
    """What is trained: the task, the engine around its network, the statistics beside it, how many parameters, what
    there is to know of their first weights, and what their steps are worth.
    """

    task: tasks.Task
    engine: Engine
    running: RunningStatistics
    parameters: int
    notes: list[str]
    throughput: Throughput
    scored_step: int | None = None
    scores: dict[str, float] = field(default_factory=dict)


def setup(config: Config) -> None:
    """What torch must know before anything is computed."""
    torch.set_num_threads(config.cluster.threads_per_worker)  # the thread count changes convolution sums
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses matrix products on GPU


def build(config: Config, session: Session, randomness: Randomness) -> Learner:
    """Task, network with weights that follow from the seed alone, engine."""
    for said in jit.clear() if session.world.local_rank == 0 else ():
        session.record("warning", message=said)
    session.world.barrier()
    task: tasks.Task = tasks.find(config.task.name).Task(config.task)
    kept = kept_network(config, session)
    with randomness.draws("weights"):
        model = task.build_model(kept) if kept else task.build_model()
    weights = getattr(task, "weights", None)
    running = RunningStatistics(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())  # ZeRO-3 leaves only shares of them
    engine = engines.build(config, model, session.world, weights)
    session.owned.callback(engine.close)
    running.to(session.world.device)
    throughput = Throughput(config, task, session.world)
    return Learner(task, engine, running, parameters, weights.notes if weights else [], throughput)


def kept_network(config: Config, session: Session) -> dict[str, Any] | None:
    """What the newest checkpoint says of a network that began as a pretrained folder; None when it is to be read."""
    if getattr(config.task, "pretrained", None) is None:
        return None
    listed = checkpoints.list_checkpoints(session.run / "checkpoints")
    found = next((each.manifest.network for each in reversed(listed) if each.manifest), None)
    return session.world.gather_objects(found)[0] or None


def restore(
    config: Config, session: Session, learner: Learner, data: Stream | None, step: int | None = None
) -> Restored | None:
    """Go on from the newest good checkpoint (or that of `step`), or start when the run has none; say which.

    Without `data`, whatever the checkpoint was trained on will do, and nothing is fetched: the run may be going on.
    """
    session.phase("restore", 0)
    restored = checkpoint.restore(
        learner.engine,
        session.world,
        session.run / "checkpoints",
        config=config,
        resume=lambda at, saved: data.resume(at, saved, session.new_order) if data else [],
        buffers=learner.running.values,
        step=step,
        home=uploads.home_of(config, session.run) if data else None,
    )
    if session.world.rank == 0:
        kind, at, notes = ("restore", restored.step, restored.notes) if restored else ("start", 0, learner.notes)
        ahead = data.skipped.since(at).windows if data else ()
        notes = [*notes, *learner.throughput.notes, *(f"steps {begin} to {end} are left out" for begin, end in ahead)]
        workers = session.world.world_size
        facts = {"workers": workers, "parameters": learner.parameters, "data": str(data)}
        if data is not None:
            facts["window_bytes"] = data.window_bytes(workers)
        session.record(kind, step=at, notes=notes, **facts)
    return restored
