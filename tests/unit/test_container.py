"""The container's files: linted, in agreement with the pins, and an entry point that runs what it is asked to."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_elastic.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text("utf-8")


def shell_files() -> list[str]:
    """Every shell script that is not git's or an environment's: by its suffix, or by its first line."""
    folders = [ROOT / name for name in (".ci", "benchmarks", "docker", "launch", "recipes", "tests")]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    named = {".sh", ".sbatch"}
    return [
        str(path.relative_to(ROOT))
        for path in files
        if path.suffix in named or (not path.suffix and path.read_bytes().startswith(b"#!/usr/bin/env bash"))
    ]


def test_every_shell_script_passes_shellcheck() -> None:
    scripts = shell_files()
    for known in (".ci/run", "launch/bin/megatron-elastic", "launch/slurm/train.sbatch", "docker/entrypoint.sh"):
        assert known in scripts
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_passes_hadolint(tmp_path: Path) -> None:
    done = subprocess.run(["hadolint", str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN pip install torch\n")
    bad = subprocess.run(["hadolint", str(tmp_path / "Dockerfile")], capture_output=True, text=True, check=False)
    assert bad.returncode == 1


def pins(word: str) -> tuple[int, list[str]]:
    """What docker/pins.py prints, in this environment."""
    program = [sys.executable, str(DOCKER / "pins.py"), word]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout.split("\n")[:-1]


def test_the_container_installs_the_pins_of_its_sections_and_keeps_what_the_base_brings() -> None:
    words = re.findall(r"python docker/pins\.py (\w+)", DOCKERFILE)
    assert words == ["base", "container", "kernels", "check"]
    (_, container), (_, runtime) = pins("container"), pins("runtime")
    left_out = {pin.split("==")[0] for pin in set(runtime) - set(container)}
    assert left_out == {"torch", "numpy"}
    assert not set(container) & set(pins("dev")[1])
    assert [pin.split("==")[0] for pin in pins("kernels")[1]] == ["causal-conv1d", "mamba-ssm"]
    # Constraints: what is installed here, whatever is pinned; pip reads them after the base's own are unset.
    base = {pin.split("==")[0] for pin in pins("base")[1]}
    assert {"torch", "numpy", "triton"} <= base
    assert DOCKERFILE.index("pins.py base") < DOCKERFILE.index("ENV PIP_CONSTRAINT=") < DOCKERFILE.index("pip install")


def test_the_check_tells_what_is_not_as_pinned() -> None:
    """Here: nothing of the runtime section, and the kernels, which have no place in this environment."""
    status, told = pins("check")
    assert status == 1
    assert [line.split(":")[0] for line in told] == ["causal-conv1d", "mamba-ssm"]


def test_what_the_dockerfile_copies_is_there_and_not_ignored() -> None:
    sent = [line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text("utf-8").split() if line[0] == "!"]
    copied = [word for line in re.findall(r"^COPY (.+)$", DOCKERFILE, flags=re.MULTILINE) for word in line.split()[:-1]]
    assert len(copied) > 6
    for path in copied:
        assert (ROOT / path).exists(), path
        assert path.split("/")[0] in sent, path
    # The folders that the scripts and SLURM's jobs expect.
    assert "WORKDIR /opt/megatron-elastic\n" in DOCKERFILE
    assert "COPY launch launch\n" in DOCKERFILE
    assert 'ENTRYPOINT ["bash", "/opt/megatron-elastic/docker/entrypoint.sh"]' in DOCKERFILE


def test_no_install_names_what_must_not_be_installed() -> None:
    installs = [line for line in DOCKERFILE.splitlines() if "pip install" in line]
    assert len(installs) == 3
    assert not any(re.search(r"apex|transformer|torch", line) for line in installs)
    assert all("--no-cache-dir" in line for line in installs)
    assert sum("--no-build-isolation" in line for line in installs) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "program --help"),
        (["--version"], "program --version"),
        (["train", "my recipe.yaml"], "program train my recipe.yaml"),
        (["sort", "r.yaml"], "program sort r.yaml"),
        (["torchrun.sh", "--nnodes", "2"], "bash /opt/megatron-elastic/launch/torchrun.sh --nnodes 2"),
        (["printf", "%s", "a b"], "a b"),
    ],
)
def test_the_entry_point_runs_what_it_is_asked_to(tmp_path: Path, words: list[str], said: str) -> None:
    for name, text in {"megatron-elastic": "program", "bash": "bash"}.items():
        (tmp_path / name).write_text(f'#!/bin/sh\necho {text} "$@"\n')
        (tmp_path / name).chmod(0o755)
    command = ["/bin/bash", str(DOCKER / "entrypoint.sh"), *words]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, said), done.stderr


def test_the_entry_point_knows_every_command_and_refuses_what_it_does_not() -> None:
    text = (DOCKER / "entrypoint.sh").read_text("utf-8")
    (listed,) = re.findall(r"^  (plan \|.*) \| -\*\)$", text, flags=re.MULTILINE)
    assert set(listed.split(" | ")) == set(COMMANDS)
    command = ["bash", str(DOCKER / "entrypoint.sh"), "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 127
    assert "'nonsense' is neither a command" in done.stderr
