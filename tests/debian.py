"""Programs that tests need and Python's packages do not have, installed from Debian's where they are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence


def require(programs: Sequence[str], packages: Sequence[str]) -> None:
    """Install `packages` unless all `programs` are on the path. Needs root."""
    if all(map(shutil.which, programs)):
        return
    apt = ["apt-get", "-o", "DPkg::Lock::Timeout=300"]
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run([*apt, "update"], env=quiet, capture_output=True, timeout=300)
    install = [*apt, "install", "--yes", "--no-install-recommends", *packages]
    done = subprocess.run(install, env=quiet, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
