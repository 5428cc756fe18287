"""Reads docker/versions.txt: for setup.py, and for the Dockerfile, which runs it before anything is installed.

python docker/pins.py runtime|dev|gpu     the pins of a section, one a line
python docker/pins.py container           what the container installs of `runtime`
python docker/pins.py kernels             what the container builds of `gpu`
python docker/pins.py base                constraints: what the base image brings and nothing may replace
python docker/pins.py check               whether the pins of the container are what is installed; imports none of it
"""

import re
import sys
from importlib import metadata
from pathlib import Path

FILE = Path(__file__).resolve().parent / "versions.txt"
PIN = re.compile(r"(?:#: )?([a-z0-9-]+==[0-9][^\s#]*)")

# The base's compiled extensions are bound to each other and to its CUDA.
FROM_BASE = ("torch", "torchvision", "triton", "numpy", "transformer-engine", "flash-attn", "apex")


def read() -> dict[str, dict[str, str]]:
    """Section -> name -> `name==version`."""
    sections: dict[str, dict[str, str]] = {}
    found: dict[str, str] = {}
    for line in FILE.read_text("utf-8").splitlines():
        if header := re.match(r"# \[([a-z]+)\]", line):
            found = sections.setdefault(header.group(1), {})
        elif pin := PIN.fullmatch(line.strip()):
            found[pin.group(1).split("==")[0]] = pin.group(1)
    return sections


def installed(name: str) -> str | None:
    """Version of a distribution, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def lines(kind: str) -> list[str]:
    """What the command prints for one of its words, but `check`."""
    sections = read()
    if kind == "container":
        return [pin for name, pin in sections["runtime"].items() if name not in FROM_BASE]
    if kind == "kernels":
        return [pin for name, pin in sections["gpu"].items() if name not in FROM_BASE]
    if kind == "base":
        return [f"{name}=={version}" for name in FROM_BASE if (version := installed(name))]
    return list(sections[kind].values())


def check() -> list[str]:
    """Pins of the container that are not what is installed."""
    pins = [pin.split("==") for pin in (*lines("container"), *lines("kernels"))]
    return [
        f"{name}: {installed(name)} is installed, {version} is pinned"
        for name, version in pins
        if (installed(name) or "").split("+")[0] != version
    ]


if __name__ == "__main__":
    kind = sys.argv[1]
    told = check() if kind == "check" else lines(kind)
    print("\n".join(told))
    sys.exit(bool(told) if kind == "check" else 0)
