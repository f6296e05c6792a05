"""The worker's story: build, restore, loop, close. Read this first.

Every rank of an attempt runs `train` from top to bottom. A step is a pure function of (configuration, weights, step
number): the order says which samples, the seed which random draws, the schedule which learning rate. So there is no
iterator to save, no generator state and no scheduler object, and going on after a kill is the same as never having
stopped.

    shard -> loader.step(k) -> task.loss(model, batch) -> engine.backward -> engine.step
"""

from __future__ import annotations

import math
import time

import torch
import xxhash

from pipeline import ema, replicas, tasks
from pipeline.checkpoint import format as checkpoints
from pipeline.checkpoint import probe, rollbacks
from pipeline.config import Config
from pipeline.data.fill import MicroBatch
from pipeline.data.stream import Stream
from pipeline.errors import CheckpointError
from pipeline.evaluate import add, evaluate, flat, means, no_best, on_device
from pipeline.guard import Judge, share_substitutes
from pipeline.health import Health
from pipeline.learner import Learner, build, restore, setup
from pipeline.optim import learning_rate
from pipeline.pace import Figures, Pace
from pipeline.randomness import Randomness
from pipeline.saving import Saving
from pipeline.session import Session
from pipeline.show import keep, show


def train(config: Config, session: Session) -> str:
    """Train until `config.steps` ("done") or a stop is asked for ("stopped"); a checkpoint is committed either way.

    Or until a trouble that it cannot pass ("rollback"): the next attempt goes on from before it.

    Raises DataError, CheckpointError, ConfigError, RunError for what a person can mend; all else is a bug.
    """
    # ------------------------------------------------------------ build, in the order of the data's way, and restore
    world = session.world
    setup(config)
    probe.require_shared(world, session.run / "checkpoints")
    randomness = Randomness(config.seed)
    data = Stream(config)
    session.owned.callback(data.close)
    decided = rollbacks.shared(world, session.run / "checkpoints")
    data.leave_out((each.first, each.last) for each in decided)
    learner = build(config, session, randomness)
    task, engine, throughput = learner.task, learner.engine, learner.throughput
    restored = restore(config, session, learner, data)
    first = restored.step if restored else 0
    judge = Judge(config.guard, config.optim.schedule.warmup, went_back=len(decided))
    if restored and not data.reordered:
        judge.resume(restored.manifest.guard)
    saving = Saving(config, session, learner, data, judge, restored.step if restored else None)
    health, pace = Health(session, learner, config.track.health_every), Pace(session)
    here = world.ranks_here()
    loader = session.owned.enter_context(data.loader(task, world.rank, world.world_size, first, here))

    # ------------------------------------------------------------ loop
    step, outcome, trouble = first, "done", None
    while step < config.steps:
        began = time.perf_counter()
        session.phase("data", step)
        left_out = data.skipped.window(step)
        # A micro batches; which rows they hold does not depend on the world size
        batches = [] if left_out else loader.step(step)
        terms = sum(task.weight(micro.batch) for micro in batches if not micro.filler)
        bad = sum(len(micro.found) for micro in batches)
        terms, stop, bad, ready = world.gather([terms, session.stop_requested, bad, saving.ready]).sum(axis=0)
        if ready == world.world_size:
            saving.advance()
        if bad:
            share_substitutes(session, step, batches, data.substitutes, config.data)
        if stop:
            outcome = "stopped"
            break

        if left_out:  # counts as a step, though nothing is read or computed for it
            if world.rank == 0 and step in (left_out[0], first):
                session.record("left_out", step=step, last=left_out[1])
        else:
            # Forward, backward, step: all ranks apply it, or none does.
            rate = learning_rate(config.optim.schedule, config.optim.lr, step, config.steps)
            for again in (False, True):  # a fault of arithmetic may not repeat
                sums = gradients(session, learner, judge, randomness, step, batches, terms)
                session.phase("step", step)
                saving.hold()
                if terms and health.due(step):
                    health.before_step()
                result = engine.step(rate) if terms else None
                if again or not (result and judge.again(session, step, result)):
                    break
            own = Figures(loader.wait_seconds, rows_digest(batches), session.forward.take(), *throughput.memory())
            everyone = world.gather([*own, *flat(sums)])  # [R, figures + 2 * metrics]
            ranks = Figures(*everyone[:, : len(own)].T)
            metrics = {f"train/{name}": value for name, value in means(sums, everyone[:, len(own) :]).items()}
            if result:
                trouble = judge.judge(session, step, result, metrics["train/loss"], batches)
                if result.applied:
                    learner.running.update(world, config.micro_batches)
                    ema.update(engine, config.ema, step)
                metrics["train/grad_norm"] = result.grad_norm
            else:
                judge.empty(session, step)

            # Record.
            seconds = time.perf_counter() - began
            pace.note(step, ranks, seconds, loader)
            if world.rank == 0:
                metrics["optim/lr"] = rate
                metrics |= throughput.metrics(seconds, terms, ranks.host_bytes.max(), ranks.gpu_bytes.max())
                metrics["time/step_seconds"] = seconds
                metrics["data/wait_seconds"] = float(ranks.waited.max())
                session.record("step", step=step, metrics=metrics, samples=int(ranks.digest.sum()))
            if trouble:
                outcome = "rollback"
                break
            if result and health.due(step):
                health.after_step(step, batches, result.applied)
        step += 1
        if due(step, config.guard.replicas_every, config.steps):
            replicas.compare(engine, world, step)
        if due(step, config.evaluate.every, config.steps):
            score(config, session, learner, step)
            if no_best(config, learner.scores):
                break
        if saving.due(step):
            saving.begin(step)

    # ------------------------------------------------------------ close
    loader.close()
    if trouble:
        saving.settle(step)
        judge.go_back(session, step, trouble)
    else:
        saving.finish(step)
    if problem := no_best(config, learner.scores):
        raise problem
    if world.rank == 0:
        session.record("end", reason=outcome, step=step)
    session.flush()
    return outcome


def gradients(
    session: Session,
    learner: Learner,
    judge: Judge,
    randomness: Randomness,
    step: int,
    batches: list[MicroBatch],
    terms: float,
) -> tasks.Sums:
    """Forward and backward of this rank's micro batches; the sums for the metrics.

    Gradients are summed over all micro batches: each of the batch's `terms` weighs the same. Without any, nothing is
    computed. When the guard refuses the loss, the last gradient is spoilt: what is not finite is the one thing that no
    ZeRO stage applies.
    """
    task, engine, device = learner.task, learner.engine, session.world.device
    sums: tasks.Sums = {}
    learner.running.begin()
    for micro in batches if terms else ():
        scale = 0.0 if micro.filler else 1.0 / terms
        with randomness.draws(step, micro.index):
            session.phase("forward", step)
            loss, sums_of_micro = task.loss(engine.model, on_device(micro.batch, device))
            if not micro.filler:
                add(sums, sums_of_micro)
            if micro is batches[-1] and judge.refuses(session.world, sums):
                scale = math.nan
            session.phase("backward", step)
            # A loss that is not finite spoils the gradient, also where the gradient would not show it.
            engine.backward(loss.float() * torch.where(loss.detach().isfinite(), scale, math.nan))
        if not micro.filler:
            learner.running.add()
    return sums


def score(config: Config, session: Session, learner: Learner, step: int) -> None:
    """Score the held-out sets as the network stands after `step` steps, and record it, with samples to look at."""
    session.phase("evaluation", step)
    began = time.perf_counter()
    learner.running.publish()
    learner.scores = evaluate(config, learner.task, learner.engine, session.world)
    learner.scored_step = step
    shown = show(config, learner.task, learner.engine)
    if learner.scores and session.world.rank == 0:
        session.record("evaluation", step=step, metrics=learner.scores, seconds=time.perf_counter() - began)
    if shown and session.world.rank == 0:
        keep(session, step, shown)


def evaluate_checkpoint(config: Config, session: Session, step: int | None) -> tuple[int, dict[str, float]]:
    """Score the held-out sets with the newest good checkpoint, or that of `step`: (its step, metrics). Writes nothing.

    Raises CheckpointError when the run has no checkpoint.
    """
    setup(config)
    learner = build(config, session, Randomness(config.seed))
    restored = restore(config, session, learner, None, step)
    if restored is None:
        steps = [listed.step for listed in checkpoints.list_checkpoints(session.run / "checkpoints")]
        raise CheckpointError(
            f"{session.run} has no checkpoint of step {step}; there are {steps}"
            if steps
            else f"{session.run} has no checkpoint yet; train it first"
        )
    learner.running.publish()
    return restored.step, evaluate(config, learner.task, learner.engine, session.world)


def due(step: int, every: int | None, last: int) -> bool:
    """Whether something that happens every so many steps, and after the last one, happens after this one."""
    return step == last or (every is not None and step % every == 0)


def rows_digest(batches: list[MicroBatch]) -> int:
    """Which samples stood in which rows, as a number below 2^40; its sum over ranks is that of any world size."""
    counted = [micro for micro in batches if not micro.filler]
    places = ((m, m.epochs.tobytes() + m.numbers.tobytes()) for m in counted)
    # The first source counts as no source, so that the digests of a run with one data set are those of any version.
    rows = (xxhash.xxh3_64_intdigest(p + m.sources.tobytes() * bool(m.sources.any()), seed=m.index) for m, p in places)
    return sum(row >> 24 for row in rows)
