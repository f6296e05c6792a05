"""Ray, and nothing but Ray: a cluster to stand on, one attempt as one `TorchTrainer.fit`.

Ray Train places the workers, forms the process group and ends all of them when one dies. It keeps no checkpoint, no
retry and no state of ours: `max_failures=0`, and the driver decides what comes after. The training function runs in a
thread of its worker, so workers install no signal handlers; a stop comes through the board.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pipeline.cluster import fate, nodes
from pipeline.cluster.board import Board
from pipeline.cluster.output import rank_log
from pipeline.cluster.watchdog import STACKS
from pipeline.config import Config
from pipeline.errors import RunError

REACH_SECONDS = 10.0  # for a call on another host
SCRATCH = "millstream-ray-"  # in the system's temporary folder: Ray's sockets need a short path


@contextmanager
def cluster(config: Config, address: str | None) -> Iterator[Mapping[str, float]]:
    """Connect to the cluster at `address`, or start one on this machine that ends with this process. Yields its
    resources.

    Raises RunError when the cluster cannot be reached.
    """
    sweep_scratch()
    scratch = tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-")
    # No report to anyone; Ray Train's second version; and the future default of a third, or Ray warns at every start.
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_V2_ENABLED": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if address is None:
        # When memory runs out, end a worker: the policy since Ray 2.56 takes the board and the controller with it.
        os.environ.setdefault("RAY_worker_killing_policy_by_group", "1")
    with nullcontext() if address else own_token():
        import ray  # it reads at its import whether there are tokens

        try:
            if address is None:
                cpus = config.cluster.workers * config.cluster.threads_per_worker + 1
                ray.init(
                    address="local",
                    num_cpus=max(os.cpu_count() or 1, cpus),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=100 * 2**20,
                    _metrics_export_port=config.cluster.metrics_port,
                    _temp_dir=scratch,
                )
            else:
                nodes.reach(address)
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise RunError(f"no Ray cluster at {address or 'this machine'}: {error}") from error
        try:
            yield ray.cluster_resources()
        finally:
            ray.shutdown()
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def own_token() -> Iterator[None]:
    """A token for the private cluster of this block alone. Left alone, Ray writes one into the home folder, for all;
    and one that stayed here would be sent to the clusters that this process asks later, in place of theirs.
    """
    ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def lost_actor() -> tuple[type[BaseException], ...]:
    """What a call of an actor raises that is gone: its node was lost, or Ray's memory monitor has ended it."""
    from ray.exceptions import OutOfMemoryError, RayActorError

    return RayActorError, OutOfMemoryError


def require(config: Config, resources: Mapping[str, float]) -> bool:
    """Whether workers get a GPU. Raises RunError with the numbers when the cluster can never hold the workers."""
    cluster = config.cluster
    wanted = cluster.workers if cluster.min_workers is None else cluster.min_workers
    gpus = resources.get("GPU", 0.0)
    use_gpu = bool(gpus) if cluster.gpu is None else cluster.gpu
    kind = "GPUs" if use_gpu else "CPU slots"
    have = gpus if use_gpu else resources.get("CPU", 0.0) // cluster.threads_per_worker
    if have < wanted:
        key = "cluster.workers" if cluster.min_workers is None else "cluster.min_workers"
        raise RunError(
            f"{key} is {wanted}, but the cluster has {have:.0f} {kind} "
            f"({cluster.threads_per_worker} thread(s) a worker). Set {key}={have:.0f}, or add nodes."
        )
    return use_gpu


class Attempt:
    """One fit of fixed world size. `run` blocks until it has ended; `request_stop` may come from another thread."""

    def __init__(self, config: Config, folder: Path, number: int, workers: int, use_gpu: bool, new_order: bool) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.config, self.folder, self.number, self.workers = config, folder, number, workers
        self.use_gpu, self.new_order = use_gpu, new_order
        # A board that is killed is started anew, and what it had not answered is asked again: the attempt goes on.
        anew = {"max_restarts": -1, "max_task_retries": -1}
        actor = ray.remote(_Board).options(num_cpus=0, scheduling_strategy=here, **anew)
        self._stopping = False
        self.board: Any = actor.remote(folder / "journal.jsonl", number)

    def record(self, record: dict[str, Any]) -> None:
        import ray

        ray.get(self.board.record.remote(record))

    def request_stop(self) -> None:
        import ray

        self._stopping = True
        ray.get(self.board.request_stop.remote())

    def heartbeats(self) -> dict[int, dict[str, Any]]:
        import ray

        if self._stopping:  # a board that was started anew does not know
            self.board.request_stop.remote()
        return ray.get(self.board.heartbeats.remote())

    def capacity(self) -> int:
        """Workers that the cluster could hold now, as far as the run wants them."""
        cluster = self.config.cluster
        room = min(nodes.capacity(cluster, self.use_gpu), cluster.workers)
        if room > self.workers:  # by what Ray knows; a node that was just lost is still among them
            room = min(nodes.capacity(cluster, self.use_gpu, asking=True), cluster.workers)
        return room

    def leaving(self) -> list[str]:
        """Hosts of its workers that are about to go."""
        draining = nodes.draining()
        if not draining:
            return []
        return sorted({beat["host"] for beat in self.heartbeats().values() if beat["node"] in draining})

    def signal(self, beat: Mapping[str, Any], number: int) -> str:
        """Send a signal to the worker of a heartbeat, on whichever host it is; the state it was in, as /proc has it.

        An empty string when the process, or its host, cannot be reached.
        """
        return _at(beat["node"], _signal, beat["pid"], number) or ""

    def fate(self, rank: int, beat: Mapping[str, Any], error: BaseException) -> str:
        """What became of the worker of a heartbeat that is gone."""
        raised = getattr(error, "worker_failures", {}).get(rank, error)
        kernel = _at(beat["node"], fate.more_kills, beat["kills"])
        return fate.tell(f"{type(raised).__name__}: {raised}", kernel, rank_log(self.folder, self.number, rank))

    def run(self) -> BaseException | None:
        """Fit. Returns what ended it, or None when every worker returned."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        threads = self.config.cluster.threads_per_worker
        resources = {"CPU": float(threads)} | ({"GPU": 1.0} if self.use_gpu else {})
        with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-fit-") as storage:
            trainer = TorchTrainer(
                _worker,
                train_loop_config={
                    "config": self.config.model_dump(mode="json"),
                    "folder": str(self.folder),
                    "attempt": self.number,
                    "board": self.board,
                    "new_order": self.new_order,
                },
                scaling_config=ScalingConfig(
                    num_workers=self.workers, use_gpu=self.use_gpu, resources_per_worker=resources
                ),
                torch_config=TorchConfig(
                    backend="nccl" if self.use_gpu else "gloo",
                    timeout_s=int(self.config.guard.collective_timeout_seconds),
                ),
                run_config=RunConfig(
                    name=f"{self.folder.name}-a{self.number}",
                    storage_path=storage,
                    failure_config=FailureConfig(max_failures=0, controller_failure_limit=2),
                ),
            )
            try:
                return trainer.fit().error
            except Exception as error:  # Ray raises many kinds; the journal knows the true reason
                return error

    def close(self) -> None:
        import ray

        ray.get(self.board.close.remote())
        ray.kill(self.board)


class _Board(Board):
    """The board as an actor."""

    def __init__(self, journal: Path, attempt: int) -> None:
        import ray

        super().__init__(journal, attempt)
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self.remember()


def _worker(work: dict[str, Any]) -> None:
    """What Ray Train calls in each worker."""
    import ray
    from ray.train import get_context

    from pipeline.cluster import output, worker

    folder, attempt, board = Path(work["folder"]), work["attempt"], work["board"]
    output.to_file(rank_log(folder, attempt, get_context().get_world_rank()))
    faulthandler.enable(file=2)  # a crash in native code leaves its stack in the log
    faulthandler.register(STACKS, file=2)  # written by the signal's handler itself, whatever holds the GIL
    node = {"node": ray.get_runtime_context().get_node_id(), "kills": fate.kills()}
    worker.run(
        Config.model_validate(work["config"]),
        folder,
        attempt,
        lambda rank, records, where: ray.get(board.deliver.remote(rank, records, where | node)),
        work["new_order"],
    )


def _at(node: str, function: Callable[..., Any], *args: Any) -> Any:
    """What a function says on a node; None when the node cannot be reached."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if node == ray.get_runtime_context().get_node_id():
        return function(*args)
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    try:
        task = ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
        return ray.get(task.remote(*args), timeout=REACH_SECONDS)
    except RayError:
        return None


def _signal(pid: int, number: int) -> str:
    """Signal a process of this host; its state before (R, S, D, T, Z: see proc(5)), empty when it is gone."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        os.kill(pid, number)
    except OSError:
        return ""
    return state


def sweep_scratch() -> None:
    """Remove what drivers left that were killed: their folders carry their process id."""
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        owner = left.name.removeprefix(SCRATCH).split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(left, ignore_errors=True)
