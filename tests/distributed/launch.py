"""Starts a script on several CPU ranks, for tests."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(script: str | Path, nproc: int, *args: object, timeout: float = 900) -> str:
    """Runs `script` under torchrun on `nproc` ranks without a GPU, and fails the test with the end of its output.

    Args:
        script: path, absolute or relative to this folder. It needs a `__main__` guard: saving starts processes.
        nproc: ranks on this machine.
        args: the script's own arguments.
        timeout: seconds.

    Returns:
        What the ranks wrote to stdout and stderr.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(nproc)]
    # Port 0: the launcher's own store takes a free one, and no other process can take it in between.
    command = [*launcher, "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += [str(Path(__file__).parent / script), *map(str, args)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException as error:
            # The ranks are the launcher's children: the whole process group goes, or they keep the pipe open.
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            pytest.fail(f"{script} on {nproc} ranks: not done in {timeout} s\n{output[-6000:]}", pytrace=False)
    if process.returncode:
        pytest.fail(f"{script} on {nproc} ranks: status {process.returncode}\n{output[-6000:]}", pytrace=False)
    return output
