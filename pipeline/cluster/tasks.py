"""Do one thing to many items over the machines of a running Ray cluster, with the results in the order of the items.

The same face as pipeline.data.parallel: whoever works through shards takes either. The machines must see the same
files under the same paths. What it gives up: a task whose machine is lost is tried again by Ray, three times.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from pipeline.cluster.nodes import reach
from pipeline.data.parallel import AHEAD, Mapping, ahead
from pipeline.errors import RunError


@contextmanager
def connected(address: str) -> Iterator[Mapping]:
    """A Mapping over the Ray cluster at `address`, for as long as the block lasts; RunError when there is none."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    try:
        reach(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(f"no Ray cluster at {address}: {error}; leave --address out to use this machine") from error
    try:
        yield over_ray
    finally:
        ray.shutdown()


def over_ray(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`function(item)` of each item as a Ray task of one CPU, some tasks ahead; in the process's Ray cluster.

    Raises what the function raised.
    """
    import ray
    from ray.exceptions import RayTaskError

    submit = partial(ray.remote(num_cpus=1)(_call).remote, function)
    depth = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
    for reference in ahead(submit, items, depth):
        try:
            yield ray.get(reference)
        except RayTaskError as error:
            raise error.cause from None


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)
