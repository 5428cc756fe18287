"""The set-up scripts, run against interpreters that only write down what they are asked for."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = (
    "bash cat cp cut dirname env flock ln mkdir mv readlink rm sed sha256sum sleep sort"  # no interpreter among them
)
# VERSION and ABLE are replaced; $LOG collects the calls; $PIP is what an install does.
INTERPRETER = """#!/usr/bin/env bash
case "$*" in
  *ensurepip*) echo "VERSION ABLE" ;;
  *base_prefix*) echo "VERSION.1 (build) $0" ;;
  "-I -m venv "*)
    echo "venv VERSION" >>"$LOG"
    mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  *"pip install"*)
    echo "pip $*" >>"$LOG"
    eval "${PIP:-}" ;;
  "-m megatron_elastic"*) echo "ran ${*:3}" ;;
  *) exit 1 ;;
esac
"""
SHIM = "#!/usr/bin/env bash\necho 'pyenv: command not found' >&2\nexit 127\n"


class Machine:
    """A clone of the scripts, a home, and a PATH that holds the named interpreters and no other."""

    def __init__(self, folder: Path) -> None:
        self.clone, self.home, self.bin = folder / "clone", folder / "home", folder / "bin"
        self.log = folder / "log"
        for made in (self.home, self.bin):
            made.mkdir()
        self.add_clone(self.clone)
        for tool in TOOLS.split():
            found = shutil.which(tool)
            assert found, tool
            (self.bin / tool).symlink_to(found)

    def add_clone(self, clone: Path) -> Path:
        shutil.copytree(ROOT / "launch", clone / "launch")
        (clone / "docker").mkdir()
        shutil.copy(ROOT / "docker" / "versions.txt", clone / "docker")
        return clone

    def interpreter(self, name: str, version: str, able: int = 1, folder: Path | None = None) -> Path:
        path = (folder or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(INTERPRETER.replace("VERSION", version).replace("ABLE", str(able)))
        path.chmod(0o755)
        return path

    def command(self, *command: str, **environment: str) -> tuple[list[str], dict[str, str]]:
        base = {"HOME": str(self.home), "PATH": str(self.bin), "LOG": str(self.log)}
        return [str(self.bin / "bash"), *command], base | environment

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        arguments, variables = self.command(*command, **environment)
        return subprocess.run(arguments, env=variables, capture_output=True, text=True, timeout=300)

    def quickstart(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(self.clone / "launch" / "quickstart.sh"), *arguments, **environment)

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def venv_of(self) -> str:
        return next(call.split()[1] for call in self.calls() if call.startswith("venv"))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_first_run_installs_and_second_does_not(machine: Machine) -> None:
    machine.interpreter("python3.12", "3.12")
    first = machine.quickstart("--out", "here", "--ranks", "3")
    assert (first.returncode, first.stdout) == (0, "ran quickstart --out here --ranks 3\n"), first.stderr
    assert [call.split()[0] for call in machine.calls()] == ["venv", "pip"]
    assert "-r " + str(machine.clone / "docker" / "versions.txt") in machine.calls()[1]
    assert (machine.clone / ".venv").is_symlink()
    second = machine.quickstart()
    assert (second.returncode, second.stdout, second.stderr) == (0, "ran quickstart --out quickstart\n", "")
    assert len(machine.calls()) == 2


def test_the_console_script_runs_without_an_install_of_the_package(machine: Machine, tmp_path: Path) -> None:
    machine.interpreter("python3.12", "3.12")
    script = str(machine.clone / "launch" / "bin" / "megatron-elastic")
    assert machine.run(script, "plan", "--json").stdout == "ran plan --json\n"
    shown = machine.run(
        "-c", f"source {machine.clone}/launch/environment.sh; type -P megatron-elastic; echo $PYTHONPATH"
    )
    assert shown.stdout.splitlines() == [script, str(machine.clone)]


def test_clones_share_an_environment_and_other_pins_do_not(machine: Machine, tmp_path: Path) -> None:
    machine.interpreter("python3.12", "3.12")
    machine.quickstart()
    other = machine.add_clone(tmp_path / "other")
    assert machine.run(str(other / "launch" / "quickstart.sh")).returncode == 0
    assert len(machine.calls()) == 2
    assert (other / ".venv").resolve() == (machine.clone / ".venv").resolve()
    versions = other / "docker" / "versions.txt"
    versions.write_text(versions.read_text() + "\n# only a comment\n")
    machine.run(str(other / "launch" / "quickstart.sh"))
    assert len(machine.calls()) == 2
    versions.write_text(re.sub(r"tqdm==.*", "tqdm==1.0", versions.read_text()))
    machine.run(str(other / "launch" / "quickstart.sh"))
    assert len(machine.calls()) == 4
    assert (other / ".venv").resolve() != (machine.clone / ".venv").resolve()


def test_an_interrupted_install_is_started_over(machine: Machine) -> None:
    machine.interpreter("python3.12", "3.12")
    broken = machine.quickstart(PIP="exit 1")
    assert broken.returncode == 1
    assert "install failed" in broken.stderr
    assert not (machine.clone / ".venv").exists()
    killed = machine.quickstart(PIP="kill -9 $PPID; sleep 1")
    assert killed.returncode != 0
    assert "ran" not in killed.stdout
    assert machine.quickstart().returncode == 0
    assert [call.split()[0] for call in machine.calls()] == ["venv", "pip"] * 3


def test_two_first_runs_install_once(machine: Machine) -> None:
    machine.interpreter("python3.12", "3.12")
    arguments, variables = machine.command(str(machine.clone / "launch" / "quickstart.sh"), PIP="sleep 1")
    runs = [subprocess.Popen(arguments, env=variables, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [run.communicate(timeout=300)[0] for run in runs] == ["ran quickstart --out quickstart\n"] * 2
    assert len(machine.calls()) == 2


@pytest.mark.parametrize(
    ("interpreters", "chosen"),
    [
        ({"python3.12": "3.12", "python3.13": "3.13", "python3": "3.13"}, "3.12"),
        ({"python3.13": "3.13", "python3": "3.12"}, "3.12"),
        ({"python3.14": "3.14", "python3": "3.11"}, "3.14"),
        ({"python3": "3.10", "python": "3.12"}, "3.12"),
    ],
)
def test_python_3_12_is_preferred_and_older_ones_are_passed_over(
    machine: Machine, interpreters: dict[str, str], chosen: str
) -> None:
    for name, version in interpreters.items():
        machine.interpreter(name, version)
    assert machine.quickstart().returncode == 0
    assert machine.venv_of() == chosen


def test_a_shim_that_does_not_run_is_passed_over_for_pyenv_itself(machine: Machine) -> None:
    for name in ("python3.12", "python3", "python"):
        (machine.bin / name).write_text(SHIM)
        (machine.bin / name).chmod(0o755)
    assert machine.quickstart().returncode == 1
    machine.interpreter("python", "3.12", folder=machine.home / ".pyenv" / "versions" / "3.12.1" / "bin")
    assert machine.quickstart().returncode == 0
    assert machine.venv_of() == "3.12"


def test_a_shim_does_not_hide_an_interpreter_further_down_the_path(machine: Machine, tmp_path: Path) -> None:
    machine.interpreter("python3.12", "3.12")
    shims = tmp_path / "shims"
    shims.mkdir()
    (shims / "python3.12").write_text(SHIM)
    (shims / "python3.12").chmod(0o755)
    assert machine.quickstart(PATH=f"{shims}:{machine.bin}").returncode == 0
    assert machine.venv_of() == "3.12"


def test_uv_is_the_last_resort(machine: Machine, tmp_path: Path) -> None:
    managed = machine.interpreter("python3.12", "3.12", folder=tmp_path / "managed")
    uv = machine.bin / "uv"
    # Finds nothing until it has installed something.
    uv.write_text(
        f'#!/usr/bin/env bash\necho "uv $1 $2" >>"$LOG"\n[[ $2 == install ]] && cp "{managed}" "{managed}.installed"\n'
        f'[[ $2 == find && -e "{managed}.installed" ]] && echo "{managed}.installed"\n[[ -e "{managed}.installed" ]]\n'
    )
    uv.chmod(0o755)
    run = machine.quickstart()
    assert run.returncode == 0, run.stderr
    assert "uv python" in machine.calls()[0]
    assert machine.venv_of() == "3.12"


def test_no_python_is_one_clear_message(machine: Machine) -> None:
    machine.interpreter("python3", "3.11")
    run = machine.quickstart()
    assert run.returncode == 1
    assert run.stdout == ""
    assert "no Python 3.12 or newer" in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_a_python_without_venv_names_the_package(machine: Machine) -> None:
    machine.interpreter("python3.12", "3.12", able=0)
    run = machine.quickstart()
    assert run.returncode == 1
    assert "apt install python3.12-venv" in run.stderr
    machine.interpreter("python3", "3.13")
    assert machine.quickstart().returncode == 0
    assert machine.venv_of() == "3.13"


def test_a_cache_that_cannot_be_written_is_named(machine: Machine, tmp_path: Path) -> None:
    machine.interpreter("python3.12", "3.12")
    (tmp_path / "file").write_text("")
    run = machine.quickstart(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert run.returncode == 1
    assert "Set XDG_CACHE_HOME" in run.stderr


def test_a_folder_of_the_users_own_is_left_alone(machine: Machine) -> None:
    machine.interpreter("python3.12", "3.12")
    (machine.clone / ".venv").mkdir()
    (machine.clone / ".venv" / "mine").write_text("")
    assert machine.quickstart().stdout == "ran quickstart --out quickstart\n"
    assert os.listdir(machine.clone / ".venv") == ["mine"]


@pytest.mark.parametrize(
    "arguments", [["--speed"], ["--ranks", "0"], ["--ranks", "two"], ["--ranks"], ["--out"], ["extra"], ["--out="]]
)
def test_bad_usage_is_exit_2_before_anything_is_installed(machine: Machine, arguments: list[str]) -> None:
    machine.interpreter("python3.12", "3.12")
    run = machine.quickstart(*arguments)
    assert run.returncode == 2
    assert "usage:" in run.stderr
    assert machine.calls() == []


def test_help_is_complete(machine: Machine) -> None:
    run = machine.quickstart("--help")
    assert run.returncode == 0
    assert all(flag in run.stdout for flag in ("--out", "--ranks", "--help"))
