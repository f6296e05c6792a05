"""Trains in this process, and keeps what would have gone to the journal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.session import Session, World
from pipeline.train import train


def records_of(
    world: World, config: Config, run: Path, attempt: int = 1, outcome: str = "done"
) -> list[dict[str, Any]]:
    """Train to the end, which is `outcome`; this rank's records. The number of workers is the world's."""
    records: list[dict[str, Any]] = []

    def keep(rank: int, new: list[dict[str, Any]], where: dict[str, Any]) -> bool:
        records.extend(new)
        return False

    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"workers": world.world_size})})
    session = Session(world, run, attempt, keep)
    try:
        assert train(config, session) == outcome
    finally:
        session.close()
    return records


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]
