"""Packaging: `pip install .` gives the package and its console script `megatron-elastic`."""

import re
import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "megatron_elastic" / "__init__.py").read_text("utf-8")).group(1)
# Section -> name -> "name==version": docker/versions.txt, which also the container and launch/environment.sh install.
PINS = runpy.run_path(str(ROOT / "docker" / "pins.py"))["read"]()

# Only the engine is held to one release, because its internals are relied on; the rest is left to the environment. What
# its `training` extra asks for is asked for by name: an extra cannot be held by a constraints file.
# To get exactly the tested versions: pip install -c docker/versions.txt .
RUNTIME = [pin if name == "megatron-core" else name for name, pin in PINS["runtime"].items()]

# Kernels for NVIDIA GPUs; all are built against the torch that is installed already (--no-build-isolation).
# `transformer-engine` never without its CUDA core and its binding to torch: bare, it keeps megatron.core from being
# imported. Never `apex` by name: the registry's package of that name is another project; NVIDIA's comes with its
# containers, or is built from its source, and nothing here needs it.
GPU = [
    pin.replace("==", "[core_cu13,pytorch]==") if name == "transformer-engine" else pin
    for name, pin in PINS["gpu"].items()
]

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
    extras_require={"gpu": GPU, "dev": list(PINS["dev"].values())},
    entry_points={"console_scripts": ["megatron-elastic = megatron_elastic.cli.main:main"]},
)
