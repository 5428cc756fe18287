"""Peaks of memory, measured in a process of their own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def peaks(module: str, size: int, temporary: pytest.TempPathFactory) -> dict[str, int]:
    """What a module prints of itself, bytes by name.

    Args:
        module: run with a size and a folder to work in.
        size: its first argument.
        temporary: for the folder, where there is no room for files in memory.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"this kernel does not start the peak of a process's memory anew: {error}")
    # Files in memory, where there is room: this is no test of the disk. They are not the process's own memory.
    fast = Path("/dev/shm")
    roomy = fast.is_dir() and shutil.disk_usage(fast).free > 4e9
    folder = fast if roomy else temporary.mktemp("memory")
    command = [sys.executable, "-m", module, str(size), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, int] = json.loads(done.stdout)
    return found
