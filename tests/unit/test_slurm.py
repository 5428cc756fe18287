"""SLURM's job scripts, against stubs of SLURM's commands that write down what they are asked for."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "launch" / "slurm"
STUBS = {
    # Runs its command as the one task of node $TASK, or does what $STEP says.
    "srun": """
printf '%s\\n' "srun $*" >>"$LOG"
echo $$ >"$HOME/step.pid"
if [[ -n ${STEP:-} ]]; then eval "$STEP"; exit; fi
while [[ $1 == --* ]]; do shift; done
export SLURM_NODEID="${TASK:-0}"
exec "$@"
""",
    "scontrol": """
case "$1 $2" in
  "show hostnames") printf '%s\\n' gpu07 gpu08 ;;
  "show job") printf '   JobId=%s\\n   Command=%s train recipe.yaml\\n   WorkDir=/x\\n' "$3" "$ORIGINAL" ;;
  requeue*) printf '%s\\n' "scontrol $*" >>"$LOG"; exit "${REQUEUE:-0}" ;;
  *) exit 9 ;;
esac
""",
    "scancel": 'printf "%s\\n" "scancel $*" >>"$LOG"; kill -TERM "$(cat "$HOME/step.pid")"\n',
    "sbatch": 'printf "%s\\n" "sbatch $*" >>"$LOG"; echo "$((100 + $(grep -c ^sbatch "$LOG")));cluster"\n',
    # What torchrun.sh and budgets.sbatch start in the end.
    "python": """
case "$*" in
  *find_spec*) exit 0 ;;
  *) printf '%s\\n' "python $*" >>"$LOG" ;;
esac
""",
    "megatron-elastic": 'printf "%s\\n" "program $*" >>"$LOG"; echo "{}"\n',
}
JOB = {
    "SLURM_JOB_ID": "70012",
    "SLURM_JOB_NAME": "elastic",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_GPUS_ON_NODE": "8",
}


class Cluster:
    """Stubs on PATH, a working folder with a recipe, and a log of what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.work, self.log = folder / "work", folder / "log"
        self.work.mkdir()
        (self.work / "recipe.yaml").write_text("")
        stubs = folder / "bin"
        stubs.mkdir()
        for name, text in STUBS.items():
            (stubs / name).write_text("#!/usr/bin/env bash\n" + text)
            (stubs / name).chmod(0o755)
        kept = {name: os.environ[name] for name in ("LANG", "LC_ALL") if name in os.environ}
        path = f"{stubs}:/usr/local/bin:/usr/bin:/bin"
        original = str(SCRIPTS / "train.sbatch")
        self.variables = {**kept, "PATH": path, "HOME": str(folder), "LOG": str(self.log), "ORIGINAL": original}

    def start(self, script: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(script), *words],
            cwd=self.work,
            env=self.variables | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.ended(self.start(SCRIPTS / script, *words, **variables))

    def ended(self, process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def calls(self, program: str = "") -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if line.startswith(program)]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


TRAIN = ("train", "recipe.yaml")


def test_a_job_starts_torchrun_once_a_node(cluster: Cluster) -> None:
    done = cluster.run("train.sbatch", *TRAIN, **JOB, TASK="1")
    assert done.returncode == 0, done.stderr
    (step,) = cluster.calls("srun")
    options = step.split(" bash ")[0].split()[1:]
    wanted = ["--ntasks-per-node=1", "--cpu-bind=none", "--mpi=none", "--kill-on-bad-exit=0", "--wait=0"]
    assert options == wanted
    (started,) = cluster.calls("python")
    assert started == (
        "python -m megatron_elastic _node --nodes 2 --node-rank 1 --ranks 16 --master-port 15012 train recipe.yaml -- "
        "python -m torch.distributed.run --nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr gpu07 "
        "--max-restarts 0 --rdzv-conf timeout=600"
    )
    assert cluster.calls("scontrol") == []


def test_the_container_has_the_same_folder_and_its_own_scripts(cluster: Cluster) -> None:
    image = {"CONTAINER_IMAGE": "/images/elastic.sqsh", "CONTAINER_MOUNTS": "/data:/data"}
    done = cluster.run("train.sbatch", *TRAIN, **JOB, **image, STEP="exit 0")
    assert done.returncode == 0, done.stderr
    (step,) = cluster.calls("srun")
    here = cluster.work
    for option in (
        "--container-image=/images/elastic.sqsh",
        f"--container-mounts={here}:{here},/data:/data",
        f"--container-workdir={here}",
        "--no-container-mount-home",
    ):
        assert f" {option} " in step
    assert step.endswith(" bash /opt/megatron-elastic/launch/torchrun.sh --master-addr gpu07 train recipe.yaml")


def test_sbatchs_copy_of_the_script_finds_the_clone(cluster: Cluster, tmp_path: Path) -> None:
    copy = tmp_path / "slurm_script"
    copy.write_text((SCRIPTS / "train.sbatch").read_text())
    done = cluster.ended(cluster.start(copy, *TRAIN, **JOB))
    assert done.returncode == 0, done.stderr
    assert f" bash {ROOT}/launch/torchrun.sh --master-addr gpu07 " in cluster.calls("srun")[0]


@pytest.mark.parametrize(
    ("status", "variables", "ended", "requeued"),
    [
        (0, {}, 0, False),
        (1, {}, 1, False),  # a fault, and a stop that saved nothing
        (2, {}, 2, False),
        (137, {}, 137, False),  # killed: out of memory
        (130, {}, 130, True),
        (130, {"SLURM_RESTART_COUNT": "19"}, 130, True),
        (130, {"SLURM_RESTART_COUNT": "20"}, 130, False),
        (130, {"SLURM_RESTART_COUNT": "2", "MAX_RESTARTS": "2"}, 130, False),
        (130, {"CHAINED": "1"}, 0, False),  # the next job of the chain goes on
        (1, {"CHAINED": "1"}, 1, False),
    ],
)
def test_only_a_stop_with_a_checkpoint_is_queued_again_and_not_for_ever(
    cluster: Cluster, status: int, variables: dict[str, str], ended: int, requeued: bool
) -> None:
    done = cluster.run("train.sbatch", *TRAIN, **JOB, **variables, STEP=f"exit {status}")
    assert done.returncode == ended, done.stderr
    assert cluster.calls("scontrol") == (["scontrol requeue 70012"] if requeued else [])


def test_a_requeue_that_is_not_allowed_says_what_to_do(cluster: Cluster) -> None:
    done = cluster.run("train.sbatch", *TRAIN, **JOB, STEP="exit 130", REQUEUE="1")
    assert done.returncode == 130
    assert "submit the job again" in done.stderr


@pytest.mark.parametrize("status", [130, 1])
def test_the_warning_becomes_sigterm_for_the_tasks_and_the_job_waits_for_them(cluster: Cluster, status: int) -> None:
    """A second warning while it saves changes nothing."""
    step = f'trap \'touch "$HOME/saving"; sleep 0.5; exit {status}\' TERM; touch "$HOME/started"; '
    step += "while :; do sleep 0.05; done"
    process = cluster.start(SCRIPTS / "train.sbatch", *TRAIN, **JOB, STEP=step)
    home = Path(cluster.variables["HOME"])
    for mark in ("started", "saving"):
        deadline = time.monotonic() + 120
        while not (home / mark).exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
    done = cluster.ended(process)
    assert done.returncode == status, done.stderr
    assert cluster.calls("scancel")[0] == "scancel --signal=TERM 70012.0"
    assert cluster.calls("scontrol") == (["scontrol requeue 70012"] if status == 130 else [])


def test_a_dry_run_prints_the_commands_and_runs_none(cluster: Cluster) -> None:
    done = cluster.run("train.sbatch", "--dry-run", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cluster.calls() == []
    lines = done.stdout.splitlines()
    exported = [line for line in lines if line.startswith("export ")]
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540" in exported
    step = next(line for line in lines if line.startswith("srun "))
    assert step.endswith(f"bash {ROOT}/launch/torchrun.sh --master-addr FIRST_NODE train recipe.yaml")
    assert lines[-1] == (
        "python -m torch.distributed.run --nnodes 1 --node-rank 0 --nproc-per-node 8 --master-addr FIRST_NODE "
        "--max-restarts 0 --rdzv-conf timeout=600 --master-port 29500 -m megatron_elastic train recipe.yaml"
    )
    # In a job: the same command that the job runs.
    shown = cluster.run("train.sbatch", "--dry-run", *TRAIN, **JOB).stdout.splitlines()
    cluster.run("train.sbatch", *TRAIN, **JOB)
    assert [line for line in shown if line.startswith("srun ")] == cluster.calls("srun")


def test_the_settings_of_the_environment_win(cluster: Cluster) -> None:
    given = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60", "NCCL_DEBUG": "INFO"}
    shown = cluster.run("train.sbatch", "--dry-run", *TRAIN, **given).stdout
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=60\nexport NCCL_DEBUG=INFO\n" in shown


def test_the_ranks_time_fits_between_the_signal_and_the_end() -> None:
    (seconds,) = [
        int(line.rpartition("@")[2])
        for line in (SCRIPTS / "train.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH --signal=B:USR1@")
    ]
    setting = (SCRIPTS / "job.sh").read_text().split("TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-")[1].split("}")[0]
    assert 30 < int(setting) < seconds - 30


def test_torchrun_reads_the_variable() -> None:
    import torch

    source = Path(torch.__file__).parent / "distributed" / "launcher" / "api.py"
    assert 'os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT"' in source.read_text()


BUDGETS = ("family", "corpus/validation", "budgets", "p100", "p50")


def test_a_task_of_the_array_makes_its_budget_once(cluster: Cluster) -> None:
    image = {"CONTAINER_IMAGE": "elastic"}
    (cluster.work / "budgets").mkdir()
    done = cluster.run("budgets.sbatch", *BUDGETS, **JOB, **image, SLURM_ARRAY_TASK_ID="1")
    assert done.returncode == 0, done.stderr
    made = [
        "program extract --checkpoint family --budget p50 --out budgets/p50",
        "program evaluate --checkpoint budgets/p50 --data corpus/validation --json",
    ]
    assert cluster.calls("program") == made
    assert (cluster.work / "budgets" / "p50.json").read_text() == "{}\n"
    # Started again after the extraction: only what is missing.
    (cluster.work / "budgets" / "p50").mkdir()
    cluster.run("budgets.sbatch", *BUDGETS, **JOB, **image, SLURM_ARRAY_TASK_ID="1")
    assert cluster.calls("program") == made
    (cluster.work / "budgets" / "p50.json").unlink()
    cluster.run("budgets.sbatch", *BUDGETS, **JOB, **image, SLURM_ARRAY_TASK_ID="1")
    assert cluster.calls("program") == [*made, made[1]]


def test_without_an_array_all_budgets_are_made(cluster: Cluster) -> None:
    shown = cluster.run("budgets.sbatch", "--dry-run", *BUDGETS).stdout.splitlines()
    assert len(shown) == 4
    assert shown[1].endswith("--data corpus/validation --json > budgets/p100.json")
    assert f"{ROOT}/launch/bin/megatron-elastic extract" in shown[2]
    beyond = cluster.run("budgets.sbatch", *BUDGETS, **JOB, SLURM_ARRAY_TASK_ID="2")
    assert beyond.returncode == 2
    assert "--array=0-1" in beyond.stderr
    assert cluster.run("budgets.sbatch", *BUDGETS[:3]).returncode == 2
    assert cluster.calls() == []


def test_submit_is_one_job_that_queues_itself_again(cluster: Cluster) -> None:
    done = cluster.run("submit.sh", "--nodes=8", "--time=4:00:00", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "101\n"
    assert cluster.calls() == [
        f"sbatch --parsable --nodes=8 --time=4:00:00 {SCRIPTS / 'train.sbatch'} train recipe.yaml"
    ]


def test_submit_chains_jobs_and_then_the_budgets(cluster: Cluster) -> None:
    words = ["--jobs", "2", "--family=family", "--budgets", "p100,p50", "--data", "corpus/validation", "--nodes=8"]
    done = cluster.run("submit.sh", *words, "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "101\n102\n103\n"
    train = f"--nodes=8 --export=ALL,CHAINED=1 {SCRIPTS / 'train.sbatch'} train recipe.yaml"
    after = "--dependency=afterok:{} --kill-on-invalid-dep=yes"
    wanted = [
        f"sbatch --parsable {train}",
        f"sbatch --parsable {after.format(101)} {train}",
        f"sbatch --parsable {after.format(102)} --array=0-1 {SCRIPTS / 'budgets.sbatch'} family corpus/validation "
        "budgets p100 p50",
    ]
    assert cluster.calls() == wanted
    shown = cluster.run("submit.sh", "--dry-run", *words, "--", *TRAIN)
    assert [shlex.split(line) for line in shown.stdout.splitlines()] == [
        shlex.split(line.replace(":101 ", ":JOB1 ").replace(":102 ", ":JOB2 ")) for line in wanted
    ]
    assert cluster.calls() == wanted


@pytest.mark.parametrize(
    ("words", "faults"),
    [
        ([], ["COMMAND after --"]),
        (["--jobs", "0", "--", *TRAIN], ["--jobs is '0'"]),
        (["--nodes", "8", "--", *TRAIN], ["'8' stands before --"]),
        (["--", "train"], ["found: train"]),
        (["--", "rank", "recipe.yaml"], ["COMMAND after -- is 'rank'"]),
        (["--budgets", "--family=f", "--", *TRAIN], ["--budgets needs", "belong together"]),
    ],
)
def test_submit_refuses_with_every_fault(cluster: Cluster, words: list[str], faults: list[str]) -> None:
    done = cluster.run("submit.sh", *words)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("  - ")]
    assert len(lines) == len(faults), done.stderr
    assert all(fault in line for fault, line in zip(faults, lines, strict=True))
    assert cluster.calls() == []
