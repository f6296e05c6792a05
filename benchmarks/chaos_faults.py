"""Real faults to a real run, from outside, at random moments.

Kinds come in a seeded order, each at a random time (exponential) after the run steps again, a quarter of them after the
last fault, so that starts are hit too; whom they hit follows from the journal and from /proc. What it gives up: the
seed decides order, gaps and victims; at which step a fault strikes, the clock decides. A fault waits until there is
somebody to hit: a worker, an attempt that steps, a driver that listens.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from chaos_goodput import ENDS_AN_ATTEMPT, NOTICED_BY, Fault
from chaos_scheduler import AGAIN, Scheduler, Stuck, Watch

from pipeline.cluster.output import rank_log

POLL_SECONDS = 0.05
STUCK_SECONDS = 900.0  # without a new record in the journal
FULL_SECONDS = 60.0  # that the disk stays full when nobody saves
WHATEVER_IT_DOES = 0.25  # share of the faults that do not wait until the run steps again
LEAST_STEPS = 60  # in which planted samples come
MANUAL_STEPS = 3  # after so many it is given up

Say = Callable[[str], None]


class Chaos:
    """Faults of these kinds to the run in `folder`. once: the file that asks for a NaN.  disk: what can be filled."""

    def __init__(
        self, scheduler: Scheduler, folder: Path, kinds: Sequence[str], once: Path, disk: Path, seed: int, say: Say
    ) -> None:
        self.faults: list[Fault] = []
        self._scheduler, self._folder, self._once, self._disk, self._say = scheduler, folder, once, disk, say
        self._kinds = kinds
        self._draw = random.Random(seed)
        self._watch = Watch(folder)
        self._told = 0
        self._last_command = False  # its end is the end
        self._told_to_stop: object = None  # the process
        self._strikes: dict[str, Callable[[], float | None]] = {
            "worker killed": lambda: self._signal_worker(signal.SIGKILL) if self._listening() else None,
            "worker stopped": lambda: self._signal_worker(signal.SIGSTOP) if self._stepping() else None,
            "driver killed": lambda: self._signal_driver(signal.SIGKILL),
            "driver told to stop": lambda: self._signal_driver(signal.SIGTERM) if self._listening() else None,
            "disk full": lambda: self._fill() if self._stepping() else None,
            "one NaN": lambda: self._ask_for_nan() if self._stepping() else None,
        }
        assert self._strikes.keys() == NOTICED_BY.keys()

    def run(self, seconds: float, mean_gap: float, least: int) -> None:
        """Train under faults for so long, and until there were `least`; then stop the run, saved. Raises Stuck."""
        end, order = time.monotonic() + seconds, self._order()
        self._scheduler.start()
        while True:
            gap, left = self._draw.expovariate(1 / mean_gap), end - time.monotonic()
            if gap > left and len(self.faults) >= least:
                self._wait(lambda: False, left)
                break
            if self._draw.random() > WHATEVER_IT_DOES:
                self._wait(self._steps_again, STUCK_SECONDS)
            self._wait(lambda: False, gap)
            self._strike(next(order))
        self._wait(lambda: self._steps_again() and not self._once.exists(), STUCK_SECONDS)
        self._wait(lambda: self._watch.step >= LEAST_STEPS, STUCK_SECONDS)
        self._leave()

    def close(self) -> None:
        self._watch.close()
        self._empty()
        self._scheduler.close()

    def _order(self) -> Iterator[str]:
        """Each kind once, then in every round the killed worker twice, shuffled."""
        yield from self._draw.sample(self._kinds, len(self._kinds))
        while True:
            kinds = [*self._kinds, "worker killed"]
            yield from self._draw.sample(kinds, len(kinds))

    def _strike(self, kind: str) -> None:
        found: list[float] = []

        def struck() -> bool:
            attempt, step = self._watch.attempt, self._watch.step
            at = self._strikes[kind]()
            if at is not None:
                found.append(at)
                self.faults.append(Fault(kind, at, attempt, step))
            return at is not None

        self._wait(struck, STUCK_SECONDS)
        if not found:
            raise Stuck(f"nobody to hit for {STUCK_SECONDS:.0f} s: {kind}\n{self._scheduler.tail()}")
        self._say(f"step {self.faults[-1].step:>6}  {kind}")
        if kind == "disk full":
            self._wait(lambda: self._watch.since("save_failed", found[0]), FULL_SECONDS)
            self._empty()

    def _wait(self, until: Callable[[], bool], seconds: float) -> None:
        """Until it is so, or the time is over; meanwhile the command is started again when it has ended."""
        deadline = time.monotonic() + seconds
        while not until() and time.monotonic() < deadline:
            self._tend()
            time.sleep(POLL_SECONDS)

    def _tend(self) -> None:
        code = self._scheduler.ended()
        if code == 0 or self._scheduler.manual_steps >= MANUAL_STEPS:
            raise Stuck(f"the command ended with exit code {code}\n{self._scheduler.tail()}")
        if code is not None and not self._last_command:
            self._scheduler.start()
        if time.monotonic() - self._watch.heard > STUCK_SECONDS:
            raise Stuck(f"nothing in the journal for {STUCK_SECONDS:.0f} s\n{self._scheduler.tail()}")
        for record in self._watch.records[self._told :]:
            self._told += 1
            if record["kind"] in ("start", "restore"):
                self._say(f"step {record['step']:>6}  goes on, attempt {record['attempt']}")

    def _leave(self) -> None:
        """Ask the run to stop until it has done so by itself: saved, with exit code 75. Raises Stuck."""
        while True:
            self._wait(self._stepping, STUCK_SECONDS)
            self._last_command = True
            self._signal_driver(signal.SIGTERM)
            self._wait(lambda: len(self._scheduler.ends) == len(self._scheduler.processes), STUCK_SECONDS)
            code = self._scheduler.process.poll()
            if code == AGAIN:
                return
            if code is None:
                raise Stuck(f"does not stop\n{self._scheduler.tail()}")
            self._last_command = False
            self._scheduler.start()

    def _steps_again(self) -> bool:
        """Whether a step was done since the last fault, and not by the attempt that it ended."""
        if not self.faults:
            return self._watch.since("step", 0.0)
        last = self.faults[-1]
        return self._watch.since("step", last.at, last.attempt + (last.kind in ENDS_AN_ATTEMPT))

    def _listening(self) -> bool:
        """Whether the newest command has begun an attempt: from then on it handles signals."""
        began = self._scheduler.ends[-1][0] if self._scheduler.ends else 0.0
        return len(self._scheduler.ends) < len(self._scheduler.processes) and self._watch.since("attempt", began)

    def _stepping(self) -> bool:
        """Whether the newest attempt, of the newest command, has come to its steps and is not about to leave."""
        attempt = self._watch.attempt
        if self._told_to_stop is self._scheduler.process:
            return False
        begun = any(self._watch.since(kind, 0.0, attempt) for kind in ("start", "restore"))
        return self._listening() and begun and not self._watch.since("failure", 0.0, attempt)

    def _signal_worker(self, number: int) -> float | None:
        logs = {str(rank_log(self._folder, self._watch.attempt, rank)): rank for rank in (0, 1)}
        found: dict[int, int] = {}
        for path in Path("/proc").glob("[0-9]*/fd/1"):
            with suppress(OSError):
                if (rank := logs.get(os.readlink(path))) is not None:
                    found[rank] = int(path.parts[2])
        if len(found) < len(logs):
            return None
        at = time.time()
        with suppress(ProcessLookupError):
            os.kill(found[self._draw.randrange(len(logs))], number)
            return at
        return None

    def _signal_driver(self, number: int) -> float | None:
        at = time.time()
        if self._scheduler.process.poll() is not None:
            return None
        self._scheduler.process.send_signal(number)
        if number == signal.SIGTERM:
            self._told_to_stop = self._scheduler.process
        return at

    def _ask_for_nan(self) -> float:
        self._once.touch()
        return time.time()

    def _fill(self) -> float:
        """Fill the file system to its last block."""
        with (self._disk / ".filler").open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                with suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass
        return time.time()

    def _empty(self) -> None:
        (self._disk / ".filler").unlink(missing_ok=True)
