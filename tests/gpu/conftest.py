"""The devices of these tests: each runs on the CPU everywhere, and on CUDA where there is a GPU.

A test asks for `device`, and one that builds Megatron's models for `engine` too. On the CPU the latter needs the CPU
adaptation, which changes torch for the rest of a process: those tests run in one pytest of their own, and what is seen
here are their outcomes.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUTCOMES = "ELASTIC_TEST_OUTCOMES"
"""Variable that names where the process with the CPU adaptation writes its outcomes; it is set there alone."""
ADAPTED = OUTCOMES in os.environ
Outcomes = dict[str, tuple[str, str]]
"""Name of a test -> how it went, and what it said."""
FOUND = pytest.StashKey[Outcomes]()
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ("cpu", pytest.param("cuda", marks=(pytest.mark.gpu, NEEDS_CUDA)))

if ADAPTED:
    from megatron_elastic.cpu import adaptation

    adaptation.install_training()
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # Forked here; core would spawn it at the first save: seconds in which another process imports torch.
    filesystem_async.get_write_results_queue("fork")
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the test runs."""
    return torch.device(request.param)


@pytest.fixture(scope="module")
def engine(device: torch.device) -> Iterator[None]:
    """Megatron's groups of one rank on the device, and Megatron's random states."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(7)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


class FromAdaptedProcess(pytest.Item):
    """A test of `engine` on the CPU, as the process with the CPU adaptation reports it."""

    def runtest(self) -> None:
        """Fails or skips as it did there."""
        if FOUND not in self.config.stash:
            mine = [item.nodeid for item in self.session.items if isinstance(item, FromAdaptedProcess)]
            self.config.stash[FOUND] = run_adapted(mine)
        how, text = self.config.stash[FOUND][self.nodeid]
        if how == "skipped":
            pytest.skip(text)
        elif how != "passed":
            pytest.fail(text, pytrace=False)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Where the test is, and what it is called."""
        return self.path, None, self.name


def run_adapted(names: list[str]) -> Outcomes:
    """The outcomes of tests in one process with the CPU adaptation."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcomes.jsonl"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names],
            cwd=ROOT,
            env={**os.environ, OUTCOMES: str(out), "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )
        lines = out.read_text().splitlines() if out.exists() else []
    found: Outcomes = {}
    for name, how, text in map(json.loads, lines):
        if found.get(name, ("passed", ""))[0] == "passed":  # what is made for a test may fail after it has passed
            found[name] = how, text
    said = f"the process with the CPU adaptation did not run it, and said:\n{done.stdout[-6000:]}"
    return {name: found.get(name, ("failed", said)) for name in names}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes each outcome where the other process reads it."""
    if ADAPTED and (report.when == "call" or report.outcome != "passed"):
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        with open(os.environ[OUTCOMES], "a") as file:
            file.write(json.dumps([report.nodeid, report.outcome, text]) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts outcomes in the place of what needs the CPU adaptation."""
    for place, item in enumerate(items):
        if not isinstance(item, pytest.Function) or HERE not in item.path.parents or ADAPTED:
            continue
        if "engine" in item.fixturenames and item.callspec.params["device"] == "cpu":
            items[place] = FromAdaptedProcess.from_parent(item.parent, name=item.name)
