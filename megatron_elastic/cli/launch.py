"""Starts ranks on this machine, keeps their whole output in a log file, and shows the lines that tell progress."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from megatron_elastic.cli import contact
from megatron_elastic.errors import ElasticError
from megatron_elastic.signals import terminated_as_interrupt
from megatron_elastic.wandb_run import offline_without_account

PACKAGE_PARENT = Path(__file__).resolve().parents[2]
TAIL = 25
"""Lines of a failed child's output that are shown."""
GRACE = 40.0
"""Seconds that a launcher gets to end its ranks: torchrun itself gives them 30."""

_ERROR = re.compile(r"megatron-elastic: error: (.*)")
_DROPPED_FIELDS = (
    "consumed samples",
    "global batch size",
    "loss scale",
    "number of ",
    "num zeros",
    "params norm",
    "Theoretical",
)


def under_torchrun() -> bool:
    """Whether this process is a rank that torchrun (or SLURM with torchrun's variables) started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_of(ranks: int | None) -> int:
    """Ranks that torchrun started in all.

    Args:
        ranks: what `--ranks` says, if anything.

    Raises:
        ElasticError: `--ranks` says another number.
    """
    world = int(os.environ["WORLD_SIZE"])
    if ranks not in (None, world):
        raise ElasticError(f"--ranks {ranks}: torchrun started {world}; leave --ranks out under torchrun")
    return world


def gpu_count() -> int:
    """GPUs that this process could use; imports torch."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_ranks(ranks: int) -> None:
    """Refuses more ranks than GPUs where there are GPUs.

    Raises:
        ElasticError: too many ranks.
    """
    gpus = gpu_count()
    if gpus and ranks > gpus:
        raise ElasticError(
            f"--ranks {ranks}: this machine has {gpus} GPU(s) and every rank takes one: give at most {gpus}, or hide "
            "the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU"
        )


def progress_line(line: str) -> str | None:
    """What the console is told of one line of a child's output; None where it tells no progress."""
    line = line.strip()
    if line.startswith("elastic |"):
        return line
    if line.startswith("validation loss"):
        fields = [field.strip() for field in line.split("|")]
        return " | ".join(field for field in fields if field and " PPL:" not in field)
    if re.match(r"\[[^]]*\] iteration\s+\d+/\s*\d+ \|", line):
        fields = [field.strip() for field in line.partition("] ")[2].split("|")]
        kept = [field for field in fields if field and not field.startswith(_DROPPED_FIELDS)]
        return " | ".join(re.sub(r"\s+", " ", field).replace("/ ", "/") for field in kept)
    return None


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def environment() -> dict[str, str]:
    """Variables of a child: the package on its path, one thread a rank by default, no GPU where torch can use none."""
    found = dict(os.environ)
    paths = [str(PACKAGE_PARENT), *filter(None, [found.get("PYTHONPATH")])]
    # The working directory is not searched for modules: it holds folders such as `wandb`.
    found.update(PYTHONPATH=os.pathsep.join(paths), PYTHONSAFEPATH="1", PYTHONUNBUFFERED="1")
    found.setdefault("OMP_NUM_THREADS", "1")
    found.setdefault("TOKENIZERS_PARALLELISM", "false")
    found.update(offline_without_account())
    if gpu_count():
        found.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron demands it for tensor parallelism
    else:
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found


def _stop(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _own_messages(tail: Sequence[str]) -> list[str]:
    """The messages that ranks ended with; a list of faults goes on in indented lines."""
    messages = []
    for index, line in enumerate(tail):
        found = _ERROR.search(line)
        if not found:
            continue
        message = [found.group(1)]
        for more in tail[index + 1 :]:
            if not more.startswith("  - "):
                break
            message.append(more)
        messages.append("\n".join(message))
    return messages


def _failure(what: str, status: int, tail: Sequence[str], log: Path) -> ElasticError:
    where = f"({what} ended with status {status}; its whole output is in {log})"
    failed = [number for number, line in enumerate(tail) if "failed (exitcode: " in line]
    # After that line stands torchrun's own report of which rank it was, a page without the reason.
    tail = list(tail[: failed[0] + 1] if failed else tail)
    messages = _own_messages(tail)
    causes = [message for message in messages if contact.LOST not in message]
    if causes:
        return ElasticError(f"{causes[0]}\n{where}")
    # That contact was lost tells only that something ended: why comes first, where this node knows it.
    killed = bool(failed) and re.search(r"exitcode: -(?!6\b|15\b)\d+", tail[-1])  # not by abort() or by torchrun
    crashed = any("Traceback (most recent call last)" in line and contact.MARK not in line for line in tail)
    if messages and not killed and not crashed:
        return ElasticError(f"{messages[0]}\n{where}")
    lost = next(filter(None, (contact.reason(line) for line in tail if contact.MARK not in line)), None)
    if lost and not killed and not (failed and crashed):
        again = "The same command, given again on every node, goes on from the newest checkpoint"
        return ElasticError(f"{what}: no contact with the other nodes: {lost}. {again}\n{where}")
    shown = "".join(f"\n  | {line}" for line in tail[-TAIL:])
    return ElasticError(f"{what} ended with status {status}; the end of its output, all of which is in {log}:{shown}")


def run_children(commands: Sequence[Sequence[str]], *, what: str, log: Path) -> None:
    """Runs commands side by side to their end; if one fails, or this process is interrupted, the others are ended too.

    Args:
        commands: complete command lines.
        what: name for messages.
        log: file that the output is added to; with several commands, `-1`, `-2`, ... is added to its name.

    Raises:
        ElasticError: a command failed; the message has its status and the end of its output, or its own error message.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    logs = [log] if len(commands) == 1 else [log.with_stem(f"{log.stem}-{n}") for n in range(1, len(commands) + 1)]
    tails: list[deque[str]] = [deque(maxlen=2000) for _ in commands]
    processes: list[subprocess.Popen[str]] = []
    threads = []

    def follow(process: subprocess.Popen[str], path: Path, tail: deque[str]) -> None:
        assert process.stdout is not None
        with path.open("a", encoding="utf-8") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                tail.append(line.rstrip("\n"))
                shown = progress_line(line)
                if shown:
                    print(f"  {shown}", flush=True)

    with terminated_as_interrupt():
        try:
            for command, path, tail in zip(commands, logs, tails, strict=True):
                # A session of its own: Ctrl-C reaches this process alone, which then ends the child in order.
                process = subprocess.Popen(
                    command,
                    env=environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    start_new_session=True,
                )
                processes.append(process)
                threads.append(threading.Thread(target=follow, args=(process, path, tail), daemon=True))
                threads[-1].start()
            while any(process.poll() is None for process in processes) and not any(p.poll() for p in processes):
                time.sleep(0.05)
        finally:
            _stop(processes)
            for thread in threads:
                thread.join(5)
    # A child that failed by itself comes before those that were ended because of it.
    failed = sorted((n for n, p in enumerate(processes) if p.returncode), key=lambda n: processes[n].returncode < 0)
    if failed:
        number = failed[0]
        raise _failure(what, processes[number].returncode, list(tails[number]), logs[number])


def command_line(*words: object) -> list[str]:
    """This program with other arguments, in a process of its own."""
    return [sys.executable, "-m", "megatron_elastic", *map(str, words)]


def run_ranks(words: Sequence[object], *, ranks: int, what: str, log: Path) -> None:
    """Runs `megatron-elastic WORDS` on `ranks` processes of this machine, under torchrun.

    Raises:
        ElasticError: more ranks than GPUs, or a rank failed.
    """
    check_ranks(ranks)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(ranks)]
    address = ["--master-addr", "127.0.0.1", "--master-port", str(_free_port())]
    run_children([[*launcher, *address, "-m", "megatron_elastic", *map(str, words)]], what=what, log=log)
