"""An S3 server (moto) that answers as one behind a network: later, and each connection at no more than some rate.

python benchmarks/remote_server.py PAUSE_SECONDS BYTES_PER_SECOND -H 127.0.0.1 -p PORT
"""

from __future__ import annotations

import ctypes
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import moto.server

SLICE_SECONDS = 0.01  # of the rate, sent before the next pause

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


def paced(application: Application, pause: float, rate: float, environ: dict[str, Any], start: Any) -> Iterator[bytes]:
    """One answer. pause: seconds before it.  rate: bytes per second."""
    time.sleep(pause)
    due, size = time.monotonic(), max(1, int(rate * SLICE_SECONDS))
    for piece in application(environ, start):
        for at in range(0, len(piece), size):
            part = piece[at : at + size]
            yield part
            due += len(part) / rate
            time.sleep(max(0.0, due - time.monotonic()))


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # no orphan when the benchmark is killed
    pause, rate = float(sys.argv[1]), float(sys.argv[2])
    run: Callable[..., None] = moto.server.run_simple

    def run_paced(host: str, port: int, application: Application, **options: Any) -> None:
        run(host, port, partial(paced, application, pause, rate), **options)

    moto.server.run_simple = run_paced
    moto.server.main(sys.argv[3:])


if __name__ == "__main__":
    main()
