"""A parent with all kinds of layers through every command: ranked, sorted, trained over two expert-parallel ranks, cut.

Every axis is elastic, layers differ where they may, and layers are left out.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_elastic.checkpoint import find_checkpoint, read_metadata
from megatron_elastic.layout import Layout, ModelShape
from tests.end_to_end import small_run
from tests.rank_server import RankServer, hook
from tests.unit import small_parent

SHAPE = ModelShape(
    pattern="ME*M-E", vocab=small_run.VOCABULARY, hidden=32, ffn=64, attention_heads=4, query_groups=2, head_dim=8,
    mamba_heads=4, mamba_head_dim=8, mamba_groups=2, mamba_state=8, experts=8, expert_ffn=16, shared_expert_ffn=32,
    top_k=2, expert_bias=True,
)  # fmt: skip
MEGATRON: dict[str, Any] = {
    "hybrid-layer-pattern": SHAPE.pattern, "pipeline-model-parallel-size": 1, "num-experts": 8,
    "moe-ffn-hidden-size": 16, "moe-shared-expert-intermediate-size": 32, "moe-router-topk": 2,
    "moe-router-score-function": "sigmoid", "moe-router-enable-expert-bias": True, "moe-router-dtype": "fp32",
    "moe-router-topk-scaling-factor": 2.5, "moe-router-load-balancing-type": "none",
    "moe-token-dispatcher-type": "alltoall", "expert-model-parallel-size": 2, "use-distributed-optimizer": True,
    "overlap-grad-reduce": True, "overlap-param-gather": True, **small_run.WITHOUT_WANDB,
}  # fmt: skip
UNBROUGHT = 3
"""An iteration in which the count of each expert's tokens is as if it were still on the device."""
AXES = {
    "hidden": [32, 24, 16], "ffn": [64, 48, 32], "mamba_heads": [4, 2], "mamba_head_dim": [8, 6, 4],
    "attention_heads": [4, 2], "experts": [8, 6, 4], "expert_ffn": [16, 12, 8], "shared_expert_ffn": [32, 16],
    "depth": [6, 5, 4],
}  # fmt: skip
BUDGETS = [
    {"name": "whole", "fraction": 1.0},
    {"name": "varied", "fraction": 0.75, "unit": "active_parameters"},
    {"name": "even", "fraction": 0.5, "unit": "active_parameters", "heterogeneous": False},
]
STAGE = {"micro_batch_size": 1, "global_batch_size": 4, "sequence_length": 32}
ELASTIC: dict[str, Any] = {
    "axes": AXES, "budgets": BUDGETS, "expert_blocks": 2, "calibration": {"samples": 8, "sequence_length": 32},
    "heterogeneous": ["ffn", "mamba_heads", "experts", "expert_ffn"],
    "router": {"iterations": 3, "warmup": 1, "tolerance": 0.05, "hard_share": 0.5},
    "stages": [
        {**STAGE, "iterations": 2, "weights": [0.4, 0.3, 0.3], "teacher": "trainable", "ce_weight": 0.5},
        {**STAGE, "iterations": 3, "weights": [0.4, 0.3, 0.3]},
    ],
}  # fmt: skip


def command(server: RankServer, folder: Path, *words: object, status: int = 0) -> str:
    run = server.start(list(words), cwd=folder, output=folder / "said.txt")
    assert run.wait() == status, run.text()[-4000:]
    return run.text()


@pytest.fixture(scope="module")
def server() -> Iterator[RankServer]:
    with RankServer() as started:
        yield started


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, server: RankServer) -> tuple[Path, str]:
    """The folder of a finished run, and what training said."""
    folder = tmp_path_factory.mktemp("axes") / "run"
    folder.mkdir()
    small_run.prepare(folder, MEGATRON, **ELASTIC)
    generator, weights = torch.Generator().manual_seed(3), {}
    layout = Layout(SHAPE, 4, 2)
    for name, dimensions in layout.parameters().items():
        size = [dimension.size for dimension in dimensions]
        positive = any(part in name for part in ("norm", "A_log", "dt_bias", "mixer.D"))
        weights[name] = torch.ones(size) if positive else torch.randn(size, generator=generator) * 0.1
    small_parent.write(folder / "parent", weights, layout=layout)
    (folder / "sorted").rename(folder / "other")
    command(server, folder, "rank", "recipe.yaml", "--checkpoint", "parent", "--out", "scores.pt")
    command(server, folder, "sort", "recipe.yaml", "--checkpoint", "parent", "--scores", "scores.pt", "--out", "sorted")
    counting = hook("tests.end_to_end.host_reads:count", out=str(folder / "reads"), unbrought=UNBROUGHT)
    run = server.train(folder, hooks=[counting])
    assert run.status == 0, run.text()[-4000:]
    return folder, run.text()


def test_experts_wait_for_no_device(trained: tuple[Path, str]) -> None:
    """Core's dispatcher brings the tokens of each expert to the host; where nobody had, each layer would wait."""
    for rank in range(2):
        reads = json.loads((trained[0] / f"reads-{rank}").read_text())
        assert {"2", "3", "4"} <= set(reads)  # soft, sliced, sliced
        for iteration, counts in reads.items():
            inside = {key for key in counts if key.startswith(("layers/", "ops/", "model.py"))}
            assert inside == ({"layers/moe.py:forward:tolist"} if int(iteration) == UNBROUGHT else set())
        assert not [key for key in reads["4"] if key.startswith("made:")]
        assert any(key.startswith("made:") for counts in reads.values() for key in counts)


def loss(server: RankServer, folder: Path, *words: object) -> dict[str, Any]:
    said = command(server, folder, "evaluate", "--data", "corpus/validation", "--tokens", 512, "--json", *words)
    found: dict[str, Any] = json.loads([line for line in said.splitlines() if line.startswith("{")][-1])
    return found


def test_the_router_decides_within_the_budgets(trained: tuple[Path, str]) -> None:
    folder, said = trained
    family = read_metadata(find_checkpoint(folder / "family"))
    assert family is not None
    assert len(set(family.depth_ranking)) >= 2
    described = family.family
    for budget, selection in zip(family.budgets, family.selections, strict=True):
        share = described.selection_cost(selection, budget.unit) / described.full_cost(budget.unit)
        assert share == pytest.approx(budget.fraction, rel=0.05)
    whole, varied, even = family.selections
    assert whole == described.full
    assert even.within(varied)
    assert not any(isinstance(size, tuple) for size in even.sizes.values())
    # The first stage's teacher is the full budget, which learns from the text; then it follows the frozen parent.
    assert "ce whole" in said.split("losses of iteration 3")[0]
    assert "kd whole" in said.split("losses of iteration 3")[1]


@pytest.mark.parametrize("budget", ["whole", "varied", "even", "0.6"])
def test_a_cut_model_is_what_ran_in_the_family(trained: tuple[Path, str], server: RankServer, budget: str) -> None:
    folder = trained[0]
    inside = loss(server, folder, "--checkpoint", "family", "--budget", budget)
    command(server, folder, "extract", "--checkpoint", "family", "--budget", budget, "--out", f"cut/{budget}")
    alone = loss(server, folder, "--checkpoint", f"cut/{budget}")
    assert alone["parameters"] == inside["parameters"]
    # Sums over tokens in fp32, in two orders.
    assert alone["loss"] == pytest.approx(inside["loss"], abs=2e-6)
    if budget != "whole":
        assert abs(alone["loss"] - loss(server, folder, "--checkpoint", "sorted")["loss"]) > 1e-5


GIVEN = {
    "whole": {},
    "varied": {"hidden": 24, "mamba_heads": [2, 4], "experts": [4, 6], "expert_ffn": [12, 16], "skipped": [4]},
    "even": {
        "hidden": 16, "ffn": 32, "mamba_heads": 2, "mamba_head_dim": 6, "attention_heads": 2, "experts": 4,
        "expert_ffn": 8, "shared_expert_ffn": 16, "skipped": [1, 4],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def given(trained: tuple[Path, str], server: RankServer) -> tuple[Path, str]:
    """A run of given selections, budgets drawn: ranks run different ones, with other layers and experts, side by side.

    Its budgets follow different teachers.
    """
    folder = trained[0]
    live = {"whole": "trainable", "even": "trainable"}
    stage = {**STAGE, "iterations": 3, "weights": [0.4, 0.3, 0.3], "teacher": live}
    more = {"selections": GIVEN, "stages": [stage], "save": "given", "budget_mode": "sampled"}
    without = {key: value for key, value in ELASTIC.items() if key != "router"}
    small_run.write_recipe(folder, MEGATRON, **{**without, **more})
    run = server.train(folder)
    assert run.status == 0, run.text()[-4000:]
    return folder, run.text()


def test_drawn_budgets_with_other_layers_and_experts_train_side_by_side(given: tuple[Path, str]) -> None:
    lines = [line for line in given[1].splitlines() if "losses of iteration" in line]
    assert len(lines) == 3
    text = "".join(lines)
    assert all(name in text for name in ("ce whole", "kd varied", "kd even"))
    assert "nan" not in text


@pytest.mark.parametrize("budget", ["varied", "even"])
def test_given_selections_are_cut_as_they_ran(given: tuple[Path, str], server: RankServer, budget: str) -> None:
    folder = given[0]
    inside = loss(server, folder, "--checkpoint", "given", "--budget", budget)
    command(server, folder, "extract", "--checkpoint", "given", "--budget", budget, "--out", f"given-{budget}")
    alone = loss(server, folder, "--checkpoint", f"given-{budget}")
    assert alone["parameters"] == inside["parameters"]
    assert alone["loss"] == pytest.approx(inside["loss"], abs=2e-6)
    command(server, folder, "extract", "--checkpoint", "given", "--budget", "0.6", "--out", "between", status=1)
