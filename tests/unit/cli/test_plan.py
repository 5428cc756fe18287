"""`megatron-elastic plan`: one JSON object, an aligned table, and nothing heavy imported for a configuration."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_elastic.cli.main import main
from megatron_elastic.cost_model import cost
from tests.unit import published

ROOT = Path(__file__).resolve().parents[3]
RECIPES = ROOT / "recipes"
COSTS = {"parameters", "active_parameters", "memory_bytes", "flops_per_token", "selection"}


def plan(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["plan", *map(str, words), "--json"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1
    result: dict[str, Any] = json.loads(shown)
    assert set(result["parent"]) >= COSTS
    assert all(set(budget) >= {*COSTS, "name", "target", "unit"} for budget in result["budgets"])
    return result


def test_a_configuration_imports_neither_torch_nor_the_engine() -> None:
    program = (
        "import sys; from megatron_elastic.cli.main import main; status = main(sys.argv[1:]); "
        "print(*sys.modules, file=sys.stderr); sys.exit(status)"
    )
    words = ["plan", "--hf-config", str(published.DATA / "nemotron_nano_v2_12b"), "--target", "6e9", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=100
    )
    assert json.loads(done.stdout)["parent"]["parameters"] == 12_310_001_152
    loaded = set(done.stderr.split())
    assert "megatron_elastic.hf.config" in loaded
    assert not loaded & {"torch", "megatron", "megatron.core", "transformers", "numpy"}


@pytest.mark.parametrize("name", published.NAMES)
def test_published_configurations(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shape = published.shape(name)
    result = plan(capsys, "--hf-config", published.DATA / name / "config.json", "--context", 1024)
    assert result["parent"]["parameters"] == cost(shape, shape.full)
    assert result["parent"]["active_parameters"] == cost(shape, shape.full, unit="active_parameters")
    assert [budget["name"] for budget in result["budgets"]] == ["p100", "p75", "p50"]
    for budget, share in zip(result["budgets"], (1.0, 0.75, 0.5), strict=True):
        assert budget["parameters"] == pytest.approx(share * result["parent"]["parameters"], rel=0.005)
    # The full budget is the parent, which counts once.
    apart = sum(budget["parameters"] for budget in result["budgets"])
    assert (result["family_bytes"], result["separate_bytes"]) == (2 * result["parent"]["parameters"], 2 * apart)


def test_memory_of_published_families(capsys: pytest.CaptureFixture[str]) -> None:
    """Nemotron Elastic, table 3 (GB): 24 for 12B + 9B + 6B. Star Elastic, table 3: 58.9 for 30B + 23B + 12B (GiB)."""
    dense = plan(capsys, "--hf-config", published.DATA / "nemotron_nano_v2_12b", "--target", "8.89e9", "6e9")
    assert dense["family_bytes"] / 1e9 == pytest.approx(24.6, abs=0.05)
    assert dense["separate_bytes"] / 1e9 == pytest.approx(2 * (12.31 + 8.89 + 6.0), rel=0.004)
    moe = plan(capsys, "--hf-config", published.DATA / "nemotron_3_nano_30b_a3b", "--target", "23e9", "12e9")
    assert moe["family_bytes"] / 2**30 == pytest.approx(58.9, abs=0.1)
    # The paper's 126.1 counts members whose sizes are not published; ours are within 0.5 % of 23 and 12 billion.
    assert moe["separate_bytes"] / 2**30 == pytest.approx(126.1, rel=0.03)
    assert moe["separate_bytes"] / moe["family_bytes"] == pytest.approx(2.14, abs=0.05)
    first = moe["budgets"][0]
    assert first["name"] == "23B-1"
    assert first["active_parameters"] == pytest.approx(2.8e9, rel=0.02)  # as published, though it was not asked for


def test_targets_in_every_unit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = published.DATA / "nemotron_3_nano_30b_a3b"
    for unit, target, key in (
        ("active_parameters", 2.8e9, "active_parameters"),
        ("memory", 40e9, "memory_bytes"),
        ("flops", 5e9, "flops_per_token"),
    ):
        result = plan(capsys, "--hf-config", folder, "--target", target, "--unit", unit, "--count", 3)
        assert len(result["budgets"]) == 3
        for budget in result["budgets"]:
            assert budget[key] == pytest.approx(target, rel=0.005)
            assert budget["reached"] == budget[key]
    table = tmp_path / "latency.yaml"
    ends = [{"hidden": hidden, "latency": hidden / 1000} for hidden in (2688, 1280)]
    table.write_text(yaml.safe_dump({"outside": ends, "layers": {kind: ends for kind in "ME*"}}))
    result = plan(
        capsys, "--hf-config", folder, "--target", 100, "--unit", "latency", "--latency-table", table, "--count", 1
    )
    assert result["budgets"][0]["latency"] == result["budgets"][0]["reached"] < result["parent"]["latency"]
    assert result["budgets"][0]["reached"] == pytest.approx(53 * result["budgets"][0]["selection"]["hidden"] / 1000)


def test_memory_follows_batch_context_and_profile(capsys: pytest.CaptureFixture[str]) -> None:
    folder = published.DATA / "nemotron_nano_v2_12b"

    def memory(*words: object) -> int:
        found: int = plan(capsys, "--hf-config", folder, *words)["parent"]["memory_bytes"]
        return found

    kv = 2 * 2 * 8 * 128 * 6  # bytes a token: keys and values in bf16, 8 heads of 128, 6 layers
    assert memory("--context", 131072) - memory("--context", 1024) == kv * (131072 - 1024)
    states = memory("--batch", 2) - memory() - 8192 * kv
    assert states == 28 * 2 * (128 * 80 * 128 + (128 * 80 + 2 * 8 * 128) * 4)
    assert memory() - memory("--profile", "fp8") == 12_310_001_152
    # The published constraint: 128k tokens in 19.66 GiB, which the parent does not meet.
    assert memory("--context", 131072) / 2**30 > 19.66


def test_the_published_4b_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    words = (RECIPES / "nemotron_nano_v2_9b_to_4b.yaml", "--target", "3.97e9")
    published_4b = {"hidden": 3136, "ffn": 12544, "mamba_heads": 96, "mamba_head_dim": 80, "attention_heads": 40}
    for extra, number in (((), None), (("--keep", "depth=42"), 0)):
        found = plan(capsys, *words, *extra)["budgets"]
        match = [
            place
            for place, budget in enumerate(found)
            if {axis: size for axis, size in budget["selection"].items() if axis != "skipped"} == published_4b
            and len(budget["selection"]["skipped"]) == 14
        ]
        assert len(match) == 1
        assert number is None or match == [number]
        assert found[match[0]]["parameters"] == 3_973_556_832


def test_a_recipe_is_told_whole(capsys: pytest.CaptureFixture[str]) -> None:
    result = plan(capsys, RECIPES / "nemotron_nano_v2_12b_to_9b_6b.yaml", "--gpus", 512)
    assert [budget["name"] for budget in result["budgets"]] == ["12b", "9b", "6b"]
    assert result["budgets"][0]["selection"] == result["parent"]["selection"]
    for budget, size in zip(result["budgets"], (12.31e9, 8.89e9, 6.0e9), strict=True):
        assert budget["parameters"] == pytest.approx(size, rel=0.005)
    assert result["run"]["DP"] == 32
    assert result["run"]["tokens"] == pytest.approx(110e9, rel=0.001)
    assert [stage["steps"] for stage in result["stages"]] == [5166, 1788]
    assert result["memory_per_gpu"]["total"] < 80 * 2**30
    assert any("FP8 would refuse" in warning for warning in result["warnings"])
    given = plan(capsys, RECIPES / "nemotron_nano_v2_12b_to_9b_6b.yaml", "--gpus", 64)["run"]
    assert given["DP"] == 4


@pytest.mark.slow
def test_a_gpu_holds_what_the_built_model_has(capsys: pytest.CaptureFixture[str]) -> None:
    """A rank's model, built by Megatron itself without storage: weights, teacher, gradients, Adam's state."""
    recipe = RECIPES / "nemotron_3_nano_30b_a3b_to_23b_12b.yaml"
    command = [sys.executable, "-m", "megatron_elastic", "train", str(recipe), "--ranks", "64", "--dry-run", "--json"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=500)
    (built,) = json.loads(done.stdout)["stages"]
    counted = plan(capsys, recipe, "--gpus", 64)["memory_per_gpu"]
    assert counted["gradients"] == built["gradient_bytes"]
    # Mamba's A_log and D stay in fp32, two numbers a head; the optimizer's shares are rounded up to whole numbers.
    for name in ("weights", "teacher", "optimizer"):
        assert counted[name] == pytest.approx(built[f"{name}_bytes"], rel=1e-6)
    assert plan(capsys, recipe, "--gpus", 128)["memory_per_gpu"]["optimizer"] < 0.9 * built["optimizer_bytes"]


def test_the_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--hf-config", str(published.DATA / "nemotron_3_nano_30b_a3b"), "--target", "2e10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    head, *rows = [line for line in lines if "selection" in line or "hidden" in line][-7:]
    assert len(rows) == 6
    assert {row.index("hidden") for row in rows} == {head.index("selection")}
    assert rows[1].startswith("20B-1")
    assert any("GB (" in line and "GiB)" in line and "one checkpoint" in line for line in lines)
    assert main(["plan", str(RECIPES / "quickstart.yaml")]) == 0
    told = capsys.readouterr().out
    assert "run: 2 GPU(s): TP 2, PP 1, CP 1, DP 1" in told
    assert "stage 2: 30 steps of 4 x 512 tokens" in told


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--hf-config", "absent.json"], 1, "absent.json"),
        (["--hf-config", published.DATA / "nemotron_nano_v2_9b", "--keep", "hidden=4479"], 1, "take one of them"),
        (["--hf-config", published.DATA / "nemotron_nano_v2_9b", "--keep", "depth=42"], 1, "choices of depth are [56]"),
        (["--hf-config", published.DATA / "nemotron_nano_v2_9b", "--gpus", "8"], 1, "give a recipe"),
        (
            ["--hf-config", published.DATA / "nemotron_nano_v2_9b", "--target", "5", "--unit", "latency"],
            1,
            "needs a table of measured latencies",
        ),
        (["absent.yaml"], 2, "absent.yaml: 1 fault"),
        ([RECIPES / "nemotron_nano_v2_12b_to_9b_6b.yaml", "--gpus", "24"], 2, "does not divide the 24 rank(s)"),
    ],
)
def test_what_cannot_be_planned(
    words: list[object], status: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *map(str, words)]) == status
    shown = capsys.readouterr()
    assert text in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["a.yaml", "--hf-config", "b"],
        ["a.yaml", "--target", "-1"],
        ["a.yaml", "--keep", "x"],
        ["a.yaml", "--profile", "fp7"],
    ],
)
def test_bad_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words])
    assert stop.value.code == 2
    assert capsys.readouterr().err
