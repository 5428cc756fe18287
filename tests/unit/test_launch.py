"""The set-up scripts, run against interpreters that only write down what they are asked for."""

import os
import re
import shlex
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
  "-m torch.distributed.run"*) echo "ran ${*:2}" ;;
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


# launch/torchrun.sh: what it makes of options and of SLURM's variables; `python` and `scontrol` are stubs.

SLURM = {
    "SLURM_JOB_ID": "70012",
    "SLURM_NNODES": "4",
    "SLURM_NODEID": "2",
    "SLURM_JOB_NODELIST": "gpu[07-10]",
    "SLURM_GPUS_ON_NODE": "8",
}
SCONTROL = """#!/usr/bin/env bash
[[ "$1 $2" == "show hostnames" && $3 == "gpu[07-10]" ]] || exit 1
printf '%s\\n' gpu07 gpu08 gpu09 gpu10
"""


def torchrun(machine: Machine, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    machine.interpreter("python3.12", "3.12")
    (machine.home / "recipe.yaml").write_text("")
    program = machine.bin / "scontrol"
    program.write_text(SCONTROL)
    program.chmod(0o755)
    words = [str(machine.clone / "launch" / "torchrun.sh"), *arguments]
    return machine.run("-c", 'cd "$HOME" && exec "$@"', "-", str(machine.bin / "bash"), *words, **variables)


def chosen(run: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Option -> value of the command that a dry run prints, with what follows torchrun's options under `rest`."""
    assert run.returncode == 0, run.stderr
    words = shlex.split(run.stdout)
    assert words[:3] == ["python", "-m", "torch.distributed.run"]
    split = words.index("-m", 3)
    options = words[3:split]
    return {**dict(zip(options[::2], options[1::2], strict=True)), "rest": " ".join(words[split:])}


def test_one_node_needs_no_option_but_the_ranks(machine: Machine) -> None:
    found = chosen(torchrun(machine, "--nproc-per-node", "2", "--dry-run", "train", "recipe.yaml"))
    assert found == {
        "--nnodes": "1",
        "--node-rank": "0",
        "--nproc-per-node": "2",
        "--master-addr": "127.0.0.1",
        "--master-port": "29500",
        "--max-restarts": "0",
        "--rdzv-conf": "timeout=600",
        "rest": "-m megatron_elastic train recipe.yaml",
    }


def test_several_nodes_by_options(machine: Machine) -> None:
    options = ["--nnodes=2", "--node-rank", "1", "--nproc-per-node=4", "--master-addr", "10.0.0.7", "--master-port=999"]
    found = chosen(torchrun(machine, *options, "--wait", "30", "pretrain", "recipe.yaml", "--dry-run"))
    wanted = {"--nnodes": "2", "--node-rank": "1", "--nproc-per-node": "4", "--master-addr": "10.0.0.7"}
    wanted |= {"--master-port": "999", "--rdzv-conf": "timeout=30", "rest": "-m megatron_elastic pretrain recipe.yaml"}
    assert wanted.items() <= found.items()


def test_slurms_variables_say_everything_and_options_win(machine: Machine) -> None:
    found = chosen(torchrun(machine, "--dry-run", "train", "recipe.yaml", **SLURM))
    wanted = {"--nnodes": "4", "--node-rank": "2", "--nproc-per-node": "8", "--master-addr": "gpu07"}
    assert {**wanted, "--master-port": str(15000 + 12)}.items() <= found.items()
    step = {"SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NODELIST": "gpu[07-10]", "SLURM_STEP_TASKS_PER_NODE": "1(x3)"}
    assert chosen(torchrun(machine, "--dry-run", "train", "recipe.yaml", **SLURM, **step))["--nnodes"] == "3"
    options = ["--node-rank", "3", "--master-addr", "login", "--nproc-per-node", "1", "--master-port", "77"]
    found = chosen(torchrun(machine, *options, "--dry-run", "train", "recipe.yaml", **SLURM))
    wanted = {"--nnodes": "4", "--node-rank": "3", "--nproc-per-node": "1", "--master-addr": "login"}
    assert {**wanted, "--master-port": "77"}.items() <= found.items()


def test_the_nodes_part_is_started_with_torchruns_command(machine: Machine) -> None:
    run = torchrun(machine, "train", "recipe.yaml", **SLURM)
    assert run.returncode == 0, run.stderr
    assert run.stdout == (
        "ran _node --nodes 4 --node-rank 2 --ranks 32 --master-port 15012 train recipe.yaml -- python -m "
        "torch.distributed.run --nnodes 4 --node-rank 2 --nproc-per-node 8 --master-addr gpu07 --max-restarts 0 "
        "--rdzv-conf timeout=600\n"
    )


def test_ranking_is_one_start_of_torchrun_with_its_own_options(machine: Machine) -> None:
    own = ["rank", "recipe.yaml", "--checkpoint", "parent", "--out", "scores.pt"]
    run = torchrun(machine, *own, "--depth", "none", **SLURM)
    assert run.returncode == 0, run.stderr
    assert run.stdout == (
        "ran torch.distributed.run --nnodes 4 --node-rank 2 --nproc-per-node 8 --master-addr gpu07 --max-restarts 0 "
        f"--rdzv-conf timeout=600 --master-port 15012 -m megatron_elastic {' '.join(own)} --depth none\n"
    )
    assert chosen(torchrun(machine, "--dry-run", *own, **SLURM))["rest"] == f"-m megatron_elastic {' '.join(own)}"


@pytest.mark.parametrize(
    ("arguments", "variables", "faults"),
    [
        (["rank"], {}, ["RECIPE are what is given"]),
        (["rank", "--checkpoint", "parent"], {}, ["RECIPE is '--checkpoint'"]),
        (["--nnodes", "2", "train", "recipe.yaml"], {}, ["--master-addr is missing"]),
        (["--nnodes", "2", "--node-rank", "2", "--master-addr", "a", "train", "recipe.yaml"], {}, ["0 to 1"]),
        (["--nnodes", "1", "train", "recipe.yaml"], SLURM, ["--node-rank is '2'"]),
        (["train", "recipe.yaml"], {**SLURM, "SLURM_JOB_NODELIST": "x[1"}, ["scontrol show hostnames x[1"]),
        (["train", "recipe.yaml"], {**SLURM, "SLURM_LOCALID": "1"}, ["--ntasks-per-node=1"]),
        (["train", "recipe.yaml"], {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8(x4)"}, ["--ntasks-per-node=1"]),
        ([], {}, ["COMMAND is missing", "found: nothing"]),
        (["train", "none.yaml"], {}, ["RECIPE is 'none.yaml'"]),
        (["extract", "recipe.yaml"], {}, ["COMMAND is 'extract'"]),
        (
            ["--speed", "--nnodes", "two", "--nproc-per-node", "0", "--wait", "--master-port", "70000", "train"],
            {},
            [
                "option '--speed'",
                "--nnodes is 'two'",
                "--nproc-per-node is '0'",
                "--wait needs",
                "1 to 65535",
                "RECIPE",
            ],
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_every_fault(
    machine: Machine, arguments: list[str], variables: dict[str, str], faults: list[str]
) -> None:
    run = torchrun(machine, *arguments, **variables)
    assert run.returncode == 2, run.stdout
    assert run.stdout == ""
    lines = [line for line in run.stderr.splitlines() if line.startswith("  - ")]
    assert all(any(fault in line for line in lines) for fault in faults), run.stderr
    assert f"torchrun.sh: {len(lines)} fault(s)" in run.stderr
    assert len(lines) == len(faults), run.stderr
    assert machine.calls() == []


def test_help_of_torchrun_tells_every_option(machine: Machine) -> None:
    run = torchrun(machine, "--help")
    assert run.returncode == 0
    named = {"--nnodes", "--node-rank", "--nproc-per-node", "--master-addr", "--master-port", "--wait", "--dry-run"}
    assert all(option in run.stdout for option in named)
