"""Import's and export's memory: twice the largest parameter, whatever the model's size."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CONSTANT = 48 << 20
"""Bytes for what does not grow with the tensors: buffers, and blocks of up to 32 MiB that the C library keeps."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"this kernel does not start the peak of a process's memory anew: {error}")
    # Files in memory, where there is room: this is no test of the disk. They are not the process's own memory.
    fast = Path("/dev/shm")
    roomy = fast.is_dir() and shutil.disk_usage(fast).free > 4e9
    folder = fast if roomy else tmp_path_factory.mktemp("memory")
    command = [sys.executable, "-m", "tests.unit.hf.memory", "24576", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, int] = json.loads(done.stdout)
    assert found["largest"] > 90e6
    return found


@pytest.mark.parametrize("what", ["import", "export"])
def test_twice_the_largest_parameter_is_enough(measured: dict[str, int], what: str) -> None:
    assert measured[what] < 2 * measured["largest"] + CONSTANT


def test_the_whole_model_exceeds_the_bound(measured: dict[str, int]) -> None:
    assert measured["whole model"] > 2 * measured["largest"] + CONSTANT
