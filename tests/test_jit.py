"""Locks of torch's builds of native code, with torch's own baton: a dead one goes, a living one is named and stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import jit

BUILDER = (
    "import sys, time; from torch.utils.file_baton import FileBaton\n"
    "assert FileBaton(sys.argv[1]).try_acquire(); print('taken', flush=True); time.sleep(600)\n"
)


def test_a_killed_build_s_lock_is_removed_and_a_living_one_s_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "py311_cpu" / "some_op" / "lock"
    lock.parent.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", BUILDER, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "taken\n"
        assert jit.clear(tmp_path) == [f"process {process.pid} builds native code ({lock}): waiting for it"]
        assert lock.exists()
    finally:
        process.kill()
        process.communicate()
    assert lock.exists()  # what torch would wait for, for ever
    monkeypatch.setattr(jit, "INITIAL", "pid:[1]")  # as in a container, where not every process can be seen
    assert "no process here does" in jit.clear(tmp_path)[0] and lock.exists()
    monkeypatch.setattr(jit, "INITIAL", os.readlink("/proc/self/ns/pid"))
    assert jit.clear(tmp_path) == [f"removed {lock}, which a killed build of native code had left"]
    assert not lock.exists() and jit.clear(tmp_path) == []


def test_the_folder_is_torch_s_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils import cpp_extension

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert Path(cpp_extension.get_default_build_root()) == jit.extensions()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert jit.extensions() == tmp_path
