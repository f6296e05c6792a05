"""One worker process: join the world, open a session, train, say goodbye. Under Ray and in one plain process alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config import Config

Send = Callable[[int, list[dict[str, Any]], dict[str, Any]], bool]


def run(config: Config, folder: Path, attempt: int, send: Send, new_order: bool = False) -> str:
    """Train in this process. Returns train's outcome; a failure is in the journal before it is raised."""
    from pipeline import node
    from pipeline.session import Session, World
    from pipeline.train import train

    world = World.join(config.guard.collective_timeout_seconds)
    session = Session(world, folder, attempt, send, new_order)
    try:
        session.owned.enter_context(node.watched(session))
        return train(config, session)
    except BaseException as error:
        session.record_error(error)
        raise
    finally:
        session.close()


def evaluate(config: Config, folder: Path, step: int | None) -> tuple[int, dict[str, float]]:
    """Score a checkpoint in this process: (its step, metrics). Nothing is recorded."""
    from pipeline.session import Session, World
    from pipeline.train import evaluate_checkpoint

    world = World.join(config.guard.collective_timeout_seconds)
    session = Session(world, folder, 0, lambda rank, records, where: False)
    try:
        return evaluate_checkpoint(config, session, step)
    finally:
        session.close()
