"""Ways to train through `train` itself.

Drawn budgets, another teacher, one that is read from a cache, documents kept apart, ranks that disagree.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_elastic.checkpoint import find_checkpoint, read_metadata
from megatron_elastic.importance.scores import Scores
from tests.end_to_end import small_run
from tests.rank_server import RankServer, Run, hook

ITERATIONS = 3
STAGE = {"iterations": ITERATIONS, "micro_batch_size": 1, "global_batch_size": 4, "weights": [0.6, 0.4]}
ELASTIC: dict[str, Any] = {
    "stages": [{**STAGE, "sequence_length": 32}], "router": {"iterations": ITERATIONS, "warmup": 1, "tolerance": 0.06},
}  # fmt: skip
ONE_STAGE = {"hybrid-layer-pattern": "M-*-", "pipeline-model-parallel-size": 1}


@pytest.fixture(scope="module")
def server() -> Iterator[RankServer]:
    with RankServer() as started:
        yield started


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parent and text, in documents of a few words each; and another parent of the same shape."""
    folder = tmp_path_factory.mktemp("modes") / "base"
    small_run.prepare(folder, words_per_document=8, scale=0.1)
    small_run.write_parent(folder / "other", seed=2, scale=0.1)
    return folder


def train(
    server: RankServer, base: Path, out: Path, *, ranks: int = 2, status: int = 0, hooks: Any = (),
    megatron: dict[str, Any] | None = None, **elastic: Any,
) -> Run:  # fmt: skip
    """A run in a copy of the folder, or on in it where it is there already."""
    if not out.exists():
        shutil.copytree(base, out)
    flags = {**small_run.WITHOUT_WANDB, **(megatron or {})}
    small_run.write_recipe(out, flags, **{**ELASTIC, **elastic})
    run = server.train(out, ranks=ranks, hooks=hooks)
    assert run.status == status, run.text()[-3000:]
    return run


def losses(run: Run) -> dict[int, str]:
    """Iteration -> the losses as they were printed."""
    return {int(n): text for n, text in re.findall(r"elastic \| losses of iteration (\d+) \| (.*)", run.text())}


def values(run: Run) -> list[float]:
    """All losses, in order."""
    return [float(part.split(": ")[1]) for _, line in sorted(losses(run).items()) for part in line.split(" | ")]


def test_drawn_budgets_resume_bit_for_bit_and_are_all_judged(server: RankServer, base: Path, tmp_path: Path) -> None:
    straight = train(server, base, tmp_path / "straight", megatron=ONE_STAGE, budget_mode="sampled")
    assert "kd of drawn budgets" in straight.text()
    judged = re.findall(r"validation loss at iteration 2 .*", straight.text())
    assert judged
    assert all("kd whole" in line and "kd half" in line and "nan" not in line for line in judged)
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    family = tmp_path / "resumed" / "family"
    shutil.rmtree(family / f"iter_{ITERATIONS:07d}")
    (family / "latest_checkpointed_iteration.txt").write_text(str(ITERATIONS - 1))
    resumed = train(server, base, tmp_path / "resumed", megatron=ONE_STAGE, budget_mode="sampled")
    assert sorted(losses(resumed)) == [ITERATIONS]
    assert losses(resumed)[ITERATIONS] == losses(straight)[ITERATIONS]
    assert small_run.different(small_run.state(tmp_path / "resumed"), small_run.state(tmp_path / "straight")) == []
    # Megatron counts the samples of both modes differently: one does not go on with the other's family.
    refused = train(server, base, tmp_path / "resumed", megatron=ONE_STAGE, status=1)
    assert "budget_mode: the recipe has joint, the checkpoint sampled" in refused.text()


def test_another_teacher_is_followed_and_never_saved(server: RankServer, base: Path, tmp_path: Path) -> None:
    own = train(server, base, tmp_path / "own")
    other = train(server, base, tmp_path / "other", teacher="other")
    # The full budget is the parent: its distance from its own weights is nothing, from another model it is not.
    assert values(own)[0] < 1e-5 < 1e-2 < values(other)[0]
    saved, with_other = small_run.state(tmp_path / "own"), small_run.state(tmp_path / "other")
    assert {name: tensor.shape for name, tensor in saved.items()} == {n: t.shape for n, t in with_other.items()}
    missing = train(server, base, tmp_path / "missing", teacher="nowhere", status=1)
    assert "checkpoint nowhere does not exist" in missing.text()


def test_documents_are_kept_apart_on_every_layout(server: RankServer, base: Path, tmp_path: Path) -> None:
    apart = {"dataloader-inter-document-masking": True}
    one = train(server, base, tmp_path / "one", ranks=1, megatron={**ONE_STAGE, **apart}, teacher="other")
    four = train(
        server, base, tmp_path / "four", ranks=4, megatron={**apart, "context-parallel-size": 2}, teacher="other"
    )  # PP2 x CP2
    together = train(server, base, tmp_path / "together", ranks=1, megatron=ONE_STAGE, teacher="other")
    # fp32: a KL is a difference of log-probabilities of some 6 nats, each known to 4e-7; Adam's steps add some.
    assert values(four) == pytest.approx(values(one), abs=5e-6)
    assert max(abs(a - b) for a, b in zip(values(one), values(together), strict=True)) > 1e-4


APART = {"dataloader-inter-document-masking": True}
TP2_DP2 = {**ONE_STAGE, **APART, "tensor-model-parallel-size": 2, "sequence-parallel": True}


def cached(mode: str, **more: Any) -> dict[str, Any]:
    """Settings of a run with another teacher, through a cache beside the folders of the runs."""
    cache = {"folder": "../cache", "top_k": 16, "mode": mode, **more}
    return {"teacher": "other", "save_interval": 100, "teacher_cache": cache}


def told(run: Run) -> dict[str, str]:
    """The losses of training and of validation as they were printed, by their iterations."""
    judged = re.findall(r"(validation loss at iteration \d+) \| (.*)", run.text())
    return {**{str(number): text for number, text in losses(run).items()}, **dict(judged)}


def test_a_teacher_cache_is_written_on_two_layouts_and_read_on_others(
    server: RankServer, base: Path, tmp_path: Path
) -> None:
    """Stopped after step 2 on TP2 x DP2, gone on to 3 on PP2 x CP2; read on the first layout, and on one process."""
    stop = {**TP2_DP2, "exit-interval": 2}
    first = train(server, base, tmp_path / "written", ranks=4, megatron=stop, status=130, **cached("auto"))
    assert "written; the teacher runs (0 of 12 training samples, 0 of 4 validation samples are there" in first.text()
    before, by_iteration = told(first), losses(first)
    second = train(
        server, base, tmp_path / "written", ranks=4, megatron={**APART, "context-parallel-size": 2}, **cached("auto")
    )
    assert "written; the teacher runs (8 of 12 training samples, 4 of 4 validation samples are there" in second.text()
    by_iteration |= losses(second)
    alone = [hook("tests.end_to_end.faults:no_teacher")]
    again = train(server, base, tmp_path / "again", ranks=4, megatron=stop, status=130, hooks=alone, **cached("auto"))
    assert "read, and no teacher is loaded (12 of 12 training samples" in again.text()
    assert "validation loss at iteration 2" in before
    assert told(again) == before
    states = [small_run.state(tmp_path / name, 2) for name in ("written", "again")]
    assert small_run.different(*states) == []
    one = train(server, base, tmp_path / "one", ranks=1, megatron={**ONE_STAGE, **APART}, **cached("read"))
    # fp32: a KL is a difference of log-probabilities of some 6 nats, each known to 4e-7; Adam's steps add some.
    wanted = [float(part.split(": ")[1]) for _, line in sorted(by_iteration.items()) for part in line.split(" | ")]
    assert values(one) == pytest.approx(wanted, abs=5e-6)
    # What is not that cache's, or not in it, ends the run, and says what to do.
    other = train(server, base, tmp_path / "other", status=1, **cached("read", top_k=8))
    assert "../cache was written with other settings: top_k is 16, the recipe's 8" in other.text()
    changed = hook("tests.end_to_end.faults:other_tokens", sample=5)
    missed = train(server, base, tmp_path / "missed", megatron=APART, hooks=[changed], status=1, **cached("read"))
    assert "training sample 5 of stage 1, hash " in missed.text()
    assert sorted(losses(missed)) == [1]


def test_a_step_between_two_lines_of_the_log_waits_for_no_device(
    server: RankServer, base: Path, tmp_path: Path
) -> None:
    """The router decides after step 3; steps 0 and 4 are those of a line of the log."""
    counting = hook("tests.end_to_end.host_reads:count", out=str(tmp_path / "reads"))
    train(
        server, base, tmp_path / "run", hooks=[counting], megatron={"log-interval": 4},
        stages=[{**STAGE, "iterations": 7, "sequence_length": 32}], save_interval=100,
        evaluation={"interval": 100, "iterations": 1},
    )  # fmt: skip
    # The loader's batches are on the host: their role is read there, once a microbatch (teacher and two budgets).
    role, microbatches = "forward_step.py:__call__:__int__", 4 * 3
    for rank in range(2):
        reads = json.loads((tmp_path / f"reads-{rank}").read_text())
        for soft_or_sliced in ("1", "5"):
            assert reads[soft_or_sliced] == {role: microbatches}, rank
    # What happens now and then is seen: the last stage tells the losses, the router its choices. Masks and lists of
    # indices are made once: for the slices when the choices are decided.
    once = {"loss_log.py:committed:tolist", "metrics.py:_router:tolist", "made:SlicePlans._make"}
    assert once <= {key for n in reads for key in reads[n]}


def test_fp8_quantises_each_weight_once_a_step(server: RankServer, base: Path, tmp_path: Path) -> None:
    """Bf16 and two pipeline stages, all in FP8 but the layers at both ends: an MLP and an attention layer are left."""
    flags = {
        "mamba-num-heads": 16, "bf16": True, "fp8-format": "hybrid", "fp8-recipe": "tensorwise",
        "first-last-layers-bf16": True,
    }  # fmt: skip
    elastic: dict[str, Any] = {
        "axes": {"hidden": [32, 16], "ffn": [64, 32], "mamba_head_dim": [8, 4], "attention_heads": [4, 2]},
        "stages": [{**STAGE, "iterations": 4, "sequence_length": 32}], "save_interval": 4,
        "router": {"iterations": 2, "warmup": 1, "tolerance": 0.2}, "evaluation": {"interval": 100, "iterations": 1},
        "parent": "heads",
    }  # fmt: skip
    counting = hook("tests.end_to_end.quantised:count", out=str(tmp_path / "count"))
    small_run.write_parent(base / "heads", seed=3, scale=0.1, shape=replace(small_run.SHAPE, mamba_heads=16))
    fp8 = train(server, base, tmp_path / "fp8", hooks=[counting], megatron=flags, **elastic)
    for rank in range(2):
        counted = json.loads((tmp_path / f"count-{rank}").read_text())
        # A layer's two weights. Step 0: at every use, of 4 microbatches of two budgets. Then soft: whole, for both
        # budgets; and sliced: for each, and once more for the validation after the last step.
        assert [counted[str(step)] for step in range(4)] == [2 * 4 * 2, 2, 2 * 2, 2 * 2 * 2], rank
    teacher = train(
        server, base, tmp_path / "teacher", hooks=[counting], megatron=flags, teacher_precision="fp8", **elastic
    )
    counted = json.loads((tmp_path / "count-0").read_text())
    assert [counted[str(step)] for step in range(4)] == [2 + 2 * 4 * 2, 2, 2 * 2, 2 * 2 * 2]  # the teacher's, once
    # The full budget is the teacher at first, in FP8 too; and near it where the teacher is in bf16, but not the same.
    assert values(teacher)[0] < 1e-6 < 1e-5 < values(fp8)[0] < 1e-2
    assert values(teacher)[1:] != values(fp8)[1:]
    assert values(teacher)[1] == pytest.approx(values(fp8)[1], rel=0.05)


def test_a_router_that_differs_on_one_rank_stops_the_run(server: RankServer, base: Path, tmp_path: Path) -> None:
    wrong = hook("tests.end_to_end.faults:other_router", victim=1)
    router = {**ELASTIC["router"], "check_interval": 1}
    run = train(server, base, tmp_path / "wrong", hooks=[wrong], router=router, status=1)
    assert "the router differs between ranks: [1] of 2 ranks hold another one than the rest" in run.text()
    assert sorted(losses(run)) == [1]
    train(server, base, tmp_path / "right", router=router)


def test_ranks_measure_what_one_process_measures_and_sorting_keeps_the_order_of_the_layers(
    server: RankServer, base: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "run")
    calibration = {"samples": 5, "sequence_length": 32, "batch_size": 2}
    axes = {**small_run.ELASTIC["axes"], "depth": [4, 3, 2]}
    small_run.write_recipe(tmp_path / "run", **{**ELASTIC, "calibration": calibration, "axes": axes})
    printed = {}
    for name, ranks in (("one", 1), ("four", 4)):
        words = ["rank", "recipe.yaml", "--checkpoint", "sorted", "--out", f"{name}.pt", "--ranks", ranks, "--json"]
        run = server.start(words, cwd=tmp_path / "run")
        assert run.wait() == 0, run.text()[-3000:]
        lines = (tmp_path / "run" / "output.txt").read_text().splitlines()
        printed[name] = next(json.loads(line) for line in lines if line.startswith("{"))
        assert (tmp_path / "run" / f"{name}.png").stat().st_size > 10_000
    one, four = (Scores.load(tmp_path / "run" / f"{name}.pt") for name in ("one", "four"))
    for number, scores in one.layers.items():
        for axis, tensor in scores.items():
            # fp32, in other batches and with other sums.
            torch.testing.assert_close(four.layers[number][axis], tensor, rtol=1e-5, atol=1e-7)
    assert one.depth is not None
    assert four.depth is not None
    assert four.depth.order == one.depth.order
    assert printed["four"]["depth"]["order"] == list(one.depth.order)
    assert printed["one"]["depth"]["layer_forwards"] == four.depth.layer_forwards == 4 + 6 + 3
    assert {each["axis"] for each in printed["one"]["width"]} == {*axes, "mamba_head_dim"} - {"depth"}
    words = ["sort", "recipe.yaml", "--checkpoint", "sorted", "--scores", "four.pt", "--out", "again"]
    run = server.start(words, cwd=tmp_path / "run")
    assert run.wait() == 0, run.text()[-3000:]
    described = read_metadata(find_checkpoint(tmp_path / "run" / "again"))
    assert described is not None
    assert described.depth_ranking == one.depth.order
