"""`millstream data simulate`: what a run would read over the network, before it is started. See __init__.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.data.mixture import Mixture
    from pipeline.data.remote.simulate import Forecast, Topology
    from pipeline.data.remote.uses import Remote

EXAMPLE = """Example: millstream data simulate configs/mix.yaml --nodes 8 --workers 8 --step-seconds 0.4

Example: millstream data simulate s3://bucket/photos/train --nodes 1000 --micro-batch 32 --bandwidth 1250"""
CONFIGS = (".yaml", ".yml")
CACHE_GB = 32 * 1.073741824
SPREAD = 2.2  # of the batches' means: the largest that a run's defaults are held to

SourceArgument = Annotated[
    str, typer.Argument(metavar="SOURCE", help="YAML file of a run; or folder or URL of indexed tar shards.")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="With a YAML file: keys set for this time.")
]
NodesOption = Annotated[int, typer.Option(min=1, help="Machines with a link and a cache each.")]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="On each; without it those of the YAML file, shared among the nodes, or 1.")
]
BandwidthOption = Annotated[float, typer.Option(min=0.001, help="Of a node's link, MB/s (10^6 bytes).")]
LatencyOption = Annotated[float, typer.Option(min=0, help="Until the first byte of a request comes, ms.")]
CacheOption = Annotated[
    float, typer.Option(min=0, show_default=f"{CACHE_GB:.2f}, that of a run", help="Of a node, GB (10^9 bytes).")
]
StepSecondsOption = Annotated[
    float, typer.Option(min=0, help="Of computing, as a run's page shows them; 0: steps come as fast as the data.")
]
DecodeOption = Annotated[float, typer.Option(min=0, help="Of one micro batch in a worker's loader.")]
StepsOption = Annotated[
    int | None, typer.Option(min=1, help="From the first one; without it an epoch, or what some seconds allow.")
]
GlobalOption = Annotated[
    int | None, typer.Option(min=1, help="Without a YAML file: samples of a step; a micro batch for each worker.")
]
MicroOption = Annotated[int, typer.Option(min=1, help="Without a YAML file: samples of a micro batch.")]
BlocksOption = Annotated[
    int | None, typer.Option(min=1, help="Without a YAML file: blocks shuffled together, else a run's default.")
]


def simulate(
    source: SourceArgument,
    overrides: OverridesArgument = None,
    nodes: NodesOption = 1,
    workers: WorkersOption = None,
    bandwidth: BandwidthOption = 1000.0,
    latency: LatencyOption = 25.0,
    cache: CacheOption = CACHE_GB,
    step_seconds: StepSecondsOption = 0.0,
    decode_seconds: DecodeOption = 0.0,
    steps: StepsOption = None,
    global_batch: GlobalOption = None,
    micro_batch: MicroOption = 32,
    shuffle_blocks: BlocksOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Say what a run would fetch, keep and wait for, and how well it would shuffle, at other places than here.

    Its own order and cache are computed; the link is a model: requests share its bandwidth evenly.
    """
    from pipeline.cli import terminal
    from pipeline.data.remote import simulate as simulator
    from pipeline.data.remote.link import Link
    from pipeline.data.storage import is_url

    if Path(source).suffix in CONFIGS:
        mixture, sets, names, micro_batch, workers, prefetch = _of_config(source, overrides or [], nodes, workers)
    else:
        workers, prefetch, names = workers or 1, simulator.Topology.prefetch, ["shards"]
        batch = global_batch or nodes * workers * micro_batch
        mixture, sets = simulator.of_folder(source, batch, micro_batch, shuffle_blocks)
    link = Link(latency / 1000, bandwidth * 1e6)
    listed = is_url(source) and not source.startswith("http")
    topology = simulator.Topology(
        nodes, workers, micro_batch, link, int(cache * 1e9), prefetch, step_seconds, decode_seconds, listed
    )
    with terminal.progress() as progress:
        forecast = simulator.simulate(mixture, sets, topology, steps, progress)
    if as_json:
        _json(forecast)
    else:
        _say(forecast, topology, sets, names, mixture.segments[-1].global_batch)


def _of_config(
    source: str, overrides: list[str], nodes: int, workers: int | None
) -> tuple[Mixture, list[Remote], list[str], int, int, int]:
    """Order, data sets and their names, micro batch, workers on a node, prefetch of a YAML file's run."""
    from pipeline.config import load
    from pipeline.data.remote import simulate as simulator

    config = load(source, [*overrides, *([f"cluster.workers={nodes * workers}"] if workers else [])])
    workers = workers or max(1, -(-config.cluster.workers // nodes))
    mixture, sets = simulator.of_config(config)
    return mixture, sets, [*config.data.train], config.micro_batch_size, workers, config.data.prefetch


def _say(forecast: Forecast, topology: Topology, sets: list[Remote], names: list[str], batch: int) -> None:
    import numpy as np

    from pipeline.cli import terminal

    of_nodes = f"nodes: {topology.nodes:,}, workers on each: {topology.workers:,}"
    part = "an epoch" if forecast.steps == forecast.epoch else f"of {forecast.epoch:,} in an epoch"
    terminal.say(f"{of_nodes}; {forecast.steps:,} steps of {batch:,} samples ({part})", "bold")
    if len(forecast.nodes) < topology.nodes:
        terminal.say(f"{len(forecast.nodes)} of the nodes are simulated, spread evenly; the others are like them")
    columns = {
        "bytes fetched": forecast.fetched,
        "and for later steps": forecast.ahead,
        "in the cache, at most": forecast.held,
    }
    rows = [
        [what, *(terminal.size(float(of(column))) for of in (np.min, np.median, np.max))]
        for what, column in columns.items()
    ]
    rows.append(["requests", *(f"{of(forecast.requests):,.0f}" for of in (np.min, np.median, np.max))])
    terminal.table(["of a node", "min", "median", "max"], rows)

    rest, computing = forecast.waits[1:], topology.step_seconds * forecast.steps
    facts = [["first batch", f"after {forecast.waits[0]:.2f} s, without the start of the program"]]
    if topology.step_seconds:
        share = rest.sum() / max(rest.sum() + computing, 1e-9)
        facts.append(
            ["waits for data", f"{rest.sum():.1f} s, {share:.1%} of the time; {rest.max(initial=0):.2f} s at most"]
        )
    else:
        pace = float(forecast.waits.sum()) / forecast.steps
        facts.append(
            ["data alone", f"{pace:.3g} s a step, {batch / max(pace, 1e-9):,.0f} samples/s; faster steps wait"]
        )
    facts.append(
        ["cache", f"a run needs {terminal.size(forecast.least)} of a node, {terminal.size(topology.cache)} are there"]
    )
    for name, each, mixed in zip(names, sets, forecast.quality):
        spread = f"spread of the batches {mixed.spread:.2f} (1: as if drawn at random)"
        facts.append(
            [
                f"shuffle of {name}",
                f"{spread}; a batch has samples of {mixed.shards:,.0f} of {len(each.counts):,} shards",
            ]
        )
    terminal.table(["", ""], facts)
    _advise(forecast, topology)


def _advise(forecast: Forecast, topology: Topology) -> None:
    """What a person may want to change."""
    from pipeline.cli import terminal

    rest = float(forecast.waits[1:].sum())
    if topology.step_seconds and rest > 0.05 * topology.step_seconds * forecast.steps:
        terminal.warn("the link is too slow for such steps: take more nodes, smaller samples, or copy the data first")
    if max(mixed.spread for mixed in forecast.quality) > SPREAD:
        terminal.warn(
            "what lies together in the shards comes together: shuffle them when packing, or raise shuffle_blocks"
        )


def _json(forecast: Forecast) -> None:
    import json

    found = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in forecast._asdict().items()}
    found["quality"] = [each._asdict() for each in forecast.quality]
    typer.echo(json.dumps(found, indent=2))
