"""What long data commands have in common: who does the work, and that nothing is lost when they are stopped."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from pipeline.data.parallel import Mapping


@contextmanager
def mapping(workers: int, address: str | None) -> Iterator[Mapping]:
    """Who works through the shards: processes here, or a Ray cluster."""
    from pipeline.data.parallel import processes

    if address is None:
        yield processes(workers)
        return
    from pipeline.cluster import tasks

    with tasks.connected(address) as over:
        yield over


@contextmanager
def goes_on() -> Iterator[None]:
    """Says on Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        command = shlex.join(["millstream", *sys.argv[1:]])
        typer.echo(f"\nwhat is done is kept, and the same command goes on from there: {command}", err=True)
        raise
