"""Losing a rank: what is recognised, what is said, and that ranks begin from one folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_elastic.cli import contact, launch
from megatron_elastic.errors import ElasticError

ROOT = Path(__file__).resolve().parents[3]
GLOO = "[/w/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation to complete"
NCCL = (
    "[rank3]:[E1 ProcessGroupNCCL.cpp:689] [Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9, "
    "OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600012 milliseconds before timing out."
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"RuntimeError: {GLOO}", "Timed out waiting 15000ms for recv"),
        (
            "RuntimeError: [/w/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:5",
            "by peer [10.",
        ),
        (NCCL, "ran for 600012 milliseconds before timing out"),
        (
            "torch.distributed.DistBackendError: NCCL error in: x.cpp:1 ncclRemoteError: A call failed",
            "ncclRemoteError",
        ),
        ("torch.distributed.DistStoreError: Timed out after 601 seconds waiting for clients.", "waiting for clients"),
        ("torch.distributed.DistNetworkError: The client socket has timed out after 9ms", "client socket"),
        ("torch.distributed.DistBackendError: NCCL error in: x.cpp:1 ncclInvalidUsage: Duplicate GPU detected", None),
        ("RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)", None),
        ("ValueError: Timed out waiting", None),
    ],
)
def test_what_tells_of_a_lost_rank(text: str, said: str | None) -> None:
    found = contact.reason(text)
    assert (found is None) == (said is None), found
    assert said is None or said in str(found)


def test_a_lost_rank_is_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ElasticError) as failure, contact.watched(lambda: 7):
        raise RuntimeError(GLOO)
    assert re.fullmatch(r"rank 3 lost contact .* 15000ms .*from iteration 7, the last.*", str(failure.value))
    # The traceback is kept, and marked as one that tells nothing else.
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback" in lines[0]
    assert all(line.startswith(contact.MARK) for line in lines)
    with pytest.raises(ElasticError, match="nothing is saved"), contact.watched(lambda: 0):
        raise RuntimeError(GLOO)


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError(GLOO), torch.OutOfMemoryError("CUDA")])
def test_another_failure_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as failure, contact.watched(lambda: 7):
        raise error
    assert failure.value is error


# What a node shows of its ranks' output.


def shown(*lines: str) -> str:
    return str(launch._failure("the run", 1, lines, Path("a.log")))


LOST = f"megatron-elastic: error: rank 0 {contact.LOST}: closed"
CRASH = ("[rank1]: Traceback (most recent call last):", "[rank1]: ZeroDivisionError: division by zero")


def torchrun(code: int) -> list[str]:
    """What torchrun adds when a rank ended."""
    first = f"E1124 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: {code}) local_rank: 0"
    return [first, "Traceback (most recent call last):", "ChildFailedError:", *["  page"] * 30]


def test_contact_lost_is_shown_alone_unless_this_node_knows_why() -> None:
    marked = f"{contact.MARK} Traceback (most recent call last):"
    alone = shown(marked, LOST, *torchrun(1))
    assert alone == f"rank 0 {contact.LOST}: closed\n(the run ended with status 1; its whole output is in a.log)"
    assert shown(marked, LOST, *torchrun(-15)) == alone
    own = shown(LOST, "megatron-elastic: error: the loss is NaN", *torchrun(1))
    assert own.startswith("the loss is NaN\n")
    assert "| [rank1]: ZeroDivisionError" in shown(*CRASH, LOST, *torchrun(1))
    assert "exitcode: -9" in shown(LOST, *torchrun(-9))
    assert "page" not in shown(*CRASH, *torchrun(1))


def test_nccls_watchdog_and_torchruns_agent_are_told_in_one_message() -> None:
    watchdog = shown(NCCL, *torchrun(-6))
    assert watchdog.startswith("the run: no contact with the other nodes: Watchdog caught collective operation timeout")
    assert "newest checkpoint\n(" in watchdog
    assert "ZeroDivisionError" in shown(*CRASH, NCCL, *torchrun(1))
    agent = (
        "Traceback (most recent call last):",
        "torch.distributed.DistNetworkError: The client socket has timed out.",
    )
    assert shown(*agent).startswith("the run: no contact with the other nodes: The client socket has timed out. The")


# Ranks begin from one folder: three processes, of which one may see another.

RANK = """
import sys
from pathlib import Path
from megatron_elastic.cli import contact
from megatron_elastic.errors import ElasticError
folder, position = Path(sys.argv[1]), int(sys.argv[2])
try:
    print("begins at", contact.same_folder(folder, lambda: position, within=1.0))
except ElasticError as error:
    print(error)
"""


def store(folders: int) -> tuple[torch.distributed.TCPStore, dict[str, str]]:
    """A store as torchrun's first agent keeps it, and the variables that lead a rank there."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"WORLD_SIZE": str(folders), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
    return server, {**variables, "TORCHELASTIC_USE_AGENT_STORE": "True"}


def begin(folders: list[Path], positions: list[int]) -> list[str]:
    """What each rank says."""
    _server, variables = store(len(folders))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), str(position)],
            env={**os.environ, "PYTHONPATH": str(ROOT), **variables, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, (folder, position) in enumerate(zip(folders, positions, strict=True))
    ]
    return [process.communicate(timeout=300)[0] for process in ranks]


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_begin_together_only_where_they_see_the_same(tmp_path: Path) -> None:
    save = tmp_path / "family"
    assert begin([save] * 2, [5] * 2) == ["begins at 5\n"] * 2
    said = begin([save, save, tmp_path / "own"], [5, 4, 5])
    assert "rank 1 does not see what rank 0 sees" in said[1]
    assert "there iteration 5, here 4" in said[1]
    assert "rank 2 does not see what rank 0 sees" in said[2]
    # The first node tells the reason too, and leaves nothing behind.
    assert said[0] == said[1]
    assert list(save.iterdir()) == []


def test_a_second_start_while_the_first_still_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, variables = store(2)
    for name, value in {**variables, "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    torch.distributed.PrefixStore("megatron_elastic", server).add("starts of 1", 1)
    with pytest.raises(ElasticError, match=r"rank 1 was started twice at 127\.0\.0\.1"):
        contact.same_folder(tmp_path, lambda: 0)
