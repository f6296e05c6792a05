"""What became of a worker: from Ray's words, the kernel's counts and its log; and errors for want of memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.cluster import fate
from pipeline.cluster.failure import diagnose

EVENTS = "low 0\nhigh 0\nmax 3\noom 1\noom_kill {}\noom_group_kill 0\n"  # memory.events of cgroup v2
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"  # memory.oom_control of v1
STATE = "nr_free_pages 17\noom_kill {}\npgfault 9\n"  # /proc/vmstat


def put(root: Path, file: str, text: str) -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(text)


@pytest.mark.parametrize(
    ("cgroup", "file", "text"),
    [
        ("0::/user.slice/job\n", "sys/fs/cgroup/user.slice/job/memory.events", EVENTS),
        ("0::/kubepods/pod7/out-of-sight\n", "sys/fs/cgroup/memory.events", EVENTS),
        ("5:cpu:/\n4:memory:/slurm/job\n0::/\n", "sys/fs/cgroup/memory/slurm/job/memory.oom_control", CONTROL),
        ("4:hugetlb,memory:/docker/x\n", "sys/fs/cgroup/memory/memory.oom_control", CONTROL),
        ("0::/\n", "proc/vmstat", STATE),
        (None, "proc/vmstat", STATE),
    ],
)
def test_the_count_of_the_cgroup_is_read_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str | None, file: str, text: str
) -> None:
    """Files in the kernel's own words, of hosts of other kinds than this one."""
    monkeypatch.setattr(fate, "ROOT", tmp_path)
    put(tmp_path, "proc/vmstat", STATE.format(5))
    if cgroup is not None:
        put(tmp_path, "proc/self/cgroup", cgroup)
    put(tmp_path, file, text.format(2))
    before = fate.kills()
    assert before == {file: 2} and fate.more_kills(before) is False
    put(tmp_path, file, text.format(3))
    assert fate.more_kills(before) is True
    (tmp_path / file).unlink()
    assert fate.more_kills(before) is None


def test_this_host_s_count_can_be_read() -> None:
    before = fate.kills()
    assert len(before) == 1 and fate.more_kills(before) is False


def test_the_causes_are_told_apart(tmp_path: Path) -> None:
    log, crash = tmp_path / "rank-1.log", "import ctypes, faulthandler; faulthandler.enable(); ctypes.string_at(0)"
    monitor = "ActorDiedError: ... Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: ..."
    died = "ActorDiedError: ... Worker exit type: SYSTEM_ERROR ... (1) the process was killed by the OOM killer ..."
    assert fate.tell(monitor, False, log) == "killed: out of memory, by Ray's memory monitor"
    assert fate.tell(died, True, log) == "killed: out of memory, by the kernel"
    assert fate.tell(died, False, log) == "killed"
    assert fate.tell(died, None, log) == "killed, or out of memory"
    with log.open("w") as file:
        subprocess.run([sys.executable, "-c", crash], stderr=file, check=False)
    assert fate.tell(died, False, log) == "crashed in native code: Segmentation fault, its stack is in rank-1.log"


def test_errors_for_want_of_memory_say_how_less_is_needed() -> None:
    """What torch and numpy really raise; a device's error in the words of torch's documentation (no GPU here)."""
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(2**50)
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(2**55)
    for error in (of_torch.value, of_numpy.value):
        assert fate.short_of_memory(type(error).__name__, str(error)) == fate.LESS_MEMORY
    device = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of ..."
    )
    assert fate.short_of_memory(type(device).__name__, str(device)) == fate.LESS_DEVICE_MEMORY
    assert fate.short_of_memory("RuntimeError", "shapes cannot be multiplied") == ""


def test_the_failure_says_it() -> None:
    beats: dict[int, dict[str, Any]] = {r: {"phase": "forward", "step": 3, "node": "n", "pid": 1} for r in (0, 1)}
    symptom = {
        "kind": "error",
        "rank": 0,
        "type": "RuntimeError",
        "message": "Connection closed by peer",
        "final": False,
    }
    lost = diagnose([symptom], beats, RuntimeError("x"), lambda rank, beat, error: fate.OUT_OF_MEMORY)
    assert lost.kind == "memory"
    assert lost.reason == f"worker 1 was lost in forward of step 3 (killed: out of memory). {fate.LESS_MEMORY}"
    raised = {**symptom, "rank": 1, "phase": "backward", "step": 4, "type": "MemoryError", "traceback": "t"}
    own = diagnose([{**raised, "message": "Unable to allocate 9 GiB", "exit_code": 1}], beats, RuntimeError("x"))
    assert own.kind == "memory" and own.reason.startswith("worker 1, backward of step 4: MemoryError: Unable to")
    assert own.reason.endswith(fate.LESS_MEMORY)
