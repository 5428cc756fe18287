"""`launch/torchrun.sh` between two hosts, which are network namespaces of this test's: one is cut off, both resume."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from megatron_elastic.checkpoint import find_checkpoint, read_metadata, read_tensor, tensor_names
from tests.end_to_end import small_run

SCRIPT = small_run.ROOT / "launch" / "torchrun.sh"
TIMEOUT = 30
"""Seconds that a rank waits for another one."""
PATIENCE = 400
"""Seconds after which a machine is not only slow."""
ROUTER = {"iterations": 6, "warmup": 1, "tolerance": 0.06}
STAGES = [
    {"iterations": 8, "sequence_length": 32, **small_run.STAGE},
    {"iterations": 2, "sequence_length": 64, **small_run.STAGE},
]


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


class Host:
    """A network namespace: its name, its end of the cable, its address."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.name = f"elastic{os.getpid()}-{number}"
        self.cable = f"el{os.getpid()}-{number}"
        self.address = f"10.213.7.{number + 1}"

    def start(self, folder: Path) -> subprocess.Popen[str]:
        """The command that a user gives on this host."""
        options = ["--nnodes", "2", "--node-rank", str(self.number), "--nproc-per-node", "1", "--wait", "200"]
        options += ["--master-addr", "10.213.7.1", "--master-port", "29611"]
        return launched(folder, *options, prefix=["ip", "netns", "exec", self.name], GLOO_SOCKET_IFNAME=self.cable)


def launched(folder: Path, *options: str, prefix: list[str] | None = None, **variables: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline", **variables}
    command = [*(prefix or []), "bash", str(SCRIPT), *options, "train", "recipe.yaml"]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(happened: Callable[[], bool], running: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        for process in running:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    if shutil.which("ip") is None:
        pytest.skip("iproute2 (`ip`) is not installed")
    pair = Host(0), Host(1)
    try:
        for host in pair:
            made = ip("netns", "add", host.name)
            if made.returncode:
                pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
        first, second = pair
        cable = ["type", "veth", "peer", "name", second.cable, "netns", second.name]
        steps = [["link", "add", first.cable, "netns", first.name, *cable]]
        for host in pair:
            steps += [
                ["-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.cable],
                ["-n", host.name, "link", "set", "lo", "up"],
                ["-n", host.name, "link", "set", host.cable, "up"],
            ]
        for step in steps:
            made = ip(*step)
            assert made.returncode == 0, (step, made.stderr)
        yield pair
    finally:
        for host in pair:
            ip("netns", "del", host.name)  # the cable goes with it


def prepare(folder: Path) -> None:
    """The small run with one whole model on each host, and the time that ranks wait for each other."""
    small_run.prepare(folder, router=ROUTER, stages=STAGES)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["megatron"] |= {
        "pipeline-model-parallel-size": 1,
        "hybrid-layer-pattern": recipe["megatron"]["hybrid-layer-pattern"].replace("|", ""),
        "distributed-timeout-seconds-after-init": TIMEOUT,
    }
    # The engine's last rank hands wandb the tracker file that its first rank may not have written yet.
    for name in [flag for flag in recipe["megatron"] if flag.startswith("wandb")]:
        del recipe["megatron"][name]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def saved(folder: Path) -> int:
    tracker = folder / "family" / "latest_checkpointed_iteration.txt"
    text = tracker.read_text() if tracker.exists() else ""
    return int(text) if text.isdecimal() else 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    path = find_checkpoint(folder / "family")
    return {name: read_tensor(path, name) for name in tensor_names(path) if "rng" not in name}


def stop(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        process.wait(PATIENCE)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_host_is_cut_off_and_the_restart_resumes(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    folder, alone = tmp_path / "two", tmp_path / "one"
    folder.mkdir()
    prepare(folder)
    shutil.copytree(folder, alone)
    running = [host.start(folder) for host in hosts]
    try:
        wait_for(lambda: saved(folder) >= 2, running)
        assert ip("-n", hosts[1].name, "link", "set", hosts[1].cable, "down").returncode == 0
        cut = time.monotonic()
        # The same training on one host, never stopped, while the two wait for each other.
        running.append(launched(alone, "--nproc-per-node", "2", "--master-port", "29711"))
        for number, process in enumerate(running[:2]):
            done = ended(process)
            # The recipe's timeout and not the engine's default of 600 s, on however loaded a machine.
            assert time.monotonic() - cut < 300
            assert done.returncode == 1, done.stdout + done.stderr
            # The cut may fall between a save and its line in the tracker.
            resumes = f"goes on from iteration {saved(folder)}, the last that was saved"
            for words in (f"rank {number} lost contact with the other ranks", f"{TIMEOUT}000ms", resumes):
                assert words in done.stderr, (words, done.stderr)
            assert done.stderr.count("megatron-elastic: error:") == 1
            assert len(done.stderr.splitlines()) == 2, done.stderr
            assert "Traceback" not in done.stderr + done.stdout
            log = (folder / "logs" / f"train-stage-1-node-{number}.log").read_text()
            assert "lost contact | Traceback" in log
        at = saved(folder)
        assert 2 <= at < STAGES[0]["iterations"], "the cut came too late to prove anything"
        straight = ended(running[2])
        assert straight.returncode == 0, straight.stdout[-3000:] + straight.stderr[-3000:]

        assert ip("-n", hosts[1].name, "link", "set", hosts[1].cable, "up").returncode == 0
        running = [host.start(folder) for host in hosts]
        both = [ended(process) for process in running]
    finally:
        stop(running)
    for done in both:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    # It went on where it was cut, and through the change of stage.
    shown = "".join(done.stdout for done in both)
    assert f"iteration {at + 1}/" in shown
    assert f"iteration {at}/" not in shown
    assert both[0].stdout.count("of the elastic run") == 2
    assert "of the elastic run" not in both[1].stdout
    resumed, expected = weights(folder), weights(alone)
    assert set(resumed) == set(expected)
    assert [name for name in expected if not torch.equal(resumed[name], expected[name])] == []
    # What was equal had been trained: the parent's weights differ.
    parent = find_checkpoint(folder / "sorted")
    assert [name for name in tensor_names(parent) if not torch.equal(read_tensor(parent, name), resumed[name])]
    metadata = read_metadata(find_checkpoint(folder / "family"))
    assert metadata is not None
    assert (metadata.iteration, metadata.stage) == (10, 2)
    assert not list((folder / "family").glob(".start-*"))
