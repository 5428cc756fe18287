"""Ranks on several hosts: that they begin from the same folder, and what is said when one of them is lost."""

import os
import re
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_elastic.errors import ElasticError

if TYPE_CHECKING:
    from torch.distributed import Store

SEEN_WITHIN = 90.0
"""Seconds after which a file that one host wrote must be visible on another: NFS hides new files for up to 60."""
PATIENCE = 300.0
"""Seconds that rank 0 waits until the others have seen it: they may still be starting."""
MARK = "lost contact |"
"""What the lines of a traceback begin with when it tells only that another rank is gone."""
LOST = "lost contact with the other ranks"
"""Words of every message about it."""

# How torch says that another rank is gone. Gloo has no exception of its own; NCCL's exception says more than that, and
# its watchdog ends the process instead of raising; the store's exceptions are also what torchrun itself ends with.
_SIGNS = (
    r"\[[^\]]*/gloo/transport/[^\]]*\] ?(.*)",
    r"(Watchdog caught collective operation timeout: .*)",
    r"DistBackendError: (.*(?:ncclRemoteError|ncclSystemError|[Tt]imeout|[Tt]imed out|network error).*)",
    r"Dist(?:Network|Store)Error: (.*)",
)


def reason(text: str) -> str | None:
    """What a line of torch's (`TYPE: MESSAGE` for an exception) says about a lost rank; None where it does not."""
    for sign in _SIGNS:
        found = re.search(sign, text)
        if found:
            return found.group(1).strip().rstrip(".")
    return None


def _rank() -> str:
    return f"rank {os.environ.get('RANK', '0')}"


@contextmanager
def watched(position: Callable[[], int]) -> Iterator[None]:
    """Turns the loss of another rank into one message; torch's own traceback is kept, each line marked.

    Args:
        position: iteration of the newest checkpoint.

    Raises:
        ElasticError: another rank did not answer in time, or closed the connection.
    """
    try:
        yield
    except RuntimeError as error:
        found = reason(" ".join(f"{type(error).__name__}: {error}".split()))
        if found is None:
            raise
        for line in traceback.format_exc().splitlines():
            print(f"{MARK} {line}", file=sys.stderr)
        saved = position()
        again = f"goes on from iteration {saved}, the last that was saved" if saved else "starts it (nothing is saved)"
        raise ElasticError(
            f"{_rank()} {LOST}: {found}. A host or its network is gone, or another rank ended with an error of its own "
            f"(in the log of its node). The same command, given again on every node, {again}"
        ) from error


def same_folder(folder: Path, position: Callable[[], int], *, within: float = SEEN_WITHIN) -> int:
    """Waits until every rank that torchrun started sees what rank 0 sees in the folder that they save to.

    Args:
        folder: shared between the hosts.
        position: iteration of the newest checkpoint that this rank sees there.
        within: seconds to wait for it.

    Returns:
        The iteration, the same on every rank.

    Raises:
        ElasticError: the hosts see different folders, or ranks of an earlier start are still there.
    """
    import torch

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return position()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    server = torch.distributed.TCPStore(
        address, port, is_master=False, timeout=timedelta(seconds=PATIENCE), wait_for_workers=False
    )
    store = torch.distributed.PrefixStore("megatron_elastic", server)
    if store.add(f"starts of {rank}", 1) > 1:
        raise ElasticError(
            f"{_rank()} was started twice at {address}:{port}: an earlier start still runs on the first node. Wait "
            "until it has ended on every node, or end it, and start all nodes again"
        )
    if rank == 0:
        with watched(position):
            return _show(store, folder, position(), world)
    wanted, mark = store.get("start").decode().split(" ")
    deadline = time.monotonic() + within
    while not (folder / mark).exists() or (here := position()) != int(wanted):
        if time.monotonic() > deadline:
            fault = (
                f"{_rank()} does not see what rank 0 sees in {folder.resolve()} (there iteration {wanted}, here "
                f"{position()}): give all nodes the same folder, on a file system that they share"
            )
            store.set(f"seen by {rank}", fault)
            raise ElasticError(fault)
        time.sleep(0.1)
    store.set(f"seen by {rank}", "")
    return here


def _show(store: "Store", folder: Path, found: int, world: int) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".start-{uuid.uuid4().hex}"
    mark.touch()
    try:
        store.set("start", f"{found} {mark.name}")
        answers = [store.get(f"seen by {rank}").decode() for rank in range(1, world)]
    finally:
        mark.unlink()
    faults = [answer for answer in answers if answer]
    if faults:
        raise ElasticError(faults[0])
    return found
