"""A teacher cache through `train` itself: written on two layouts, one after the other, and read on others."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end import small_run
from tests.rank_server import RankServer, hook

ITERATIONS, STOP = 3, 2
STAGE = {
    "iterations": ITERATIONS, "sequence_length": 32, "micro_batch_size": 1, "global_batch_size": 4,
    "weights": [0.6, 0.4],
}  # fmt: skip
CACHE = {"folder": "../cache", "top_k": 16}
ELASTIC: dict[str, Any] = {
    "stages": [STAGE], "router": {"iterations": ITERATIONS, "warmup": 1, "tolerance": 0.06}, "teacher": "other",
    "temperature": 1.5,
}  # fmt: skip
APART = {"dataloader-inter-document-masking": True, **small_run.WITHOUT_WANDB}
ONE = {**APART, "hybrid-layer-pattern": "M-*-", "pipeline-model-parallel-size": 1}
TP2_DP2 = {**ONE, "tensor-model-parallel-size": 2, "sequence-parallel": True}
PP2_CP2 = {**APART, "context-parallel-size": 2}
INTERRUPTED = 130


@pytest.fixture(scope="module")
def server() -> Iterator[RankServer]:
    with RankServer() as started:
        yield started


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parent, another teacher of the same shapes, and text in documents of a few words each."""
    folder = tmp_path_factory.mktemp("cached") / "base"
    small_run.prepare(folder, words_per_document=8, scale=0.1)
    small_run.write_parent(folder / "other", seed=2, scale=0.1)
    return folder


def train(
    server: RankServer, base: Path, name: str, megatron: dict[str, Any], *, ranks: int, status: int = 0,
    hooks: Any = (), cache: dict[str, Any] | None = None, **elastic: Any,
) -> str:  # fmt: skip
    """What a run says in a copy of the folder beside it, or on in it where it is there already."""
    out = base.parent / name
    if not out.exists():
        shutil.copytree(base, out)
    settings = {} if cache is None else {"teacher_cache": {**CACHE, **cache}}
    small_run.write_recipe(out, megatron, **{**ELASTIC, **settings, **elastic})
    run = server.train(out, ranks=ranks, hooks=hooks)
    assert run.status == status, run.text()[-3000:]
    return run.text()


def losses(run: str) -> dict[int, str]:
    """Iteration -> the losses as they were printed; validation's under their negative iteration."""
    found = {int(n): text for n, text in re.findall(r"elastic \| losses of iteration (\d+) \| (.*)", run)}
    judged = re.findall(r"validation loss at iteration (\d+) \| (.*)", run)
    return {**found, **{-int(n): text for n, text in judged}}


def values(found: dict[int, str]) -> list[float]:
    """Training losses, in order."""
    return [float(part.split(": ")[1]) for n, line in sorted(found.items()) if n > 0 for part in line.split(" | ")]


@pytest.fixture(scope="module")
def written(server: RankServer, base: Path) -> dict[int, str]:
    """Losses of a run that wrote: stopped on TP2 x DP2, and gone on on PP2 x CP2."""
    stopped = {**TP2_DP2, "exit-interval": STOP}
    first = train(server, base, "written", stopped, ranks=4, cache={"mode": "auto"}, status=INTERRUPTED)
    second = train(server, base, "written", PP2_CP2, ranks=4, cache={"mode": "auto"})
    assert "written; the teacher runs (0 of 12 training samples, 0 of 4 validation samples are there" in first
    assert "written; the teacher runs (8 of 12 training samples, 4 of 4 validation samples are there" in second
    return {**losses(first), **losses(second)}


def test_read_on_the_layout_that_wrote_it_the_losses_are_the_same(
    server: RankServer, base: Path, written: dict[int, str]
) -> None:
    stopped = {**TP2_DP2, "exit-interval": STOP}
    run = train(server, base, "again", stopped, ranks=4, cache={"mode": "auto"}, status=INTERRUPTED)
    assert "read, and no teacher is loaded" in run
    assert losses(run) == {n: text for n, text in written.items() if abs(n) <= STOP}


def test_one_process_reads_what_two_layouts_wrote(server: RankServer, base: Path, written: dict[int, str]) -> None:
    one = losses(train(server, base, "one", ONE, ranks=1, cache={"mode": "read"}))
    # fp32: a KL is a difference of log-probabilities of some 6 nats, each known to 4e-7; Adam's steps add some.
    assert values(one) == pytest.approx(values(written), abs=5e-6)
    online = losses(train(server, base, "online", ONE, ranks=1))
    # The ghost joins 496 of 512 tokens: less divergence, of the same teacher.
    assert all(0.1 * b < a < 0.9 * b for a, b in zip(values(one), values(online), strict=True))
