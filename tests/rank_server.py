"""Runs `megatron-elastic train` (and other subcommands) in forks of one process that has imported everything.

Importing torch and Megatron takes longer than a small run. The server imports once, initialises nothing (no process
group, no CPU adaptation), and forks a process for every command. Inside it `launch.run_ranks` forks the ranks, which
call the very `megatron_elastic.cli.main.main([...])` that torchrun starts. One rank's end ends the others, as with
torchrun.

    with RankServer() as server:
        run = server.start(["train", "recipe.yaml", "--ranks", "2"], cwd=folder)
        status = run.wait()

A hook is a function of a test module that every rank calls first, in its own process: `hook("module:function", **how)`
calls `function(rank, words, **how)`. It may wrap what it wants, there and nowhere else.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
SIGNALLED = 128
"""Added to a signal's number in the exit status of a process that the signal ended, as a shell does."""
PATIENCE = 300.0
"""Seconds after which a run is taken for hung: no measure of speed."""
GRACE = 5.0
"""Seconds that the other ranks get after SIGTERM (torchrun gives them 30)."""


class Run:
    """One command, in a process of its own that the server forked."""

    def __init__(self, server: "RankServer", pid: int, cwd: Path, output: Path) -> None:
        self._server, self.pid, self.cwd, self.output = server, pid, cwd, output
        self.status: int | None = None

    def poll(self) -> int | None:
        """Exit status, or None while it runs."""
        if self.status is None:
            self.status = self._server.ask(poll=self.pid)
        return self.status

    def wait(self, timeout: float = PATIENCE) -> int:
        """Exit status (128 + N for signal N)."""
        limit = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > limit:
                self.kill()
                raise TimeoutError(f"no end after {timeout} s; {self.output} ends with:\n{self.text()[-3000:]}")
            time.sleep(0.02)
        assert self.status is not None
        return self.status

    def text(self) -> str:
        """Everything that the command, and then each rank, has written until now."""
        files = [self.output, *sorted(self.output.parent.glob(f"{self.output.name}-rank-*"))]
        return "".join(file.read_text(errors="replace") for file in files if file.exists())

    def ranks(self) -> list[int]:
        """Process ids of the ranks that run now, or ran last; each list is a process group with what they started."""
        found = [line.split()[1:] for line in self.text().splitlines() if line.startswith("rank-server: ")]
        return [int(pid) for pid in found[-1]] if found else []

    def kill(self) -> None:
        """SIGKILL to the command, its ranks and all that those started, as when a machine goes down."""
        for leader in (self.ranks()[:1], [self.pid]):
            for pid in leader:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)


class RankServer:
    """The driver's side: starts the server, hands it commands, and ends everything when it is left."""

    def __init__(self) -> None:
        from megatron_elastic.cli import launch

        # The working directory of a run holds folders (wandb) that must not be found as modules; the tests are modules.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        variables = {**launch.environment(), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.rank_server"],
            cwd=ROOT,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._runs: list[Run] = []

    def __enter__(self) -> "RankServer":
        return self

    def __exit__(self, *_: object) -> None:
        for run in self._runs:
            if run.poll() is None:
                run.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def ask(self, **request: Any) -> Any:
        """One request, one answer, each a line of JSON."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the rank server has ended with status {self._process.wait(60)}")
        return json.loads(answer)

    def start(
        self, words: Sequence[object], *, cwd: Path, hooks: Sequence[dict[str, Any]] = (), output: Path | None = None
    ) -> Run:
        """Starts `megatron-elastic WORDS` in a folder.

        Its output goes to a file (default: `output.txt` there), a rank's to that name and `-rank-N`: side by side in
        one file they would write into each other's lines.
        """
        path = output or cwd / "output.txt"
        for old in path.parent.glob(f"{path.name}*"):
            old.unlink()
        pid = self.ask(start=list(map(str, words)), cwd=str(cwd), output=str(path), hooks=list(hooks))
        self._runs.append(Run(self, pid, cwd, path))
        return self._runs[-1]

    def train(self, cwd: Path, *, ranks: int = 2, **how: Any) -> Run:
        """`megatron-elastic train recipe.yaml`, to its end."""
        run = self.start(["train", "recipe.yaml", "--ranks", ranks], cwd=cwd, **how)
        run.wait()
        return run


def hook(function: str, **how: Any) -> dict[str, Any]:
    """One of the hooks that `RankServer.start` takes: `module:function` and its arguments (JSON)."""
    return {"function": function, "how": how}


def _status(wait_status: int) -> int:
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else SIGNALLED - code


def _leave(words: Sequence[str]) -> NoReturn:
    """Runs the command line and ends this process with its status, without the parent's exit handlers' output."""
    import traceback

    from megatron_elastic.cli.main import main

    status: Any = 1
    try:
        status = main(words)
    except SystemExit as exit_:
        status = exit_.code
    except BaseException:  # what an interpreter does with it: the traceback, and status 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def _write_to(path: str) -> None:
    """Sends this process's output, and that of what it starts, to the end of a file."""
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(target, number)
    os.close(target)


def _fork_rank(words: Sequence[str], rank: int, ranks: int, port: int, group: int, request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        os.setpgid(pid, group or pid)  # before the next rank asks to join; again in the child, whichever comes first
        return pid
    os.setpgid(0, group)
    _write_to(f"{request['output']}-rank-{rank}")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_elastic import megatron_compat

    megatron_compat.install()  # as every rank does, and before the queue is made
    # Forked here; core would spawn it at the first save: seconds in which another process imports torch.
    filesystem_async.get_write_results_queue("fork")
    for each in request["hooks"]:
        module, _, function = each["function"].partition(":")
        getattr(importlib.import_module(module), function)(rank, words, **each["how"])
    _leave(words)


def _run_ranks(words: Sequence[object], *, ranks: int, what: str, request: dict[str, Any]) -> None:
    """Stands for `launch.run_ranks`: the same, without torchrun. The ranks are a process group of their own."""
    from megatron_elastic.cli import launch
    from megatron_elastic.errors import ElasticError

    port, texts = launch._free_port(), list(map(str, words))
    sys.stdout.flush()
    running: dict[int, int] = {}
    leader = 0
    for rank in range(ranks):
        pid = _fork_rank(texts, rank, ranks, port, leader, request)
        leader = leader or pid
        running[pid] = rank
    print("rank-server:", *running, flush=True)
    failed: dict[int, int] = {}
    limit = 0.0
    with launch.terminated_as_interrupt():
        try:
            while running:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid in running:
                    rank = running.pop(pid)
                    if status and not failed:
                        limit = time.monotonic() + GRACE
                        for other in running:
                            os.kill(other, signal.SIGTERM)
                    if status:
                        failed[rank] = _status(status)
                    continue
                if failed and time.monotonic() > limit:
                    break
                time.sleep(0.01)
        finally:
            # Whatever the ranks started (writers of an asynchronous save) goes with them, as torchrun does it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader, signal.SIGKILL)
            for pid in running:
                os.waitpid(pid, 0)
    if failed:
        raise ElasticError(f"{what} ended with status {failed}")


def _start(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.chdir(request["cwd"])
    sys.argv = ["megatron-elastic"]
    _write_to(request["output"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.closerange(3, 64)
    from megatron_elastic.cli import launch

    def run_ranks(words: Sequence[object], *, ranks: int, what: str, log: Path) -> None:
        _run_ranks(words, ranks=ranks, what=what, request=request)

    launch.run_ranks = run_ranks
    _leave(request["start"])


def serve() -> None:
    """Imports, then answers requests until its input ends."""
    # Standard output is for answers alone; transformers tells there that wandb is offline.
    with contextlib.redirect_stdout(sys.stderr):
        import tokenizers  # noqa: F401
        from megatron.core.tokenizers.text import libraries  # noqa: F401
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

        import megatron_elastic.cli.train
        import megatron_elastic.cli.worker
        import megatron_elastic.evaluation
        import megatron_elastic.training  # noqa: F401

    threads = os.listdir("/proc/self/task")
    if len(threads) != 1:
        raise RuntimeError(f"importing left {len(threads)} threads running: a fork would lose them")
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: Any = _start(request)
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = _status(status) if pid else None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
